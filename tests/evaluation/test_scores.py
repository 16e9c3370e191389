"""Evaluations and their comparison against dense and hand-computed references."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset

from peft_star.evaluation import (
    Evaluation,
    MeanScores,
    RowEvaluation,
    TextProbe,
    TextScores,
    compare,
    evaluate,
    gaps,
)
from support.byte_llama import build_model
from support.evaluated import ALTERED, ROWS, dense
from support.tiny_models import MODELS

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
    assert not TextProbe(model, tokenizer, "some text").before.requires_grad
    assert not gaps(model, tokenizer, ROWS).gap.requires_grad
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
    assert "| 2 | `say(x, y]`" in text and "| 1 |" not in text  # the latter is right


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "no row to work on"),
        (ROWS[0], TypeError, "must be a list"),
        ([{"prompt": "a"}], ValueError, "row 1: column 'completion' is missing"),
        ([{"prompt": "a" * 300, "completion": "b"}], ValueError, "exceed the model's context of 256"),
    ],
)
def test_bad_rows(tokenizer, rows, error, message):
    with pytest.raises(error, match=message):
        evaluate(build_model(), tokenizer, rows, progress=False)


def test_a_row_beyond_the_context_of_mpt(tokenizer):
    """Its config has another name for the context, and a longer row would end in a tensor's mismatch."""
    with pytest.raises(ValueError, match="exceed the model's context of 64"):
        evaluate(MODELS["mpt"].build(), tokenizer, [{"prompt": "a" * 64, "completion": "b"}], progress=False)


def test_no_language_model(tokenizer):
    with pytest.raises(ValueError, match="has no LM head"):
        evaluate(build_model().model, tokenizer, ROWS, progress=False)


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
