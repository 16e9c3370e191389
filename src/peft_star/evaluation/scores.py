"""How good a model is on rows, and what changed between two evaluations (paper section 4, RQ1)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..engine import passes
from ..engine.batch import make_batches
from ..engine.engine import Engine
from ..failures import Row
from ..files import write_json
from ..models.inputs import evaluating, input_device
from ..report import code, escaped, label_of
from .rows import encode
from .text_metrics import MeanScores, TextMetrics, TextScores


@dataclass
class RowEvaluation:
    """One row.

    Attributes:
        row: Its index, from 0.
        prompt, completion: Its texts.
        expected_ids: The completion's tokens.
        predicted_ids: The model's argmax for each of them, given the right tokens before it.
        log_likelihood: Log-probability of the completion, in nats.
        teacher_forced, generated: Scores of the argmax tokens' text, and of the greedy generation's (None: not run).
        id, line: What it is called elsewhere, and how people count it; see [`~peft_star.report.RowRecord`].
    """

    row: int
    prompt: str
    completion: str
    expected_ids: list[int]
    predicted_ids: list[int]
    log_likelihood: float
    teacher_forced: TextScores
    generated: TextScores | None = None
    id: str | None = None
    line: int | None = None

    @property
    def label(self) -> str:
        """The row for readers: its line or number, with its id."""
        return label_of(self)

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
        for name, means in (("teacher-forced", self.teacher_forced), ("generated", self.generated)):
            if means:
                lines.append(
                    f"| {name} | {means.exact:.2%} | {means.edit_similarity:.4f} | {means.bleu:.4f} | "
                    f"{means.rouge_l:.4f} |"
                )
        lines.append("")
        wrong = [row for row in self.rows if not (row.generated or row.teacher_forced).exact]
        if wrong:
            lines += ["| row | expected | said | edit similarity |", "| --- | --- | --- | --- |"]
            for row in wrong[:max_rows]:
                scores = row.generated or row.teacher_forced
                cells = escaped(row.label), code(row.completion), code(scores.text), f"{scores.edit_similarity:.3f}"
                lines.append(f"| {' | '.join(cells)} |")
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
        if self.generations_fixed is not None and self.generations_broken is not None:
            lines.append(
                f"| generations fixed, broken | {len(self.generations_fixed)}, {len(self.generations_broken)} |"
            )
        if self.seconds_per_failure is not None:
            lines.append(f"| seconds per failure | {self.seconds_per_failure:.2f} |")
        return "\n".join([*lines, ""])


@torch.no_grad()
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
    metrics = TextMetrics()
    items = encode(model, tokenizer, rows)
    seconds, generated = {}, None
    with evaluating(model), _reporting(progress, len(items) * (2 if generate else 1)) as advance:
        start = time.perf_counter()
        engine = Engine(model, max_batch_tokens)
        # rows of their own, unpacked, so that figures do not depend on which rows stand beside them
        batches = make_batches(items, max_batch_tokens, input_device(model))
        predictions = passes.teacher_forced(engine, batches, advance)
        seconds["teacher_forced"] = time.perf_counter() - start
        if generate:
            start = time.perf_counter()
            generated = passes.generate(engine, tokenizer, items, advance)
            seconds["generated"] = time.perf_counter() - start
    lengths = [len(row.completion_ids) for row in items]
    argmax = [tuple(part.tolist()) for part in predictions.argmax.split(lengths)]
    # a probability that rounds to zero would make the perplexity infinite
    log_p = predictions.p_expected.double().clamp_min(torch.finfo(torch.float32).tiny).log()
    references = [_text(tokenizer, row.completion_ids) for row in items]
    forced = _score(metrics, tokenizer, items, argmax, references)
    said = None if generated is None else _score(metrics, tokenizer, items, generated, references)
    records = [
        RowEvaluation(
            row=row.index,
            prompt=row.prompt,
            completion=row.completion,
            expected_ids=list(row.completion_ids),
            predicted_ids=list(argmax[number]),
            log_likelihood=part.sum().item(),
            teacher_forced=forced[number],
            generated=None if said is None else said[number],
            id=row.id,
            line=row.number,
        )
        for number, (row, part) in enumerate(zip(items, log_p.split(lengths)))
    ]
    return Evaluation(
        rows=records,
        teacher_forced=metrics.mean(forced, references),
        generated=None if said is None else metrics.mean(said, references),
        seconds=seconds,
    )


def _score(
    metrics: TextMetrics, tokenizer, rows: Sequence[Row], said: Sequence[tuple[int, ...]], references: Sequence[str]
) -> list[TextScores]:
    """The scores of the tokens that were `said` for each row."""
    return [
        metrics.score(_text(tokenizer, ids), reference, exact=ids == row.completion_ids)
        for row, ids, reference in zip(rows, said, references)
    ]


def _text(tokenizer, ids: Sequence[int]) -> str:
    ids = list(ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # right or wrong, it is not text
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@contextmanager
def _reporting(progress: bool | Callable[[int], None], total: int) -> Iterator[Callable[[int], None]]:
    if callable(progress):
        yield progress
    else:
        with tqdm(total=total, desc="evaluate", leave=False, disable=not progress) as bar:
            yield bar.update


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
