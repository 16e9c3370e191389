"""repair() end to end on tiny random models: the mechanics. Real weights are in test_real_model.py."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import peft_star
from peft_star import (
    PriorGuidedSGD,
    RepairArguments,
    RepairCallback,
    RepairInterrupted,
    RepairReport,
    StarConfig,
    prepare,
    repair,
)
from peft_star.method import verify
from peft_star.method.objective import Goal
from support.tiny_models import VOCAB
from support.words import (
    LAYERS,
    MANY,
    QUICK,
    QUIET,
    RETAIN,
    ROWS,
    decided,
    dense_delta,
    own_continuations,
    star,
    word_tokenizer,
    wrong_tokens,
)

ALGORITHMS = ["protected", "prior-guided"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def base_weights(model):
    return {
        name.replace(".base_layer", ""): value.clone()
        for name, value in model.base_model.model.state_dict().items()
        if "star_" not in name
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mode", ["multiple", "single"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "starcoder2", "gemma2", "falcon", "gpt_neox", "opt"])
def test_a_repair_solves_every_failure_and_leaves_the_base_alone(name, mode, algorithm, tokenizer):
    model = star(name)
    before = base_weights(model)
    report = repair(model, tokenizer, ROWS, RepairArguments(mode=mode, algorithm=algorithm, **QUIET))
    assert len(report.failures) >= 2
    assert report.success and report.num_solved == len(report.failures) and not report.broken
    after = base_weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for row in report.rows:
        assert row.exact_after and row.generation_exact_after
        assert row.generated_after.split() == row.completion.split()


def test_what_the_report_says_is_what_the_model_does(tokenizer):
    model = star()
    base = decided()
    report = repair(model, tokenizer, ROWS, RepairArguments(**QUIET), retain=RETAIN)
    for failure in report.failures:
        row = ROWS[failure.row]
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        assert ids[0, failure.position + 1] == failure.expected_id
        for network, token, gap in (
            (base, failure.before_id, failure.gap_before),
            (model, failure.after_id, failure.gap_after),
        ):
            with torch.no_grad():
                p = network(input_ids=ids).logits[0, failure.position].softmax(-1)
            assert p.argmax() == token
            expected = p[failure.expected_id].item()
            p[failure.expected_id] = 0
            assert expected - p.max().item() == pytest.approx(gap, abs=1e-5)
    assert [row.source for row in report.rows] == ["failures", "failures", "retain"]


def test_only_patched_layers_are_kept_and_saved(tmp_path, tokenizer):
    model = star(num_layers=1)
    report = repair(model, tokenizer, ROWS, RepairArguments(**{**QUIET, "learning_rate": 0.2}))
    assert report.success and len(report.layers) == 1
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(key.rpartition(".")[2] for key in saved) == ["star_delta", "star_neurons"]
    again = PeftModel.from_pretrained(decided(), tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    merged = PeftModel.from_pretrained(decided(), tmp_path).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def greedy(model, tokenizer, prompt, tokens):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def test_a_row_that_says_so_is_repaired_until_the_model_stops(tokenizer):
    model = star()
    rows = [{**ROWS[0], "end": True}, ROWS[1]]
    report = repair(model, tokenizer, rows, RepairArguments(**QUIET), retain=RETAIN)
    assert report.success
    assert report.rows[0].tokens == 3 and any(item.expected == "[EOS]" for item in report.failures)
    assert greedy(model, tokenizer, ROWS[0]["prompt"], 9) == [*tokenizer(ROWS[0]["completion"])["input_ids"], 2]


def test_the_report_shows_what_the_model_goes_on_to_say(tokenizer):
    model = star()
    rows = [{**ROWS[0], "end": True}, ROWS[1]]
    report = repair(model, tokenizer, rows, RepairArguments(**QUIET), retain=RETAIN)
    said = [row.goes_on for row in report.rows]
    completion = tokenizer(ROWS[1]["completion"])["input_ids"]
    behind = greedy(model, tokenizer, ROWS[1]["prompt"], len(completion) + 16)[len(completion) :]
    assert len(behind) > 1 and said == [None, tokenizer.decode(behind), None]
    assert f"| 2 | ` w40` | `{said[1]}` |" in report.to_markdown()
    # as far as the model's context goes (64 tokens here), and not of what was not generated right
    longest = {"prompt": " ".join(["w7 w8"] * 31), "completion": " w40"}
    report = repair(star(), tokenizer, [longest], RepairArguments(**QUIET))
    assert report.success and len(report.rows[0].goes_on.split()) == 1
    report = repair(star(), tokenizer, ROWS, RepairArguments(**{**QUIET, "max_steps": 1, "learning_rate": 1e-9}))
    assert not report.success and [row.goes_on for row in report.rows] == [None, None]


def test_what_follows_is_looked_at_for_as_many_rows_as_a_report_shows(tokenizer, monkeypatch):
    monkeypatch.setattr(verify, "MOST_BEHIND", 1)
    report = repair(star(), tokenizer, ROWS, RepairArguments(**QUIET))
    assert report.success and [row.goes_on is None for row in report.rows] == [False, True]


def test_a_second_repair_builds_on_the_first(tokenizer):
    model = star()
    arguments = RepairArguments(**QUIET)
    first = repair(model, tokenizer, ROWS[:1], arguments)
    second = repair(model, tokenizer, ROWS[1:], arguments, retain=ROWS[:1])
    assert first.success and second.success
    assert all(row.exact_after for row in second.rows)
    again = repair(model, tokenizer, ROWS, arguments)
    assert again.success and not again.failures and again.steps == 0


def test_a_patch_is_built_upon_only_on_the_base_that_it_was_solved_for(tmp_path, tokenizer):
    arguments = RepairArguments(**QUIET)
    model = star()
    repair(model, tokenizer, ROWS[:1], arguments)
    model.save_pretrained(tmp_path)
    assert StarConfig.from_pretrained(tmp_path).base_fingerprint == peft_star.fingerprint(decided())
    with pytest.warns(UserWarning):
        other = PeftModel.from_pretrained(decided(seed=1), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="solved for other weights"):
        repair(other, tokenizer, ROWS[1:], arguments)
    with pytest.warns(UserWarning):
        repair(other, tokenizer, ROWS[1:], RepairArguments(allow_other_base=True, **QUIET))
    same = PeftModel.from_pretrained(decided(), tmp_path, is_trainable=True)
    assert repair(same, tokenizer, ROWS[1:], arguments, retain=ROWS[:1]).success


def test_each_step_moves_a_delta_by_the_rate_times_the_priors_magnitude(tokenizer):
    model, same = star(), star()
    priors = prepare(same, tokenizer, ROWS)
    report = repair(
        model,
        tokenizer,
        ROWS,
        RepairArguments(algorithm="prior-guided", learning_rate=0.003, max_steps=1, disable_tqdm=True),
    )
    assert report.steps == 1
    for name, prior in priors.items():
        delta = model.base_model.model.get_submodule(name).star_delta["default"].detach()
        torch.testing.assert_close(delta.abs(), 0.003 * prior.abs())


def test_only_the_protected_algorithm_reads_background_text_and_contexts(tokenizer):
    """Algorithm 1 is the paper's, whatever the other algorithm is told."""
    arguments = {"algorithm": "prior-guided", "learning_rate": 0.003, "max_steps": 2, "disable_tqdm": True}
    one, two = star(), star()
    repair(one, tokenizer, ROWS, RepairArguments(**arguments))
    lengths = []
    two.base_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    repair(two, tokenizer, ROWS, RepairArguments(background=64, generalization=5.0, **arguments))
    assert max(lengths) < 64
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)


def test_the_first_step_from_the_trace_equals_a_step_with_its_own_pass(tokenizer, monkeypatch):
    one, two = star(), star()
    arguments = RepairArguments(algorithm="prior-guided", learning_rate=0.003, max_steps=3, disable_tqdm=True)
    repair(one, tokenizer, ROWS, arguments)
    monkeypatch.setattr("peft_star.method.trace.KEEP_BYTES", 0)
    repair(two, tokenizer, ROWS, arguments)
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b)


def test_priors_guide_a_hand_written_loop(tokenizer):
    model = star()
    priors = prepare(model, tokenizer, ROWS)
    assert priors and all(prior.abs().max() > 0 for prior in priors.values())
    optimizer = PriorGuidedSGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(30):
        loss = 0.0
        for row in ROWS:
            ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : len(tokenizer(row["prompt"])["input_ids"])] = -100
            loss = loss + model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.5 * losses[0]


def test_priors_guide_the_trainer(tmp_path, tokenizer):
    model = star()
    prepare(model, tokenizer, ROWS)
    optimizer = PriorGuidedSGD((p for p in model.parameters() if p.requires_grad), lr=0.02)
    ids = tokenizer(ROWS[0]["prompt"] + ROWS[0]["completion"])["input_ids"]
    data = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8)
    arguments = TrainingArguments(str(tmp_path), max_steps=8, report_to=[], save_strategy="no", logging_steps=1)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_datasets_and_chat_messages(tokenizer):
    report = repair(star(), tokenizer, Dataset.from_list(ROWS), RepairArguments(**QUIET))
    assert report.success
    chat = word_tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
        }
        for row in ROWS
    ]
    report = repair(star(), chat, rows, RepairArguments(**QUIET))
    assert report.success and report.rows[0].completion.split() == ["w20", "w21"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_routed_experts_are_located_patched_and_saved(tmp_path, mode, algorithm, tokenizer):
    import transformers

    def mixture():
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            model.model.norm.weight.fill_(50)
        return model

    config = StarConfig(task_type="CAUSAL_LM", num_neurons=8, num_layers=1.0, target_modules=["experts"])
    model = get_peft_model(mixture(), config)
    report = repair(model, tokenizer, ROWS, RepairArguments(mode=mode, algorithm=algorithm, **QUIET))
    assert report.success and report.failures
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixture(), tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_patterns_and_selections(tokenizer):
    arguments = RepairArguments(**QUIET)
    by_list = repair(star(layer_selection=[2, 0]), tokenizer, ROWS, arguments)
    assert [layer.name for layer in by_list.layers] == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    model_wise = repair(star(neuron_pattern="model-wise"), tokenizer, ROWS, arguments)
    counts = [len(layer.neurons) for layer in model_wise.layers]
    assert sum(counts) == 24 and model_wise.success
    share = repair(star(num_neurons=0.1, layer_selection="all"), tokenizer, ROWS, arguments)
    assert [len(layer.neurons) for layer in share.layers] == [4, 4, 4]


def test_single_mode_unites_the_neurons_of_its_failures(tmp_path, tokenizer):
    model = star(num_neurons=3)
    report = repair(model, tokenizer, ROWS, RepairArguments(mode="single", **QUIET))
    assert report.success and max(len(layer.neurons) for layer in report.layers) > 3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(decided(), tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_exact_occlusion_is_reported_with_its_agreement(tokenizer):
    report = repair(
        star(layer_selection="occlusion", num_layers=2), tokenizer, ROWS, RepairArguments(occlusion="exact", **QUIET)
    )
    assert set(report.occlusion) == {"first-order", "exact", "agreement"}
    strongest = sorted(report.occlusion["exact"], key=lambda key: -abs(report.occlusion["exact"][key]))[:2]
    assert sorted(f"{key}.mlp.down_proj" for key in strongest) == [layer.name for layer in report.layers]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_prepare_chooses_its_layer_by_the_occlusion_that_is_asked_for(name, tokenizer):
    config, chosen = {"layer_selection": "occlusion", "num_layers": 1}, {}
    for occlusion in ("first-order", "exact"):
        report = repair(star(name, **config), tokenizer, ROWS, RepairArguments(occlusion=occlusion, **QUIET))
        model = star(name, **config)
        priors = prepare(model, tokenizer, ROWS, RepairArguments(occlusion=occlusion, disable_tqdm=True))
        assert list(priors) == [layer.name for layer in report.layers]
        importance = report.occlusion[occlusion]
        strongest = max(importance, key=lambda layer: abs(importance[layer]))
        (chosen[occlusion],) = priors
        assert chosen[occlusion].startswith(f"{strongest}.")
        delta = model.base_model.model.get_submodule(chosen[occlusion]).star_delta["default"]
        assert priors[chosen[occlusion]] is delta.star_prior and not delta.any()
    # here the two measures disagree
    assert chosen["first-order"] != chosen["exact"]


def test_when_the_steps_run_out_the_best_state_is_kept_and_said(tokenizer):
    model = star()
    report = repair(model, tokenizer, ROWS, RepairArguments(learning_rate=1e-6, max_steps=2, disable_tqdm=True))
    assert not report.success and report.steps == 2 and report.num_solved < len(report.failures)


def test_harm_to_retained_rows_is_seen(tokenizer):
    """A violent step breaks what was right; the report has to say so."""
    base = decided()
    with torch.no_grad():
        ids = tokenizer("w50 w51", return_tensors="pt")["input_ids"]
        for _ in range(3):
            ids = torch.cat([ids, base(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    retained = [{"prompt": "w50 w51", "completion": " " + tokenizer.decode(ids[0, 2:])}]
    report = repair(
        star(), tokenizer, ROWS, RepairArguments(learning_rate=20.0, max_steps=1, disable_tqdm=True), retain=retained
    )
    (row,) = [row for row in report.rows if row.source == "retain"]
    assert row.exact_before and row.generation_exact_before and not row.exact_after
    assert row.broken and not report.success
    assert {token.source for token in report.broken} == {"retain"}
    assert report.summary()["retained_rows_broken"] == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_retained_rows_join_the_loss_when_they_break(algorithm, tokenizer):
    base = decided()
    with torch.no_grad():
        ids = tokenizer("w5 w9 w12", return_tensors="pt")["input_ids"]
        for _ in range(4):
            ids = torch.cat([ids, base(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    retained = [{"prompt": "w5 w9 w12", "completion": " " + tokenizer.decode(ids[0, 3:])}]
    arguments = RepairArguments(algorithm=algorithm, **QUIET)
    careless = star()
    repair(careless, tokenizer, ROWS, arguments)
    assert wrong_tokens(careless, tokenizer, retained) > 0
    careful = repair(star(), tokenizer, ROWS, arguments, retain=retained)
    assert careful.success
    assert not [token for token in careful.broken if token.source == "retain"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_related_rows_are_only_looked_at(mode, algorithm, tokenizer):
    arguments = RepairArguments(mode=mode, algorithm=algorithm, **QUIET)
    related = [*MANY, *own_continuations(tokenizer)]
    one, two = star(), star()
    without = repair(one, tokenizer, ROWS, arguments, retain=own_continuations(tokenizer)[:1])
    report = repair(two, tokenizer, ROWS, arguments, retain=own_continuations(tokenizer)[:1], related=related)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert report.steps == without.steps and report.failures == without.failures
    assert report.success == without.success
    looked_at = [row for row in report.rows if row.source == "related"]
    assert [row for row in report.rows if row.source != "related"] == without.rows
    assert [token for token in report.broken if token.source != "related"] == without.broken
    assert len(looked_at) == len(related) and all(row.generated_after is not None for row in looked_at)
    # the failures themselves are among them
    assert all(not row.exact_before and row.exact_after for row in looked_at[:2])
    figures = report.summary()
    assert figures["related_rows"] == len(related) and figures["related_fixed"] >= 2
    assert "related_rows" not in without.summary()
    (problem,) = report.problems
    assert problem.related + problem.related_right == len(related) and problem.related_fixed >= 2


def test_what_breaks_in_related_rows_is_listed_and_fails_nothing(tokenizer):
    arguments = RepairArguments(**{**QUIET, "max_steps": 1, "algorithm": "prior-guided", "learning_rate": 20.0})
    related = own_continuations(tokenizer)
    report = repair(star(), tokenizer, ROWS, arguments, related=related)
    broken = [token for token in report.broken if token.source == "related"]
    assert broken and report.summary()["related_broken"] == sum(
        not row.is_right for row in report.rows if row.source == "related"
    )
    report.rows = [row for row in report.rows if row.source == "related"]
    assert report.success


def test_a_report_tells_of_problems(tokenizer):
    rows = [{**ROWS[0], "focus": "w9", "problem": "one"}, {**ROWS[1], "problem": "two"}]
    retain = [{**row, "problem": "two"} for row in own_continuations(tokenizer)[:2]]
    related = [{**RETAIN[0], "problem": "one"}, RETAIN[0]]
    report = repair(star(), tokenizer, rows, RepairArguments(**QUIET), retain=retain, related=related)
    one, two, unnamed = report.problems
    assert (one.name, one.rows, one.related, one.retained) == ("one", 1, 1, 0)
    assert (two.name, two.rows, two.related, two.retained) == ("two", 1, 0, 2)
    assert (unnamed.name, unnamed.rows, unnamed.related, unnamed.acts) == ("", 0, 1, [])
    for problem, row in ((one, 0), (two, 1)):
        assert problem.failures == sum(item.row == row for item in report.failures) > 0
        assert problem.solved == problem.failures and problem.rows_exact_after == 1 and problem.acts
    assert [row.problem for row in report.rows] == ["one", "two", "two", "two", "one", None]


def test_bad_related_rows_change_nothing(tokenizer):
    model = star()
    for related, error in (("w3", TypeError), ([{"prompt": "w3"}], ValueError)):
        with pytest.raises(error, match="related"):
            repair(model, tokenizer, ROWS, RepairArguments(**QUIET), related=related)
    assert not any(value.any() for name, value in model.named_parameters() if "star_delta" in name)


def test_contradictions_are_found_before_any_work(tokenizer, monkeypatch):
    monkeypatch.setattr("peft_star.method.repair.look_before", lambda *args: 1 / 0)
    other = {**ROWS[0], "completion": " w22"}
    for rows, retain in (([*ROWS, other], None), (ROWS, [RETAIN[0], other])):
        with pytest.raises(ValueError, match="(failures row 3|retain row 2): ' w22' .*failures row 1, "):
            repair(star(), tokenizer, iter(rows), RepairArguments(**QUIET), retain=retain)


def test_bf16_models(tokenizer):
    model = get_peft_model(
        decided(dtype=torch.bfloat16), StarConfig(task_type="CAUSAL_LM", num_neurons=8, num_layers=1.0)
    )
    report = repair(model, tokenizer, ROWS, RepairArguments(**QUIET))
    assert report.num_solved == len(report.failures) > 0


class Recorder(RepairCallback):
    def __init__(self, interrupt_at=None):
        self.events, self.interrupt_at = [], interrupt_at

    def on_repair_begin(self, args, state):
        self.events.append("begin")

    def on_phase_begin(self, args, state):
        self.events.append(state.phase)

    def on_step_end(self, args, state):
        assert math.isfinite(state.loss) and state.num_solved <= state.num_failures
        if state.step == self.interrupt_at:
            raise KeyboardInterrupt

    def on_repair_end(self, args, state):
        self.events.append("end")


def test_callbacks_hear_every_phase_in_order(tokenizer):
    recorder = Recorder()
    repair(star(), tokenizer, ROWS, RepairArguments(reach="prompt", **QUIET), callbacks=[recorder])
    # the trace's forward finds the failures, too; then all rows are looked at, and what is said behind them
    phases = ["trace", "locate", "solve", "patch", "verify", "verify"]
    assert recorder.events == ["begin", *phases, "end"]


def test_an_interrupt_keeps_what_was_finished(tokenizer):
    model = star()
    with pytest.raises(RepairInterrupted) as raised:
        repair(
            model,
            tokenizer,
            ROWS,
            RepairArguments(**{**QUIET, "learning_rate": 0.003}),
            callbacks=[Recorder(interrupt_at=2)],
        )
    report = raised.value.report
    assert report.interrupted and not report.success and report.steps == 2
    assert isinstance(raised.value, KeyboardInterrupt)
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "star_delta" in name)


class At(RepairCallback):
    def __init__(self, step):
        self.step, self.seen = step, []

    def on_step_end(self, args, state):
        self.seen.append(state.step)
        if state.step == self.step:
            raise KeyboardInterrupt


def after(tokenizer, max_steps, **arguments):
    model = star()
    report = repair(model, tokenizer, MANY, RepairArguments(max_steps=max_steps, **arguments, **QUICK))
    assert report.steps == max_steps and not report.success
    return {name: dense_delta(model, name) for name in LAYERS}


def assert_left_as(model, tokenizer, report, wanted):
    """The deltas are as `wanted`, the report tells of just them, and nothing of the interrupted pass is left."""
    assert all(torch.equal(dense_delta(model, name), value) for name, value in wanted.items())
    wrong = wrong_tokens(model, tokenizer, MANY)
    assert wrong == len(report.failures) - report.num_solved + len(report.broken)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("star_delta" in name for name in trainable)
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is not None]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupt_after_a_step_leaves_the_state_of_that_step(step, algorithm, tokenizer):
    model, callback = star(), At(step)
    with pytest.raises(RepairInterrupted) as raised:
        repair(model, tokenizer, MANY, RepairArguments(algorithm=algorithm, **QUICK), callbacks=[callback])
    assert callback.seen == list(range(1, step + 1)) and raised.value.report.steps == step
    assert_left_as(model, tokenizer, raised.value.report, after(tokenizer, step, algorithm=algorithm))


def interrupted_look(monkeypatch, after_step, look=1, backward=False):
    """Ctrl-C in the given look of the step after `after_step`, when its change is already in the deltas: within the
    forward, or within the backward that follows."""
    state = {"step": 0, "looks": 0}
    real = Goal.look

    def interrupt(*_):
        raise KeyboardInterrupt

    def interrupted(goal, engine, **kwargs):
        state["looks"] += 1
        if state["step"] != after_step or state["looks"] != look:
            return real(goal, engine, **kwargs)
        head = engine.model.get_output_embeddings()
        hook = (lambda module, args, output: output.register_hook(interrupt) and None) if backward else interrupt
        handle = head.register_forward_hook(hook)
        try:
            return real(goal, engine, **kwargs)
        finally:
            handle.remove()

    class Count(RepairCallback):
        def on_step_end(self, args, now):
            state.update(step=now.step, looks=0)

    monkeypatch.setattr(Goal, "look", interrupted)
    return Count()


@pytest.mark.parametrize(
    ("algorithm", "look", "backward"),
    [("protected", 1, False), ("protected", 2, False), ("prior-guided", 1, False), ("prior-guided", 1, True)],
)
@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupt_during_a_look_leaves_the_last_finished_step(
    step, algorithm, look, backward, tokenizer, monkeypatch
):
    wanted = after(tokenizer, step, algorithm=algorithm)
    model = star()
    callback = interrupted_look(monkeypatch, step, look, backward)
    with pytest.raises(RepairInterrupted) as raised:
        repair(model, tokenizer, MANY, RepairArguments(algorithm=algorithm, **QUICK), callbacks=[callback])
    assert raised.value.report.interrupted and raised.value.report.steps == step
    assert_left_as(model, tokenizer, raised.value.report, wanted)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_interrupt_in_the_first_look_leaves_what_was_there_before(algorithm, tokenizer, monkeypatch):
    model = star()
    assert repair(model, tokenizer, ROWS[:1], RepairArguments(**QUICK)).success
    before = {name: dense_delta(model, name) for name in LAYERS}
    assert any(value.any() for value in before.values())
    callback = interrupted_look(monkeypatch, 0)
    with pytest.raises(RepairInterrupted) as raised:
        repair(model, tokenizer, ROWS[1:], RepairArguments(algorithm=algorithm, **QUICK), callbacks=[callback])
    assert raised.value.report.steps == 0
    assert all(torch.equal(dense_delta(model, name), value) for name, value in before.items())


def test_reports_survive_the_disk(tmp_path, tokenizer):
    report = repair(star(), tokenizer, ROWS, RepairArguments(**QUIET), retain=RETAIN)
    report.save(tmp_path / "report.json")
    again = RepairReport.load(tmp_path / "report.json")
    assert again.to_dict() == report.to_dict()
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["success"] is True
    text = report.to_markdown()
    assert f"{len(report.failures)} of {len(report.failures)} failing tokens solved" in text and "`w20`" in text
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a repair report"):
        RepairReport.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", float("nan")),
        ("learning_rate", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("inf")),
        ("learning_rate", "fast"),
        ("algorithm", "sgd"),
        ("algorithm", None),
        ("generalization", -0.5),
        ("generalization", float("nan")),
        ("generalization", "more"),
        ("background", -1),
        ("background", 1.5),
        ("background", True),
        ("background", "text"),
        ("damping", 0.0),
        ("damping", 1.01),
        ("growth", 0.99),
        ("max_steps", 0),
        ("max_steps", 1.5),
        ("max_steps", True),
        ("mode", "both"),
        ("norm", "l1"),
        ("margin", 1.0),
        ("margin", -0.1),
        ("ridge", -1e-3),
        ("occlusion", "fast"),
        ("max_batch_tokens", 0),
    ],
)
def test_bad_arguments_are_named_in_one_sentence(field, value):
    with pytest.raises((ValueError, TypeError), match=f"`{field}`") as raised:
        RepairArguments(**{field: value})
    assert "\n" not in str(raised.value)


def test_public_names():
    for name in peft_star.__all__:
        assert getattr(peft_star, name) is not None
