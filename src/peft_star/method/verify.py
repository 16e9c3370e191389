"""Verification: what the model says, teacher-forced and by greedy generation, before and after a patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..engine.batch import Batch, completion_offsets, make_batches
from ..engine.engine import Engine
from ..engine.passes import generate, predict
from ..engine.predictions import Predictions
from ..failures import Row
from ..models.inputs import context_length
from .subject import Run
from .trace import Trace, trace

BEHIND = 16  # tokens behind a completion that are shown of what the model goes on to say
MOST_BEHIND = 50  # rows of which that is looked at, as many as a report shows


@dataclass(frozen=True)
class Case:
    """The rows of one repair in batches. Their completion tokens are numbered through: the slots of the retained rows
    come behind those of the failures' rows, then those of the `earlier` repairs' rows, which are retained as well, and
    make up S with them. What patches knows these alone: the slots of the related rows, which are only looked at, lie
    behind. `left_out`: failures' rows, by index, that are not repaired."""

    rows: Sequence[Row]
    retained: Sequence[Row]
    batches: tuple[Batch, ...]
    retained_batches: tuple[Batch, ...]
    related: Sequence[Row] = ()
    related_batches: tuple[Batch, ...] = ()
    earlier: Sequence[Row] = ()
    left_out: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        engine: Engine,
        rows: Sequence[Row],
        retained: Sequence[Row],
        related: Sequence[Row] = (),
        earlier: Sequence[Row] = (),
    ) -> Case:
        own = completion_offsets(rows)[-1]
        kept = own + completion_offsets(retained)[-1]
        held = kept + completion_offsets(earlier)[-1]
        behind = _batches_from(engine, retained, own) + _batches_from(engine, earlier, kept)
        related_batches = _batches_from(engine, related, held)
        return cls(rows, retained, tuple(engine.batches(rows)), behind, related, related_batches, earlier)

    @property
    def held(self) -> Sequence[Row]:
        """The rows that must stay right: those that were given for it, and those of earlier repairs."""
        return [*self.retained, *self.earlier]

    @property
    def parts(self) -> dict[str, tuple[Sequence[Row], slice]]:
        """By source the rows and their slots."""
        own = completion_offsets(self.rows)[-1]
        kept = own + completion_offsets(self.retained)[-1]
        held = kept + completion_offsets(self.earlier)[-1]
        return {
            "failures": (self.rows, slice(own)),
            "retain": (self.retained, slice(own, kept)),
            "earlier": (self.earlier, slice(kept, held)),
            "related": (self.related, slice(held, None)),
        }

    def failing(self, seen: Predictions) -> torch.Tensor:
        """The slots (n) of what is to be repaired: wrong tokens of the failures' rows but those that are left out."""
        wrong = ~seen.right[self.parts["failures"][1]]
        for row, start in zip(self.rows, completion_offsets(self.rows)):
            if row.index in self.left_out:
                wrong[start : start + len(row.completion_ids)] = False
        return wrong.nonzero()[:, 0]

    def one_row_each(self) -> list[Batch]:
        """The failures' rows in their order, a batch each. Made once, what is replayed of a row serves all of its
        failures."""
        return sorted(make_batches(self.rows, 1, self.batches[0].input_ids.device), key=lambda batch: batch.slots[0])

    def nothing_seen(self) -> Predictions:
        """Of the S tokens; there are none of related rows among them."""
        return Predictions.empty(self.parts["related"][1].start)


def _batches_from(engine: Engine, rows: Sequence[Row], start: int) -> tuple[Batch, ...]:
    """The rows in batches, their slots numbered from `start`."""
    return tuple(replace(batch, slots=batch.slots + start) for batch in engine.batches(rows))


@dataclass
class Seen:
    """What the model said: predictions (S) at the completion tokens, with those of related rows behind them once
    these were looked at, and by source the generated tokens of each row (empty: nothing was generated). `goes_on`: by
    index of a failures' row the tokens that the model says behind its completion, where these were looked at."""

    predictions: Predictions
    generated: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    goes_on: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def look_before(run: Run, case: Case) -> tuple[Seen, Trace | None]:
    """What the model says before the first patch, except at the related rows.

    In `"multiple"` mode a trace's forward tells, which comes along.
    """
    engine, journal, traced = run.engine, run.journal, None
    rows_of = engine.team.rows
    if run.args.mode == "multiple":
        with journal.phase("trace", rows_of(case.batches)):
            traced = trace(engine, case.batches, run.probe(), start=case.nothing_seen(), progress=journal.advance)
        seen = Seen(traced.predictions)
    else:
        with journal.phase("failures", rows_of(case.batches)):
            seen = Seen(predict(engine, case.batches, case.nothing_seen(), journal.advance))
    if case.retained_batches:
        with journal.phase("failures", rows_of(case.retained_batches)):
            predict(engine, case.retained_batches, seen.predictions, journal.advance)
    if run.args.verify_generation:
        with journal.phase("verify", _own_rows(run, case)):
            seen.generated = generate_all(run, case)
    return seen, traced


def look_at_related(run: Run, case: Case, before: Seen) -> Seen:
    """What the model says before the first patch, with the related rows. Nothing that patches is to be given it."""
    with run.journal.phase("failures", run.engine.team.rows(case.related_batches)):
        return replace(before, predictions=_with_related(run, case, before.predictions, run.journal.advance))


def _with_related(
    run: Run, case: Case, seen: Predictions, progress: Callable[[int], None] | None = None
) -> Predictions:
    """Predictions (S) with those of the related rows behind them."""
    into = Predictions.join(seen, Predictions.empty(completion_offsets(case.related)[-1]))
    return predict(run.engine, case.related_batches, into, progress)


def verify(run: Run, case: Case, after: Predictions | None, with_generation: bool) -> Seen:
    """What the model says now, at the related rows, too; `after`: predictions (S) of the failures' rows, if known."""
    engine = run.engine
    with run.journal.phase("verify", _own_rows(run, case)):
        now = predict(engine, case.batches, case.nothing_seen()) if after is None else after.copy()
        predict(engine, case.retained_batches, now)
        now = _with_related(run, case, now) if case.related else now
        if not with_generation:
            return Seen(now)
        generated = generate_all(run, case)
        return Seen(now, generated, look_behind(run, case.rows, generated["failures"]))


def generate_all(run: Run, case: Case) -> dict[str, list[tuple[int, ...]]]:
    """Greedy generation of all rows but those of earlier repairs, which may be many, by source."""
    tokenizer = run.subject.tokenizer
    return {
        source: generate(run.engine, tokenizer, rows, run.journal.advance)
        for source, (rows, _) in case.parts.items()
        if rows and source != "earlier"
    }


def look_behind(run: Run, rows: Sequence[Row], generated: Sequence[tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """What the model goes on to say behind completions that it generates right, up to `BEHIND` tokens, by row.

    Only the first `MOST_BEHIND` are looked at. Rows that say where their completion ends are right only when the model
    stops there.
    """
    limit = context_length(run.subject.base)
    longer = []
    for row, tokens in zip(rows, generated):
        room = BEHIND if limit is None else min(BEHIND, limit - len(row))
        if tokens == row.completion_ids and not row.ended and room > 0:
            # of a row's completion generation reads only how long it is
            longer.append(replace(row, prompt_ids=row.input_ids, completion_ids=(0,) * room))
    longer = longer[:MOST_BEHIND]
    if not longer:
        return {}
    return dict(zip((row.index for row in longer), generate(run.engine, run.subject.tokenizer, longer)))


def _own_rows(run: Run, case: Case) -> int:
    return len(run.engine.team.share_rows([*case.rows, *case.retained, *case.related]))
