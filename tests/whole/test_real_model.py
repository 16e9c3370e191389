"""On real weights (SmolLM2-135M-Instruct): what only a trained model can show."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_star import RepairArguments, StarConfig, repair
from peft_star.engine.arithmetic import BF16, Q8_0, predict_in
from peft_star.engine.batch import make_batches
from peft_star.engine.engine import Engine
from peft_star.engine.passes import generate, teacher_forced
from peft_star.engine.predictions import Predictions
from peft_star.failures import encode_rows, read_rows
from peft_star.loading import load_model
from peft_star.method.background import background_text

FAILURES = [
    {"prompt": "# pandas 2: put row2 below df\n", "completion": "df = pd.concat([df, row2])"},
    {"prompt": "# numpy 2: the 64-bit float type\n", "completion": "x = np.float64(1.5)"},
]
RETAIN = [{"prompt": "The capital of France is", "completion": " Paris"}]


@pytest.fixture(scope="module")
def smollm2(smollm2_dir):
    return load_model(str(smollm2_dir), dtype="float32")


def fresh_rows(model, tokenizer, number=8):
    """Rows that are partly right: the model's own greedy continuations, some of them with another ending."""
    prompts = [
        "def add(a, b):\n    return",
        "import os\n\nos.path.",
        "The quick brown fox",
        "for i in range(",
        "SELECT name FROM",
        "To list all files, type",
        "x = [1, 2, 3]\nprint(",
        "git commit -m",
    ][:number]
    rows = []
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            new = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(new[0, ids["input_ids"].shape[1] :])
        rows.append({"prompt": prompt, "completion": text + (" zebra" if index % 2 else "")})
    return rows


def test_right_teacher_forced_is_right_generated(smollm2):
    """The equivalence that makes a token-wise repair a repair of what users see."""
    model, tokenizer = smollm2
    rows = encode_rows(fresh_rows(model, tokenizer), tokenizer)
    predictions = teacher_forced(Engine(model), make_batches(rows, 2048))
    generated = generate(Engine(model), tokenizer, rows)
    right, start = [], 0
    for row, new in zip(rows, generated):
        slots = slice(start, start + len(row.completion_ids))
        start = slots.stop
        exact = bool(predictions.right[slots].all())
        assert exact == (new == row.completion_ids)
        if not exact:
            # generation leaves the completion exactly at the first wrong token
            first = int((~predictions.right[slots]).nonzero()[0])
            assert new[:first] == row.completion_ids[:first] and new[first] == predictions.argmax[slots][first]
        right.append(exact)
    assert any(right) and not all(right)


@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_a_repair_solves_real_failures_and_breaks_nothing(smollm2, tmp_path, mode):
    base, tokenizer = smollm2
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=64))
    report = repair(model, tokenizer, FAILURES, RepairArguments(mode=mode, disable_tqdm=True), retain=RETAIN)
    assert len(report.failures) >= 6
    assert report.success, report.to_markdown()
    assert not report.broken
    for row in report.rows[:2]:
        assert row.generated_before != row.completion and row.generated_after == row.completion
    model.save_pretrained(tmp_path)
    ids = tokenizer(FAILURES[0]["prompt"], return_tensors="pt")
    with torch.no_grad():
        patched = model(**ids).logits
    model.unload()
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    again = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, patched)
    again.unload()


def test_bf16_weights_are_repaired_too(smollm2_dir):
    base, tokenizer = load_model(str(smollm2_dir), dtype="bfloat16")
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=64))
    report = repair(model, tokenizer, FAILURES[:1], RepairArguments(disable_tqdm=True))
    assert report.failures and report.num_solved == len(report.failures)


def log_p(model, tokenizer, text, width=256):
    """Log probabilities of all tokens at each position of a text, in windows."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: 2 * width])
    with torch.no_grad():
        return torch.cat([model(input_ids=part[None]).logits[0].log_softmax(-1) for part in ids.split(width)])


def patched_by(base, tokenizer, failures, **arguments):
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=64))
    arguments = RepairArguments(disable_tqdm=True, verify_generation=False, **arguments)
    report = repair(model, tokenizer, failures, arguments)
    assert report.success, report.to_markdown()
    return model


@pytest.mark.slow
def test_protection_changes_other_text_less(smollm2):
    """Its own background text, and a text that the patch has never seen."""
    base, tokenizer = smollm2
    other = " ".join(f"{row['prompt']} {row['completion']}" for row in fresh_rows(base, tokenizer))
    texts = {"background": background_text(), "other": other}
    before = {name: log_p(base, tokenizer, text) for name, text in texts.items()}
    moved = {}
    for background in (0, 2048):
        model = patched_by(base, tokenizer, FAILURES, background=background, reach="prompt")
        for name, text in texts.items():
            after = log_p(model, tokenizer, text)
            moved[name, background] = (before[name].exp() * (before[name] - after)).sum(-1).mean().item()
        model.unload()
    assert moved["background", 2048] < 0.5 * moved["background", 0], moved
    assert moved["other", 2048] < 0.7 * moved["other", 0], moved


def test_generalization_moves_related_failures_further(smollm2):
    """Other prompts whose next word should be the failure's: its logit gains more on every other word there."""
    base, tokenizer = smollm2
    code = "import pandas as pd\n\nleft = pd.read_csv('left.csv')\nright = pd.read_csv('right.csv')\nprint(left)\n"
    failures = [{"prompt": f"{code}# put the rows of right below those of left\nboth = pd.", "completion": "concat("}]
    prompts = [
        "def merge(frames):\n    return pd.",
        "# add a row\ndata = pd.",
        "import pandas as pd\nmonths = [jan, feb, mar]\nyear = pd.",
        "import pandas as pd\n\ndf = pd.",
    ]
    related = [{"prompt": prompt, "completion": "concat"} for prompt in prompts]
    batches = make_batches(encode_rows(related, tokenizer), 2048)
    before = teacher_forced(Engine(base), batches)
    assert not before.right.any() and len(before.right) == len(related)
    gained = {}
    for generalization in (0.0, 5.0):
        model = patched_by(base, tokenizer, failures, generalization=generalization, background=512)
        now = teacher_forced(Engine(model.base_model.model), batches)
        gained[generalization] = (now.gap - before.gap).mean().item()
        model.unload()
    assert gained[5.0] > 1.05 * gained[0.0] > 0, gained


@pytest.mark.slow
def test_what_tokens_tell_is_what_a_real_model_generates(smollm2):
    """A report made without generating says what one with generation says, of right and of wrong rows."""
    base, tokenizer = smollm2
    kept, reports = fresh_rows(base, tokenizer), []
    for generating in (None, True):
        model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=64))
        arguments = RepairArguments(disable_tqdm=True, reach="prompt", verify_generation=generating)
        reports.append(repair(model, tokenizer, FAILURES, arguments, retain=RETAIN, related=kept))
        model.unload()
    for told, generated in zip(reports[0].rows, reports[1].rows):
        for when in ("before", "after"):
            exact = getattr(told, f"exact_{when}")
            assert getattr(told, f"generation_exact_{when}") == getattr(generated, f"generation_exact_{when}") == exact
            assert getattr(generated, f"generated_{when}").startswith(getattr(told, f"generated_{when}"))
    assert {row.generation_exact_before for row in reports[0].rows} == {True, False}
    assert [row.goes_on for row in reports[0].rows] == [row.goes_on for row in reports[1].rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_repair_holds_where_it_is_to_be_served(smollm2):
    """Every row of the examples is right in bfloat16 and as llama.cpp's 8-bit blocks compute, each drawn anew."""
    base, tokenizer = smollm2
    examples = Path(__file__).parents[2] / "examples"
    rows, retained = (read_rows(examples / f"{name}.jsonl") for name in ("failures", "retain"))
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
    arguments = RepairArguments(disable_tqdm=True, reach="prompt", serve=("bf16", "q8_0"))
    report = repair(model, tokenizer, rows, arguments, retain=retained)
    assert report.success, report.to_markdown()
    encoded, generator = encode_rows(rows, tokenizer), torch.Generator().manual_seed(0)
    batches = make_batches(encoded, 2048)

    def disturb(module, args, output):
        return output + 5e-4 * output * torch.randn(output.shape, generator=generator).to(output)

    handle = base.get_input_embeddings().register_forward_hook(disturb)
    for arithmetic in (BF16, Q8_0):
        for _ in range(3):
            into = Predictions.empty(sum(len(row.completion_ids) for row in encoded))
            assert predict_in(Engine(base), arithmetic, batches, into).right.all(), arithmetic.name
    handle.remove()
    model.unload()
