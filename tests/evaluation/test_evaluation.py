"""The metrics against dense and hand-computed references, and against the libraries' own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model

from peft_star import RepairArguments, StarConfig, lm_eval, repair
from peft_star.evaluation import (
    Evaluation,
    Gaps,
    MeanScores,
    RowEvaluation,
    TextProbe,
    TextScores,
    compare,
    evaluate,
    gaps,
    harm,
    side_effects,
)
from peft_star.failures import encode_rows
from support.byte_llama import build_model, build_tokenizer

ROWS = [{"prompt": "a b", "completion": "cd</s>"}, {"prompt": "xyz", "completion": "say(x, y)"}]
# the same, with one character changed
ALTERED = [{"prompt": "a b", "completion": "cd</s>"}, {"prompt": "xyz", "completion": "say(x, y]"}]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def patched(tokenizer) -> PeftModel:
    """A model that says exactly ROWS. Not to be changed."""
    model = get_peft_model(build_model(), StarConfig(task_type="CAUSAL_LM", num_neurons=32))
    report = repair(model, tokenizer, ROWS, RepairArguments(learning_rate=0.05, max_steps=200, disable_tqdm=True))
    assert report.success
    return model


@torch.no_grad()
def dense(model, tokenizer, row: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N, V) at the completion tokens, and those tokens (N), one row at a time and unpadded."""
    prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1), torch.tensor(completion)


# evaluate


def test_token_figures_equal_dense_ones(patched, tokenizer):
    result = evaluate(patched, tokenizer, ALTERED, progress=False)
    pairs = [dense(patched, tokenizer, row) for row in ALTERED]
    log_p = torch.cat([values.gather(-1, ids[:, None])[:, 0] for values, ids in pairs])
    right = torch.cat([values.argmax(-1) == ids for values, ids in pairs])
    assert right.sum() == 11 and result.tokens == 12
    assert result.exact_match == pytest.approx(11 / 12)
    assert result.perplexity == pytest.approx(math.exp(-log_p.mean().item()), rel=1e-4)
    assert [row.predicted_ids for row in result.rows] == [values.argmax(-1).tolist() for values, _ in pairs]
    assert [row.log_likelihood for row in result.rows] == pytest.approx(
        [log_p[:3].sum().item(), log_p[3:].sum().item()], rel=1e-4
    )


def test_text_scores(patched, tokenizer):
    result = evaluate(patched, tokenizer, ALTERED, progress=False)
    for kind in ("teacher_forced", "generated"):
        first, second = (getattr(row, kind) for row in result.rows)
        assert first == TextScores("cd", True, 1.0, 1.0, 1.0)
        assert (second.text, second.exact) == ("say(x, y)", False)
        assert second.edit_similarity == pytest.approx(8 / 9)
        # "say ( x , y )" and "say ( x , y ]": five of six in common, which rouge-score's own tokenizer would not see
        assert second.rouge_l == pytest.approx(5 / 6)
        assert second.bleu == pytest.approx(sacrebleu.sentence_bleu("say(x, y)", ["say(x, y]"]).score / 100)
        assert 0 < second.bleu < 1
        means = getattr(result, kind)
        assert (means.exact, means.edit_similarity, means.rouge_l) == pytest.approx((1 / 2, 17 / 18, 11 / 12))
        corpus = sacrebleu.corpus_bleu(["cd", "say(x, y)"], [["cd", "say(x, y]"]])
        assert means.bleu == pytest.approx(corpus.score / 100)


def test_bleu_of_texts_too_short_for_four_grams(patched, tokenizer):
    result = evaluate(patched, tokenizer, ROWS[:1], progress=False)
    assert result.teacher_forced == MeanScores(1.0, 1.0, 1.0, 1.0)


def test_rouge_keeps_case(patched, tokenizer):
    row = evaluate(patched, tokenizer, [{"prompt": "xyz", "completion": "Say(x, y)"}], progress=False).rows[0]
    assert row.generated.text == "say(x, y)" and row.generated.rouge_l == pytest.approx(5 / 6)


def test_a_ruled_out_token_leaves_perplexity_finite(tokenizer):
    model = build_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    assert math.isfinite(evaluate(model, tokenizer, ROWS, generate=False, progress=False).perplexity)


def test_batches_do_not_matter(patched, tokenizer):
    rows = [*ALTERED, {"prompt": "a much longer prompt than those", "completion": "q"}]
    one, many = (evaluate(patched, tokenizer, rows, max_batch_tokens=n, progress=False) for n in (1, 4096))
    assert [row.generated for row in one.rows] == [row.generated for row in many.rows]
    assert [row.predicted_ids for row in one.rows] == [row.predicted_ids for row in many.rows]
    assert one.perplexity == pytest.approx(many.perplexity, rel=1e-4)


def test_dataset_without_generation(patched, tokenizer):
    seen = []
    result = evaluate(patched, tokenizer, Dataset.from_list(ALTERED), generate=False, progress=seen.append)
    assert sum(seen) == 2
    assert result.generated is None and all(row.generated is None for row in result.rows)
    assert result.to_dict()["summary"]["generated"] is None
    assert "generated" not in result.to_markdown()
    whole = evaluate(patched, tokenizer, ALTERED, progress=seen.append)
    assert sum(seen) == 2 + 4
    assert whole.teacher_forced == result.teacher_forced and whole.exact_match == result.exact_match


def test_modes_come_back(tokenizer):
    model = build_model()
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    result = evaluate(model, tokenizer, ROWS, progress=False)
    TextProbe(model, tokenizer, "some text")
    gaps(model, tokenizer, ROWS)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert result.perplexity == evaluate(build_model(), tokenizer, ROWS, progress=False).perplexity


def test_report_forms(patched, tokenizer, tmp_path):
    result = evaluate(patched, tokenizer, ALTERED, progress=False)
    result.save(tmp_path / "evaluation.json")
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved == result.to_dict()
    assert saved["summary"]["exact_match"] == result.exact_match
    assert saved["rows"][1]["generated"]["text"] == "say(x, y)"
    text = result.to_markdown()
    assert "91.67% of the tokens right" in text and "`say(x, y]` | `say(x, y)`" in text
    assert "| 0 |" not in text  # a row that is right


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "no row to work on"),
        (ROWS[0], TypeError, "must be a list"),
        ([{"prompt": "a"}], ValueError, "row 0: column 'completion' is missing"),
        ([{"prompt": "a" * 300, "completion": "b"}], ValueError, "exceed the model's context of 256"),
    ],
)
def test_bad_rows(tokenizer, rows, error, message):
    with pytest.raises(error, match=message):
        evaluate(build_model(), tokenizer, rows, progress=False)


def test_no_language_model(tokenizer):
    with pytest.raises(ValueError, match="has no LM head"):
        evaluate(build_model().model, tokenizer, ROWS, progress=False)


@pytest.mark.parametrize("module", ["sacrebleu.metrics", "rouge_score.rouge_scorer", "rapidfuzz.distance"])
def test_missing_library(monkeypatch, tokenizer, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}; pip install 'peft-star\[eval\]'"):
        evaluate(build_model(), tokenizer, ROWS)


# compare


def by_hand(right: list[list[bool]], generated: list[bool] | None = None) -> Evaluation:
    def scores(exact: bool) -> TextScores:
        return TextScores("", exact, 0.0, 0.0, 0.0)

    rows = [
        RowEvaluation(
            number, "p", "c", [5] * len(row), [5 if item else 6 for item in row], -1.0, scores(all(row)),
            scores(generated[number]) if generated else None,
        )
        for number, row in enumerate(right)
    ]  # fmt: skip
    means = MeanScores(0.0, 0.0, 0.0, 0.0)
    return Evaluation(rows, means, means if generated else None)


def test_compare():
    before = by_hand([[True, False], [True, True], [False]], [False, True, False])
    after = by_hand([[True, True], [False, True], [False]], [True, False, False])
    result = compare(before, after, seconds=3.0)
    assert (result.failures, result.solved, result.right, result.broken) == (2, 1, 3, 1)
    assert (result.solved_share, result.broken_share, result.seconds_per_failure) == (1 / 2, 1 / 3, 1.5)
    assert (result.rows_fixed, result.rows_broken) == ([0], [1])
    assert (result.generations_fixed, result.generations_broken) == ([0], [1])
    assert result.to_dict()["solved_share"] == 1 / 2
    assert "| failing tokens solved | 1 / 2 (50.00%) |" in result.to_markdown()
    assert "| seconds per failure | 1.50 |" in result.to_markdown()


def test_compare_without_generation_or_failures():
    result = compare(by_hand([[True]]), by_hand([[True]], [True]), seconds=1.0)
    assert (result.solved_share, result.broken_share, result.seconds_per_failure) == (1.0, 0.0, None)
    assert result.generations_fixed is None and "generations" not in result.to_markdown()


def test_compare_of_different_rows():
    with pytest.raises(ValueError, match="different rows"):
        compare(by_hand([[True]]), by_hand([[True, True]]))


# gaps and side effects


def test_gaps_keep_the_rival_of_the_unpatched_model(patched, tokenizer):
    with patched.disable_adapter():
        before = gaps(patched, tokenizer, ROWS)
        references = [dense(patched, tokenizer, row) for row in ROWS]
    after = gaps(patched, tokenizer, ROWS, before=before)
    was, ids = (torch.cat(parts) for parts in zip(*references))
    now = torch.cat([dense(patched, tokenizer, row)[0] for row in ROWS])
    failing = was.argmax(-1) != ids
    assert failing.sum() == len(before) == len(after)
    ids, rival = ids[failing, None], was[failing].argmax(-1, keepdim=True)
    for result, values in ((before, was[failing]), (after, now[failing])):
        assert torch.equal(result.expected, ids[:, 0]) and torch.equal(result.rival, rival[:, 0])
        expected = (values.gather(-1, ids).exp() - values.gather(-1, rival).exp())[:, 0]
        torch.testing.assert_close(result.gap, expected, atol=1e-5, rtol=0)
    assert (before.gap < 0).all() and (after.gap > 0).all()
    assert torch.equal(after.argmax, after.expected)


def test_gaps_of_a_part_of_the_rows_and_of_given_positions(patched, tokenizer):
    rows = encode_rows(ROWS, tokenizer)
    with patched.disable_adapter():
        before = gaps(patched, tokenizer, rows)
    part = gaps(patched, tokenizer, rows[1:], before=before)
    assert part.keys == [key for key in before.keys if key[0] == 1]
    whole = gaps(patched, tokenizer, rows, before=before)
    torch.testing.assert_close(part.gap, whole.gap[-len(part) :], atol=1e-5, rtol=0)
    # where the model is right, the rival is its second choice
    chosen = gaps(patched, tokenizer, rows, positions=[(1, 3), (0, 2)])
    assert chosen.keys == [(1, 3), (0, 2)]
    for slot, (row, offset) in enumerate([(1, 1), (0, 0)]):
        values, ids = dense(patched, tokenizer, ROWS[row])
        top = values[offset].exp().topk(2)
        assert chosen.expected[slot] == ids[offset] == top.indices[0] and chosen.rival[slot] == top.indices[1]
        assert chosen.gap[slot].item() == pytest.approx((top.values[0] - top.values[1]).item(), abs=1e-5)
    assert len(gaps(patched, tokenizer, rows)) == 0  # nothing fails any more


def test_gaps_that_do_not_belong_together(patched, tokenizer):
    with patched.disable_adapter():
        before = gaps(patched, tokenizer, ROWS)
        with pytest.raises(ValueError, match="measured on other rows"):
            gaps(patched, tokenizer, [{"prompt": "a b", "completion": "XXXX"}], before=before)
    with pytest.raises(ValueError, match="not both"):
        gaps(patched, tokenizer, ROWS, before=before, positions=[(0, 2)])
    with pytest.raises(ValueError, match="Position 1 of row 0"):
        gaps(patched, tokenizer, ROWS, positions=[(0, 1)])
    rows = encode_rows(ROWS, tokenizer)
    with pytest.raises(ValueError, match="same index"):
        gaps(patched, tokenizer, [rows[0], rows[0]])


def gaps_by_hand(*entries: tuple[int, int, int, int, float, float]) -> Gaps:
    """Of (row, expected, rival, argmax, p(expected), p(rival)), each at position 4."""
    rows, *ids, p_expected, p_rival = zip(*entries)
    tensors = [torch.tensor(values) for values in (*ids, p_expected, p_rival)]
    return Gaps([(row, 4) for row in rows], *tensors)


BEFORE = gaps_by_hand((0, 7, 8, 8, 0.1, 0.6), (1, 7, 9, 9, 0.2, 0.4), (2, 5, 8, 8, 0.3, 0.4), (3, 6, 8, 8, 0.1, 0.9))
AFTER = gaps_by_hand((0, 7, 8, 7, 0.7, 0.2), (1, 7, 9, 3, 0.1, 0.4), (2, 5, 8, 9, 0.2, 0.4), (3, 6, 8, 8, 0.1, 0.6))


def test_side_effects_by_hand():
    # the gaps change by +1.0 and -0.1 on the related rows, by -0.1 and +0.3 on the unrelated ones
    result = side_effects(BEFORE, AFTER, related=[0, 1], unrelated=[2, 3])
    g_rmse, s_rmse = math.sqrt((1.0 + 0.01) / 2), 1 - math.sqrt((0.01 + 0.09) / 2)
    assert result.g_mae == pytest.approx(0.55) and result.s_mae == pytest.approx(0.8)
    assert result.g_rmse == pytest.approx(g_rmse) and result.s_rmse == pytest.approx(s_rmse)
    assert result.gsh_mae == pytest.approx(2 * 0.55 * 0.8 / 1.35)
    assert result.gsh_rmse == pytest.approx(2 * g_rmse * s_rmse / (g_rmse + s_rmse))
    assert result.signed_g == pytest.approx(0.45)
    assert (result.related, result.related_failing, result.related_fixed) == (2, 2, 1)
    assert (result.unrelated, result.unrelated_failing, result.unrelated_changed) == (2, 2, 1)
    assert result.related_fixed_share == result.unrelated_changed_share == 1 / 2
    assert result.to_dict()["gsh_mae"] == result.gsh_mae
    assert "| MAE | 0.5500 | 0.8000 |" in result.to_markdown()


def test_no_change_and_the_worst_one():
    nothing = side_effects(BEFORE, BEFORE, [0, 1], [2, 3])
    assert (nothing.g_mae, nothing.s_mae, nothing.gsh_mae) == (0, 1, 0)
    # nothing gained where it should, everything changed where it should not
    before = gaps_by_hand((0, 1, 2, 2, 0.0, 1.0), (1, 3, 4, 4, 0.0, 0.5))
    after = gaps_by_hand((0, 1, 2, 2, 0.0, 1.0), (1, 3, 4, 3, 0.5, 0.0))
    worst = side_effects(before, after, [0], [1])
    assert (worst.g_mae, worst.s_mae, worst.gsh_mae, worst.gsh_rmse) == (0, 0, 0, 0)


def test_side_effects_of_a_real_patch(patched, tokenizer):
    with patched.disable_adapter():
        before = gaps(patched, tokenizer, ROWS)
    after = gaps(patched, tokenizer, ROWS, before=before)
    result = side_effects(before, after, [0], [1])
    change = after.gap - before.gap
    count = sum(key[0] == 0 for key in before.keys)
    assert result.g_mae == result.signed_g == pytest.approx(change[:count].mean().item())
    assert result.s_mae == pytest.approx(1 - change[count:].mean().item())
    assert result.related_fixed == result.related_failing == count
    assert result.unrelated_changed == result.unrelated_failing == len(before) - count


@pytest.mark.parametrize(
    ("after", "related", "message"),
    [
        (AFTER, [9], "no related position"),
        (gaps_by_hand((2, 5, 8, 8, 0.3, 0.4), (3, 6, 8, 8, 0.1, 0.9)), [0], "lacks row 0"),
        (gaps_by_hand(*[(row, 1, 2, 3, 0.1, 0.2) for row in range(4)]), [0], "other rivals"),
    ],
)
def test_side_effects_that_cannot_be_told(after, related, message):
    with pytest.raises(ValueError, match=message):
        side_effects(BEFORE, after, related, [2, 3])


# harm


def test_harm_by_hand():
    before = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()
    after = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]]).log()
    result = harm(before, after, torch.tensor([2, 0, 1]))
    first = 0.5 * math.log(2) + 0.25 * math.log(1 / 2)
    last = 0.2 * math.log(1 / 3) + 0.6 * math.log(3)
    assert result.tokens == 3 and result.kl == pytest.approx((first + last) / 3)
    assert result.perplexity_before == pytest.approx(1 / math.sqrt(0.5 * 0.8))
    assert result.perplexity_after == pytest.approx(1 / math.sqrt(0.25 * 0.8))
    assert result.perplexity_ratio == pytest.approx(math.sqrt(2))
    assert (result.right_before, result.broken, result.broken_share) == (2, 1, 1 / 2)
    assert result.to_dict()["perplexity_ratio"] == result.perplexity_ratio


def test_harm_of_long_texts_and_of_logits():
    """More positions than are compared at once."""
    torch.manual_seed(0)
    before, after, ids = torch.randn(150, 11) * 3, torch.randn(150, 11) * 3, torch.randint(11, (150,))
    result = harm(before, after, ids)
    was, now = before.log_softmax(-1), after.log_softmax(-1)
    assert result.kl == pytest.approx((was.exp() * (was - now)).sum(-1).mean().item(), rel=1e-5)
    for perplexity, values in ((result.perplexity_before, was), (result.perplexity_after, now)):
        nll = -values[:-1].gather(-1, ids[1:, None]).mean().item()
        assert perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    right = was[:-1].argmax(-1) == ids[1:]
    assert result.right_before == right.sum()
    assert result.broken == (right & (now[:-1].argmax(-1) != ids[1:])).sum()


def test_tokens_that_a_model_rules_out():
    logits = torch.tensor([[1.0, 2.0, -math.inf], [0.0, 1.0, -math.inf]])
    assert harm(logits, logits, torch.tensor([0, 1])).kl == 0


def test_harm_of_what_does_not_fit():
    with pytest.raises(ValueError, match="on 3 tokens"):
        harm(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="two tokens at least"):
        harm(torch.zeros(1, 5), torch.zeros(1, 5), torch.tensor([1]))


def test_text_probe(patched, tokenizer):
    text = "A text that has nothing to do with it. " * 5
    with patched.disable_adapter():
        probe = TextProbe(patched, tokenizer, text, max_tokens=100)
        same = probe(patched)
    assert (same.kl, same.perplexity_ratio, same.broken, same.tokens) == (0, 1, 0, 100)
    ids = torch.tensor(tokenizer(text)["input_ids"][:100])
    with torch.no_grad():
        now = patched(input_ids=ids[None]).logits[0]
        with patched.disable_adapter():
            was = patched(input_ids=ids[None]).logits[0]
    assert probe(patched) == harm(was, now, ids) and probe(patched).kl > 0


def test_text_probe_sees_a_changed_head(tokenizer):
    model = build_model(tie_word_embeddings=False)
    probe = TextProbe(model, tokenizer, "some text")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert probe(model).kl > 0.01


def test_text_probe_reads_no_more_than_the_context(tokenizer):
    assert TextProbe(build_model(), tokenizer, "x" * 999, max_tokens=999).ids.numel() == 256
    with pytest.raises(ValueError, match="two tokens at least"):
        TextProbe(build_model(), tokenizer, "x")


# lm-eval


def run_lm_eval(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peft_star.lm_eval", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_lm_eval_loads_a_patch(tiny_dir: Path, patched, tmp_path: Path):
    pytest.importorskip("lm_eval")
    patched.save_pretrained(tmp_path / "patch")
    task = Path(__file__).parents[2] / "examples" / "lm_eval_task"
    values = []
    for arguments in (f"pretrained={tiny_dir}", f"pretrained={tiny_dir},peft={tmp_path / 'patch'}"):
        result = run_lm_eval(
            *("--model", "hf", "--model_args", arguments, "--tasks", "peft_star_idioms", "--device", "cpu"),
            *("--include_path", str(task), "--output_path", str(tmp_path / "out"), "--log_samples"),
        )
        assert result.returncode == 0, result.stderr[-2000:]
        samples = max(tmp_path.glob("out/**/samples_*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        lines = samples.read_text().splitlines()
        assert len(lines) == 10
        values.append([json.loads(line)["filtered_resps"] for line in lines])
    assert values[0] != values[1]


def test_lm_eval_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as exit_:
        lm_eval.main()
    assert exit_.value.code == 2
    assert "pip install 'peft-star[lm-eval]'" in capsys.readouterr().err
