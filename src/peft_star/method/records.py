"""Records: what verification saw, before and after, as the entries of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from ..engine.batch import completion_offsets
from ..engine.predictions import Predictions
from ..evaluation.own_texts import TextsHarm
from ..failures import Row
from ..report import (
    CONTEXT_CHARACTERS,
    BrokenToken,
    ChangedText,
    FailureRecord,
    PatchedLayer,
    ProblemRecord,
    RepairReport,
    RowRecord,
)
from .callbacks import Journal
from .subject import Run, Subject
from .verify import Case, Seen, rows_right

# enough tokens to fill CONTEXT_CHARACTERS in any but the strangest texts
CONTEXT_TOKENS = 32


def _text(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Records:
    """Entries for one set of rows.

    Args:
        source: "failures", "retain" or "related".
        rows: The rows.
        before, after: Predictions (S) at their completion tokens.
        tokenizer: Turns ids into text.
    """

    def __init__(self, source: str, rows: Sequence[Row], before: Predictions, after: Predictions, tokenizer):
        self.source, self.rows, self.before, self.after, self.tokenizer = source, rows, before, after, tokenizer

    def _text(self, ids: Sequence[int]) -> str:
        return _text(self.tokenizer, ids)

    def _context(self, row: Row, position: int) -> str:
        start = max(0, position + 1 - CONTEXT_TOKENS)
        return self._text(row.input_ids[start : position + 1])[-CONTEXT_CHARACTERS:]

    def _slots(self) -> Iterator[tuple[Row, int, int]]:
        """(row, position of the medium token, slot) of every completion token."""
        for row, start in zip(self.rows, completion_offsets(self.rows)):
            for slot, position in enumerate(row.medium_positions, start=start):
                yield row, position, slot

    def failures(self) -> list[FailureRecord]:
        """The tokens that were wrong before."""
        records = []
        for row, position, slot in self._slots():
            if self.before.right[slot]:
                continue
            expected, was, now = (
                int(ids[slot]) for ids in (self.before.expected, self.before.argmax, self.after.argmax)
            )
            records.append(
                FailureRecord(
                    row=row.index,
                    position=position,
                    context=self._context(row, position),
                    expected=self._text([expected]),
                    expected_id=expected,
                    before=self._text([was]),
                    before_id=was,
                    after=self._text([now]),
                    after_id=now,
                    gap_before=float(self.before.margin[slot]),
                    gap_after=float(self.after.margin[slot]),
                    solved=now == expected,
                )
            )
        return records

    def broken(self) -> list[BrokenToken]:
        """The tokens that were right before and are wrong after."""
        return [
            BrokenToken(
                source=self.source,
                row=row.index,
                position=position,
                context=self._context(row, position),
                expected=self._text([int(self.before.expected[slot])]),
                expected_id=int(self.before.expected[slot]),
                after=self._text([int(self.after.argmax[slot])]),
                after_id=int(self.after.argmax[slot]),
            )
            for row, position, slot in self._slots()
            if self.before.right[slot] and not self.after.right[slot]
        ]

    def of_rows(
        self,
        generated_before: Sequence[tuple[int, ...]] | None = None,
        generated_after: Sequence[tuple[int, ...]] | None = None,
    ) -> list[RowRecord]:
        """One record a row, with what greedy generation says: as it was generated, or as the tokens tell."""
        records = []
        for number, (row, start) in enumerate(zip(self.rows, completion_offsets(self.rows))):
            slots = slice(start, start + len(row.completion_ids))
            right_before, right_after = int(self.before.right[slots].sum()), int(self.after.right[slots].sum())
            record = RowRecord(
                source=self.source,
                row=row.index,
                prompt=row.prompt,
                completion=row.completion,
                tokens=len(row.completion_ids),
                right_before=right_before,
                right_after=right_after,
                exact_before=right_before == len(row.completion_ids),
                exact_after=right_after == len(row.completion_ids),
                problem=row.problem,
                id=row.id,
                line=row.number,
            )
            seen = {"before": (self.before, generated_before), "after": (self.after, generated_after)}
            for when, (predictions, generated) in seen.items():
                said = _told(row, predictions[slots]) if generated is None else generated[number]
                setattr(record, f"generated_{when}", self._text(said))
                setattr(record, f"generation_exact_{when}", said == row.completion_ids)
            records.append(record)
        return records


def _told(row: Row, seen: Predictions) -> tuple[int, ...]:
    """What greedy generation says after a row's prompt, as far as the predictions of its tokens tell: up to the first
    that is wrong, before which it has read the same tokens."""
    wrong = (~seen.right).nonzero()[:, 0].tolist()
    return row.completion_ids if not wrong else (*row.completion_ids[: wrong[0]], int(seen.argmax[wrong[0]]))


def make_report(
    run: Run, case: Case, before: Seen, after: Seen, harm: TextsHarm | None, interrupted: bool
) -> RepairReport:
    """What the repair of these rows is found to have done."""
    journal = run.journal
    report = RepairReport(
        failures=[],
        rows=[],
        broken=[],
        layers=patched_layers(run.subject),
        steps=journal.steps,
        seconds=dict(journal.state.seconds),
        occlusion=journal.occlusion,
        arguments=run.args.to_dict(),
        config=_plain(run.subject.config.to_dict()),
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
        interrupted=interrupted,
        harm=harm.to_dict() if harm is not None and harm.texts else {},
        changed_texts=_changed_texts(run.subject.tokenizer, harm),
    )
    for source, (rows, slots) in case.parts.items():
        if rows:
            was, now = before.predictions[slots], after.predictions[slots]
            records = Records(source, rows, was, now, run.subject.tokenizer)
            found = records.of_rows(before.generated.get(source), after.generated.get(source))
            for name in after.under if source != "related" else ():
                served = [rows_right(rows, seen.under[name][slots]) for seen in (before, after)]
                for record, was_right, is_right in zip(found, *served):
                    record.served_before[name], record.served_after[name] = was_right, is_right
            if source == "earlier":  # they may be hundreds
                right = sum(row.was_right for row in found)
                report.earlier = {"rows": len(found), "right": right, "broken": sum(row.broken for row in found)}
                found = [row for row in found if row.broken]
            report.rows += found
            report.broken += records.broken()
            if source == "failures":
                report.failures = records.failures()
                for record in report.rows:
                    if record.row in after.goes_on:
                        record.goes_on = _text(run.subject.tokenizer, after.goes_on[record.row])
    report.problems = problem_records(report, case.rows, journal, run.subject.tokenizer)
    return report


def _changed_texts(tokenizer, harm: TextsHarm | None) -> list[ChangedText]:
    return [
        ChangedText(*(_text(tokenizer, ids) for ids in (found.front, [found.was], [found.now], found.rest)))
        for found in (harm.partings if harm else ())
    ]


def problem_records(report: RepairReport, rows: Sequence[Row], journal: Journal, tokenizer) -> list[ProblemRecord]:
    """The report's rows, and what the method told the journal of them, by problem.

    Rows without a problem are one, named "". When the failures are of one problem, retained and related rows that
    name none belong to it.

    Args:
        report: With everything else filled in.
        rows: The failures' rows.
        journal: Its `acts` and `warnings` are read.
        tokenizer: Turns ids into text.
    """
    names = {row.index: row.problem or "" for row in rows}
    unnamed = next(iter(names.values())) if len(set(names.values())) == 1 else ""
    problems = {name: ProblemRecord(name) for name in names.values()}
    for row in report.rows:
        if row.source == "earlier":
            continue
        name = row.problem or ("" if row.source == "failures" else unnamed)
        problems.setdefault(name, ProblemRecord(name)).count(row)
    for item in report.failures:
        problem = problems[names[item.row]]
        problem.failures += 1
        problem.solved += item.solved
    for index, sentence in journal.warnings:
        if sentence not in problems[names[index]].warnings:
            problems[names[index]].warnings.append(sentence)
    for act in _acts(report, journal):
        ids = rows[act["row"]].input_ids
        texts = [_text(tokenizer, [ids[position]]) for position in act["tokens"]]
        problems[names[act["row"]]].add_act(act["how"], texts, act["layers"])
    return list(problems.values())


def _acts(report: RepairReport, journal: Journal) -> list[dict[str, Any]]:
    """What the method said of where it acts, and of failing rows of which it said nothing, what every patch does."""
    told = {act["row"] for act in journal.acts}
    failing: dict[int, list[int]] = {}
    for item in report.failures:
        if item.row not in told:
            failing.setdefault(item.row, []).append(item.position)
    layers = [layer.name for layer in report.layers]
    return [
        *journal.acts,
        *({"row": row, "how": "failing position", "tokens": at, "layers": layers} for row, at in failing.items()),
    ]


def patched_layers(subject: Subject) -> list[PatchedLayer]:
    """The layers whose delta is not zero."""
    layers = []
    for name, layer in subject.layers().items():
        delta, neurons = layer.star_delta[subject.adapter].detach(), layer.star_neurons[subject.adapter]
        if delta.any():
            layers.append(PatchedLayer(name, sorted(neurons.tolist()), float(delta.float().norm())))
    return layers


def _plain(value: Any) -> Any:
    """A config's dict in JSON types: sets become sorted lists, enums their value."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
