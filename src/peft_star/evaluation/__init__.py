"""Evaluation: how good a model is on rows, and what a patch changes elsewhere (paper section 4, "Measures").

[`evaluate`] has the metrics of RQ1, on teacher-forced predictions and on greedy generation, and [`compare`] what
changed between two of them. [`gaps`] and [`side_effects`] have RQ3: generalization and specificity. [`TextProbe`] goes
beyond the paper: it measures harm on text that has nothing to do with a repair.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..engine import passes as verify
from ..engine.batch import completion_offsets, make_batches
from ..engine.passes import completion_logits
from ..failures import Row, encode_rows
from ..files import write_json
from ..models.inputs import input_device
from ..report import code

# rows of the vocabulary's width that are held in float32 beside the logits
_CHUNK = 64


@dataclass
class TextScores:
    """How near one text is to its row's completion; each score lies in 0..1.

    Attributes:
        text: What the model said, without the token that ends a turn.
        exact: Every token is right.
        edit_similarity: 1 − Levenshtein distance / length of the longer text, by characters.
        bleu: Sentence BLEU-4 (sacrebleu, effective order, its default tokenizer and smoothing).
        rouge_l: F-measure of ROUGE-L over words and single punctuation marks, case-sensitive.
    """

    text: str
    exact: bool
    edit_similarity: float
    bleu: float
    rouge_l: float


@dataclass
class MeanScores:
    """[`TextScores`] over rows: `exact`, `edit_similarity` and `rouge_l` are means, `bleu` is corpus-level BLEU-4."""

    exact: float
    edit_similarity: float
    bleu: float
    rouge_l: float


@dataclass
class RowEvaluation:
    """One row.

    Attributes:
        row: Its index.
        prompt, completion: Its texts.
        expected_ids: The completion's tokens.
        predicted_ids: The model's argmax for each of them, given the right tokens before it.
        log_likelihood: Log-probability of the completion, in nats.
        teacher_forced, generated: Scores of the argmax tokens' text, and of the greedy generation's (None: not run).
    """

    row: int
    prompt: str
    completion: str
    expected_ids: list[int]
    predicted_ids: list[int]
    log_likelihood: float
    teacher_forced: TextScores
    generated: TextScores | None = None

    @property
    def right(self) -> list[bool]:
        """Per completion token, whether it is predicted right."""
        return [expected == predicted for expected, predicted in zip(self.expected_ids, self.predicted_ids)]


@dataclass
class Evaluation:
    """What [`evaluate`] returns.

    Attributes:
        rows: One [`RowEvaluation`] a row.
        teacher_forced: Scores of the argmax tokens, each given the right tokens before it.
        generated: Scores of greedy generation; None when it was not run.
        seconds: Seconds by phase.
    """

    rows: list[RowEvaluation]
    teacher_forced: MeanScores
    generated: MeanScores | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Completion tokens of all rows."""
        return sum(len(row.expected_ids) for row in self.rows)

    @property
    def exact_match(self) -> float:
        """Share of completion tokens predicted right, teacher-forced: the paper's Exact Match."""
        return sum(sum(row.right) for row in self.rows) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability (nats) of a completion token."""
        return math.exp(-sum(row.log_likelihood for row in self.rows) / self.tokens)

    def summary(self) -> dict[str, Any]:
        """The figures over all rows."""
        return {
            "rows": len(self.rows),
            "tokens": self.tokens,
            "exact_match": self.exact_match,
            "perplexity": self.perplexity,
            "teacher_forced": asdict(self.teacher_forced),
            "generated": asdict(self.generated) if self.generated else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types, with the `summary`."""
        return {"summary": self.summary(), "seconds": self.seconds, "rows": [asdict(row) for row in self.rows]}

    def save(self, path: str | os.PathLike) -> None:
        """Write the evaluation as JSON; the file at `path` is replaced only when the new one is complete."""
        write_json(path, self.to_dict())

    def to_markdown(self, max_rows: int = 50) -> str:
        """The evaluation as Markdown: the figures, then the rows that are not exactly right."""
        lines = [
            f"{len(self.rows)} rows, {self.tokens} completion tokens: **{self.exact_match:.2%} of the tokens right**, "
            f"perplexity {self.perplexity:.4g}.",
            "",
            "| | rows exactly right | edit similarity | BLEU | ROUGE-L |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, scores in (("teacher-forced", self.teacher_forced), ("generated", self.generated)):
            if scores:
                lines.append(
                    f"| {name} | {scores.exact:.2%} | {scores.edit_similarity:.4f} | {scores.bleu:.4f} | "
                    f"{scores.rouge_l:.4f} |"
                )
        lines.append("")
        wrong = [row for row in self.rows if not (row.generated or row.teacher_forced).exact]
        if wrong:
            lines += ["| row | expected | said | edit similarity |", "| --- | --- | --- | --- |"]
            for row in wrong[:max_rows]:
                scores = row.generated or row.teacher_forced
                lines.append(
                    f"| {row.row} | {code(row.completion)} | {code(scores.text)} | {scores.edit_similarity:.3f} |"
                )
            if len(wrong) > max_rows:
                lines.append(f"| … | {len(wrong) - max_rows} more | | |")
            lines.append("")
        return "\n".join(lines)


@dataclass
class Comparison:
    """What changed between two evaluations of the same rows.

    Attributes:
        failures, solved: Tokens that were wrong before, and how many of them are right after, teacher-forced.
        right, broken: Tokens that were right before, and how many of them are wrong after.
        rows_fixed, rows_broken: Rows that became exactly right, or stopped being so, teacher-forced.
        generations_fixed, generations_broken: The same by greedy generation; None when either was not generated.
        seconds: Seconds that the repair took, when they are known.
    """

    failures: int
    solved: int
    right: int
    broken: int
    rows_fixed: list[int]
    rows_broken: list[int]
    generations_fixed: list[int] | None = None
    generations_broken: list[int] | None = None
    seconds: float | None = None

    @property
    def solved_share(self) -> float:
        """Share of the failing tokens that are right after; 1 when there were none."""
        return self.solved / self.failures if self.failures else 1.0

    @property
    def broken_share(self) -> float:
        """Share of the right tokens that are wrong after."""
        return self.broken / self.right if self.right else 0.0

    @property
    def seconds_per_failure(self) -> float | None:
        """Seconds of the repair by failing token: the paper's Time Cost."""
        return self.seconds / self.failures if self.seconds is not None and self.failures else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        shares = {name: getattr(self, name) for name in ("solved_share", "broken_share", "seconds_per_failure")}
        return {**asdict(self), **shares}

    def save(self, path: str | os.PathLike) -> None:
        """Write the comparison as JSON."""
        write_json(path, self.to_dict())

    def to_markdown(self) -> str:
        """The comparison as a Markdown table."""
        lines = [
            "| | |",
            "| --- | --- |",
            f"| failing tokens solved | {self.solved} / {self.failures} ({self.solved_share:.2%}) |",
            f"| right tokens broken | {self.broken} / {self.right} ({self.broken_share:.2%}) |",
            f"| rows fixed, broken | {len(self.rows_fixed)}, {len(self.rows_broken)} |",
        ]
        if self.generations_fixed is not None:
            lines.append(
                f"| generations fixed, broken | {len(self.generations_fixed)}, {len(self.generations_broken)} |"
            )
        if self.seconds_per_failure is not None:
            lines.append(f"| seconds per failure | {self.seconds_per_failure:.2f} |")
        return "\n".join([*lines, ""])


def evaluate(
    model: nn.Module,
    tokenizer,
    rows: Iterable[dict[str, Any]],
    *,
    generate: bool = True,
    max_batch_tokens: int = 2048,
    progress: bool | Callable[[int], None] = True,
) -> Evaluation:
    """Score a model on rows, teacher-forced and by greedy generation (paper section 4, RQ1).

    Generation yields as many tokens as the completion has (fewer when the model ends), so it is compared with the
    completion and not with what a model would go on to say.

    Args:
        model: A causal language model, with or without adapters; its active adapters count.
        tokenizer: Its tokenizer.
        rows: Rows `{"prompt", "completion"}`, strings or lists of chat messages; a list or a `datasets.Dataset`.
        generate: Also generate, which takes a forward pass for each token.
        max_batch_tokens: Tokens of one batch, padding included.
        progress: True: a tqdm bar; False: none; a function: called with the number of rows done, and over the whole
            run each row counts once, or twice with `generate`.

    Returns:
        [`Evaluation`]

    Raises:
        ImportError: The libraries of the extra `eval` are missing.
        TypeError, ValueError: A row or the model does not fit.
    """
    metrics = _TextMetrics()
    items = _encode(model, tokenizer, rows)
    seconds = {}
    with _evaluating(model), _reporting(progress, len(items) * (2 if generate else 1)) as advance:
        start = time.perf_counter()
        batches = make_batches(items, max_batch_tokens, input_device(model))
        predictions = verify.teacher_forced(model, batches, advance)
        seconds["teacher_forced"] = time.perf_counter() - start
        generated = None
        if generate:
            start = time.perf_counter()
            generated = verify.generate(model, tokenizer, items, max_batch_tokens, advance)
            seconds["generated"] = time.perf_counter() - start
    # a probability that rounds to zero would make the perplexity infinite
    log_p = predictions.p_expected.double().clamp_min(torch.finfo(torch.float32).tiny).log()
    records, references = [], []
    for number, (row, start) in enumerate(zip(items, completion_offsets(items))):
        slots = slice(start, start + len(row.completion_ids))
        predicted = tuple(predictions.argmax[slots].tolist())
        references.append(_text(tokenizer, row.completion_ids))

        def scores(ids: tuple[int, ...], row: Row = row) -> TextScores:
            text = _text(tokenizer, ids)
            return TextScores(text, ids == row.completion_ids, **metrics.scores(text, references[-1]))

        records.append(
            RowEvaluation(
                row=row.index,
                prompt=row.prompt,
                completion=row.completion,
                expected_ids=list(row.completion_ids),
                predicted_ids=list(predicted),
                log_likelihood=log_p[slots].sum().item(),
                teacher_forced=scores(predicted),
                generated=scores(generated[number]) if generated is not None else None,
            )
        )
    means = metrics.means([record.teacher_forced for record in records], references)
    means_generated = metrics.means([record.generated for record in records], references) if generate else None
    return Evaluation(records, means, means_generated, seconds)


def compare(before: Evaluation, after: Evaluation, *, seconds: float | None = None) -> Comparison:
    """What a repair changed, from evaluations of the same rows before and after it.

    Args:
        before, after: The evaluations.
        seconds: Seconds that the repair took (`sum(report.seconds.values())`).

    Raises:
        ValueError: The evaluations are of different rows.
    """
    if [row.expected_ids for row in before.rows] != [row.expected_ids for row in after.rows]:
        raise ValueError("The two evaluations are of different rows or tokenizers, and cannot be compared.")
    pairs = list(zip(before.rows, after.rows))
    tokens = [pair for was, now in pairs for pair in zip(was.right, now.right)]
    generated = before.generated is not None and after.generated is not None

    def changed(name: str, to: bool) -> list[int]:
        return [was.row for was, now in pairs if (not getattr(was, name).exact) is to is getattr(now, name).exact]

    return Comparison(
        failures=sum(not was for was, _ in tokens),
        solved=sum(now and not was for was, now in tokens),
        right=sum(was for was, _ in tokens),
        broken=sum(was and not now for was, now in tokens),
        rows_fixed=changed("teacher_forced", True),
        rows_broken=changed("teacher_forced", False),
        generations_fixed=changed("generated", True) if generated else None,
        generations_broken=changed("generated", False) if generated else None,
        seconds=seconds,
    )


# side effects


@dataclass
class Gaps:
    """Probability gaps at S positions of rows.

    Attributes:
        keys: S pairs (index of the row, position in its tokens); the expected token is at `position + 1`.
        expected: The expected tokens (S).
        rival: The tokens (S) that they are held against.
        argmax: The model's argmax (S).
        p_expected, p_rival: Probabilities (S).
    """

    keys: list[tuple[int, int]]
    expected: torch.Tensor
    rival: torch.Tensor
    argmax: torch.Tensor
    p_expected: torch.Tensor
    p_rival: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def gap(self) -> torch.Tensor:
        """p(expected) − p(rival), shape (S), in −1..1."""
        return self.p_expected - self.p_rival


@dataclass
class SideEffects:
    """Side effects of one repair (paper section 4, RQ3), over the related and the unrelated positions.

    Attributes:
        related, unrelated: Numbers of positions.
        g_mae, g_rmse: Generalization G: mean absolute and root mean square change of the gap on related rows.
        s_mae, s_rmse: Specificity S: 1 − the same on unrelated rows.
        signed_g: Mean signed change of the gap on related rows; G counts a change for the worse as well as one for
            the better, this does not.
        related_failing, related_fixed: Related positions that failed before, and those now right.
        unrelated_failing, unrelated_changed: Unrelated positions that failed before, and those whose argmax is
            another token now.
    """

    related: int
    unrelated: int
    g_mae: float
    g_rmse: float
    s_mae: float
    s_rmse: float
    signed_g: float
    related_failing: int
    related_fixed: int
    unrelated_failing: int
    unrelated_changed: int

    @property
    def gsh_mae(self) -> float:
        """2GS / (G + S) with MAE; 0 when both are 0."""
        return _harmonic(self.g_mae, self.s_mae)

    @property
    def gsh_rmse(self) -> float:
        """2GS / (G + S) with RMSE; 0 when both are 0."""
        return _harmonic(self.g_rmse, self.s_rmse)

    @property
    def related_fixed_share(self) -> float:
        """Share of the related failing positions that are right now."""
        return self.related_fixed / self.related_failing if self.related_failing else 0.0

    @property
    def unrelated_changed_share(self) -> float:
        """Share of the unrelated failing positions whose argmax changed."""
        return self.unrelated_changed / self.unrelated_failing if self.unrelated_failing else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        names = ("gsh_mae", "gsh_rmse", "related_fixed_share", "unrelated_changed_share")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def save(self, path: str | os.PathLike) -> None:
        """Write the side effects as JSON."""
        write_json(path, self.to_dict())

    def to_markdown(self) -> str:
        """The side effects as Markdown tables."""
        return "\n".join(
            [
                "| | G | S | GSH |",
                "| --- | --- | --- | --- |",
                f"| MAE | {self.g_mae:.4f} | {self.s_mae:.4f} | {self.gsh_mae:.4f} |",
                f"| RMSE | {self.g_rmse:.4f} | {self.s_rmse:.4f} | {self.gsh_rmse:.4f} |",
                "",
                f"Signed G {self.signed_g:+.4f}; related failures fixed {self.related_fixed} / "
                f"{self.related_failing} ({self.related_fixed_share:.2%}); unrelated failures whose argmax changed "
                f"{self.unrelated_changed} / {self.unrelated_failing} ({self.unrelated_changed_share:.2%}).",
                "",
            ]
        )


def gaps(
    model: nn.Module,
    tokenizer,
    rows: Iterable[dict[str, Any] | Row],
    *,
    before: Gaps | None = None,
    positions: Iterable[tuple[int, int]] | None = None,
    max_batch_tokens: int = 2048,
) -> Gaps:
    """The gap p(expected) − p(argmax) of the paper's RQ3, with the argmax of the *unpatched* model.

    The paper writes gap = p_target − p_argmax and does not say whose argmax it is after a repair. With the patched
    model's own, the gap of a repaired token would be 0 whatever its lead, so the rival is the unpatched model's
    argmax and stays it: the gap is negative while the failure lasts and positive once it is solved. Where the
    unpatched model was right, the rival is its second choice.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: Prompt-completion rows, or [`~peft_star.failures.Row`]s from `encode_rows`: a part of those may be
            measured, too, as they keep their index.
        before: The unpatched model's gaps: their rivals and positions are used. None: this is the unpatched model.
        positions: (index of the row, position) pairs to measure; only without `before`. None: where the model fails.
        max_batch_tokens: Tokens of one batch, padding included.

    Returns:
        [`Gaps`]

    Raises:
        ValueError: The rows do not fit the model, `before` or `positions`.
    """
    if before is not None and positions is not None:
        raise ValueError("Give `before`, whose positions count, or `positions`, but not both.")
    items = _encode(model, tokenizer, rows)
    keys = [(item.index, position) for item in items for position in item.medium_positions]
    slot_of = {key: slot for slot, key in enumerate(keys)}
    if len(slot_of) < len(keys):
        raise ValueError("Two rows have the same index; encode them together.")
    total = len(keys)
    expected = torch.tensor([token for item in items for token in item.completion_ids])
    rival, argmax = torch.full((total,), -1), torch.full((total,), -1)
    p_expected, p_rival = torch.zeros(total), torch.zeros(total)
    if before is not None:
        shared = [(slot_of[key], index) for index, key in enumerate(before.keys) if key in slot_of]
        slots, known = torch.tensor(shared, dtype=torch.long).reshape(-1, 2).unbind(1)
        if not torch.equal(expected[slots], before.expected[known]):
            raise ValueError("`before` was measured on other rows than these.")
        rival[slots] = before.rival[known]
    with _evaluating(model):
        for batch in make_batches(items, max_batch_tokens, input_device(model)):
            logits = completion_logits(model, batch).float()
            log_norm, slots = logits.logsumexp(-1), batch.slots.cpu()
            wanted = batch.expected.to(logits.device)
            first, second = logits.topk(2, dim=-1).indices.unbind(-1)
            if before is None:
                rival[slots] = torch.where(first == wanted, second, first).cpu()
            # a rival that is not known yields a number that nobody reads
            held_against = rival[slots].clamp_min(0).to(logits.device)
            argmax[slots] = first.cpu()
            for target, tokens in ((p_expected, wanted), (p_rival, held_against)):
                target[slots] = (logits.gather(-1, tokens[:, None])[:, 0] - log_norm).exp().cpu()
    if before is not None:
        chosen = [slot for slot in range(total) if rival[slot] >= 0]
    elif positions is None:
        chosen = (argmax != expected).nonzero()[:, 0].tolist()
    else:
        positions = list(positions)
        stray = next((key for key in positions if tuple(key) not in slot_of), None)
        if stray is not None:
            raise ValueError(f"Position {stray[1]} of row {stray[0]} has no completion token behind it.")
        chosen = [slot_of[tuple(key)] for key in positions]
    tensors = (values[chosen] for values in (expected, rival, argmax, p_expected, p_rival))
    return Gaps([keys[slot] for slot in chosen], *tensors)


def side_effects(before: Gaps, after: Gaps, related: Iterable[int], unrelated: Iterable[int]) -> SideEffects:
    """Generalization and specificity of one repair (paper section 4, RQ3).

        rows = encode_rows(related_rows + unrelated_rows, tokenizer)
        before = gaps(base, tokenizer, rows)
        after = gaps(patched, tokenizer, rows, before=before)
        side_effects(before, after, range(len(related_rows)), range(len(related_rows), len(rows)))

    Args:
        before: Gaps of the unpatched model.
        after: Gaps of the patched model, measured with `before=before`; of those rows at least.
        related: Indices of the rows with the repaired failure's expected token.
        unrelated: Indices of the rows with another.

    Raises:
        ValueError: `after` was not measured with `before`'s rivals, or there is no related or no unrelated position.
    """
    slot_before = {key: slot for slot, key in enumerate(before.keys)}
    slot_after = {key: slot for slot, key in enumerate(after.keys)}

    def change(rows: Iterable[int], name: str) -> tuple[torch.Tensor, list[int], list[int]]:
        chosen = set(rows)
        keys = [key for key in before.keys if key[0] in chosen]
        if not keys:
            raise ValueError(f"There is no {name} position: the unpatched model fails on none of these rows.")
        missing = next((key for key in keys if key not in slot_after), None)
        if missing is not None:
            raise ValueError(f"`after` lacks row {missing[0]}, which is {name}.")
        was, now = [slot_before[key] for key in keys], [slot_after[key] for key in keys]
        if not torch.equal(before.rival[was], after.rival[now]):
            raise ValueError("`after` holds other rivals than `before`; measure it with gaps(..., before=before).")
        return (after.gap[now] - before.gap[was]).double(), was, now

    gained, was, now = change(related, "related")
    failing = before.argmax[was] != before.expected[was]
    fixed = failing & (after.argmax[now] == after.expected[now])
    moved, was_other, now_other = change(unrelated, "unrelated")
    failing_other = before.argmax[was_other] != before.expected[was_other]
    changed = failing_other & (after.argmax[now_other] != before.argmax[was_other])
    return SideEffects(
        related=len(was),
        unrelated=len(was_other),
        g_mae=gained.abs().mean().item(),
        g_rmse=gained.square().mean().sqrt().item(),
        s_mae=1 - moved.abs().mean().item(),
        s_rmse=1 - moved.square().mean().sqrt().item(),
        signed_g=gained.mean().item(),
        related_failing=int(failing.sum()),
        related_fixed=int(fixed.sum()),
        unrelated_failing=int(failing_other.sum()),
        unrelated_changed=int(changed.sum()),
    )


def _harmonic(g: float, s: float) -> float:
    return 2 * g * s / (g + s) if g + s else 0.0


# harm


@dataclass
class Harm:
    """What a patch does to text that has nothing to do with the repair.

    Attributes:
        tokens: Tokens of the text.
        kl: Mean KL divergence of the patched model from the unpatched, KL(before || after), in nats a token.
        perplexity_before, perplexity_after: Of the text's tokens after the first.
        right_before: Tokens that the unpatched model predicts right (argmax), given the right tokens before.
        broken: Those of them that the patched model predicts wrong.
    """

    tokens: int
    kl: float
    perplexity_before: float
    perplexity_after: float
    right_before: int
    broken: int

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity after / before."""
        return self.perplexity_after / self.perplexity_before

    @property
    def broken_share(self) -> float:
        """Share of the tokens that were right and are now wrong."""
        return self.broken / self.right_before if self.right_before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio, "broken_share": self.broken_share}


@torch.no_grad()
def harm(before: torch.Tensor, after: torch.Tensor, ids: torch.Tensor) -> Harm:
    """Compare what two models say about the same tokens.

    Args:
        before, after: Logits or log-probabilities (T, V) of the unpatched and the patched model at each token.
        ids: The tokens (T); entry p of the logits is about token p + 1.

    Raises:
        ValueError: The shapes differ, or there are fewer than two tokens.
    """
    if before.shape != after.shape or before.shape[0] != ids.numel():
        raise ValueError(
            f"Logits of shapes {tuple(before.shape)} and {tuple(after.shape)} on {ids.numel()} tokens: "
            "give (T, V) twice and T tokens."
        )
    if ids.numel() < 2:
        raise ValueError("Harm is measured on two tokens at least; give a longer text.")
    divergence = nll_before = nll_after = 0.0
    right = broken = 0
    for start in range(0, ids.numel(), _CHUNK):
        now = after[start : start + _CHUNK].float().log_softmax(-1)
        was = before[start : start + _CHUNK].to(now.device).float().log_softmax(-1)
        p = was.exp()
        # a token that a model rules out (log-probability −inf) on both sides adds nothing
        terms = torch.where(p > 0, p * (was - now), 0.0)
        divergence += terms.sum(-1, dtype=torch.float64).clamp_min(0).sum().item()
        following = ids[start + 1 : start + 1 + _CHUNK].to(now.device)[:, None]
        was, now = was[: len(following)], now[: len(following)]
        nll_before -= was.gather(-1, following).sum(dtype=torch.float64).item()
        nll_after -= now.gather(-1, following).sum(dtype=torch.float64).item()
        was_right = was.argmax(-1, keepdim=True) == following
        right += int(was_right.sum())
        broken += int((was_right & (now.argmax(-1, keepdim=True) != following)).sum())
    count = ids.numel() - 1
    return Harm(
        ids.numel(), divergence / ids.numel(), _exp(nll_before / count), _exp(nll_after / count), right, broken
    )


class TextProbe:
    """A text, prose or code, and what the unpatched model says about it; call it with a patched model for [`Harm`].

    It keeps the unpatched model's logits, on the CPU and in the model's precision: tokens x vocabulary entries (256
    tokens of a vocabulary of 49,152 in float32 are 50 MB). Nothing is assumed about what the patch touches, the LM
    head included.

    Args:
        model: The unpatched model, or a model with its adapters disabled.
        tokenizer: Its tokenizer.
        text: The text.
        max_tokens: The text is cut after this many tokens, or at the model's context if that is shorter.

    Raises:
        ValueError: The text has fewer than two tokens.
    """

    def __init__(self, model: nn.Module, tokenizer, text: str, max_tokens: int = 256):
        limit = min(max_tokens, _context(model) or max_tokens)
        self.ids = torch.tensor(tokenizer(text)["input_ids"][:limit], dtype=torch.long)
        if len(self.ids) < 2:
            raise ValueError("Harm is measured on two tokens at least; give a longer text.")
        self.before = self._logits(model).cpu()

    def _logits(self, model: nn.Module) -> torch.Tensor:
        with _evaluating(model):
            return model(input_ids=self.ids[None].to(input_device(model)), use_cache=False).logits[0]

    def __call__(self, model: nn.Module) -> Harm:
        """The harm that the patch of `model` does to the text."""
        return harm(self.before, self._logits(model), self.ids)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


# the text metrics


class _TextMetrics:
    """Edit similarity, BLEU and ROUGE-L of texts, by the libraries that others use for them."""

    def __init__(self):
        try:
            from rapidfuzz.distance import Levenshtein
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            raise ImportError(f"The text metrics need {error.name}; pip install 'peft-star[eval]'.") from None
        self._edit = Levenshtein.normalized_similarity
        # texts of fewer than four tokens have no 4-grams: the effective order leaves those out
        self._bleu = BLEU(effective_order=True, force=True)
        self._rouge = RougeScorer(["rougeL"], tokenizer=_CodeTokenizer())

    def scores(self, text: str, reference: str) -> dict[str, float]:
        return {
            "edit_similarity": self._edit(text, reference),
            "bleu": _share(self._bleu.sentence_score(text, [reference])),
            "rouge_l": self._rouge.score(reference, text)["rougeL"].fmeasure,
        }

    def means(self, scores: Sequence[TextScores], references: Sequence[str]) -> MeanScores:
        def mean(name: str) -> float:
            return sum(getattr(item, name) for item in scores) / len(scores)

        bleu = _share(self._bleu.corpus_score([item.text for item in scores], [list(references)]))
        return MeanScores(mean("exact"), mean("edit_similarity"), bleu, mean("rouge_l"))


def _share(bleu: Any) -> float:
    return min(bleu.score / 100, 1.0)  # sacrebleu's logarithms make a perfect score one rounding more than 100


class _CodeTokenizer:
    """Words and single punctuation marks, case kept; rouge-score's own drops punctuation, half of what code is."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)


# the model and its rows


def _text(tokenizer, ids: Sequence[int]) -> str:
    ids = list(ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # right or wrong, it is not text
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _context(model: nn.Module) -> int | None:
    """The model's context in tokens, as far as its config tells."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "max_position_embeddings", None)


def _encode(model: nn.Module, tokenizer, rows: Iterable[dict[str, Any] | Row]) -> list[Row]:
    if rows is None or isinstance(rows, (str, bytes, dict)):
        raise TypeError("The rows must be a list (or a dataset) of objects with 'prompt' and 'completion'.")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"{type(model).__name__} has no LM head; an evaluation needs a causal language model.")
    rows = list(rows)
    if rows and all(isinstance(row, Row) for row in rows):
        return rows
    return encode_rows(rows, tokenizer, _context(model))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _reporting(progress: bool | Callable[[int], None], total: int) -> Iterator[Callable[[int], None]]:
    if callable(progress):
        yield progress
    else:
        with tqdm(total=total, desc="evaluate", leave=False, disable=not progress) as bar:
            yield bar.update
