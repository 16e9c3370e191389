"""Verification: what the model says, teacher-forced and by greedy generation, before and after a patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..engine.batch import Batch, completion_offsets, make_batches
from ..engine.engine import Engine
from ..engine.passes import generate, predict
from ..engine.predictions import Predictions
from ..failures import Row
from .subject import Run
from .trace import Trace, trace


@dataclass(frozen=True)
class Case:
    """The rows of one repair in batches. Their S completion tokens are numbered through: the slots of the retained
    rows come behind those of the failures' rows."""

    rows: Sequence[Row]
    retained: Sequence[Row]
    batches: tuple[Batch, ...]
    retained_batches: tuple[Batch, ...]

    @classmethod
    def of(cls, engine: Engine, rows: Sequence[Row], retained: Sequence[Row]) -> Case:
        own = completion_offsets(rows)[-1]
        behind = tuple(replace(batch, slots=batch.slots + own) for batch in engine.batches(retained))
        return cls(rows, retained, tuple(engine.batches(rows)), behind)

    @property
    def parts(self) -> dict[str, tuple[Sequence[Row], slice]]:
        """By source the rows and their slots."""
        own = completion_offsets(self.rows)[-1]
        return {"failures": (self.rows, slice(own)), "retain": (self.retained, slice(own, None))}

    def one_row_each(self) -> list[Batch]:
        """The failures' rows in their order, a batch each. Made once, what is replayed of a row serves all of its
        failures."""
        return sorted(make_batches(self.rows, 1, self.batches[0].input_ids.device), key=lambda batch: batch.slots[0])

    def nothing_seen(self) -> Predictions:
        return Predictions.empty(sum(completion_offsets(rows)[-1] for rows, _ in self.parts.values()))


@dataclass
class Seen:
    """What the model said: predictions (S) at the completion tokens, and by source the generated tokens of each row
    (empty: nothing was generated)."""

    predictions: Predictions
    generated: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)


def look_before(run: Run, case: Case) -> tuple[Seen, Trace | None]:
    """What the model says before the first patch. In `"multiple"` mode a trace's forward tells, which comes along."""
    engine, journal, traced = run.engine, run.journal, None
    rows_of = engine.team.rows
    if run.args.mode == "multiple":
        with journal.phase("trace", rows_of(case.batches)):
            traced = trace(engine, case.batches, run.probe(), start=case.nothing_seen(), progress=journal.advance)
        seen = Seen(traced.predictions)
    else:
        with journal.phase("failures", rows_of(case.batches)):
            seen = Seen(predict(engine, case.batches, case.nothing_seen(), journal.advance))
    if case.retained:
        with journal.phase("failures", rows_of(case.retained_batches)):
            predict(engine, case.retained_batches, seen.predictions, journal.advance)
    if run.args.verify_generation:
        with journal.phase("verify", _own_rows(run, case)):
            seen.generated = generate_all(run, case)
    return seen, traced


def verify(run: Run, case: Case, after: Predictions | None, with_generation: bool) -> Seen:
    """What the model says now; `after`: predictions of the failures' rows, if they are known."""
    engine = run.engine
    with run.journal.phase("verify", _own_rows(run, case)):
        now = predict(engine, case.batches, case.nothing_seen()) if after is None else after.copy()
        predict(engine, case.retained_batches, now)
        return Seen(now, generate_all(run, case) if with_generation else {})


def generate_all(run: Run, case: Case) -> dict[str, list[tuple[int, ...]]]:
    """Greedy generation of all rows, by source."""
    tokenizer = run.subject.tokenizer
    return {
        source: generate(run.engine, tokenizer, rows, run.journal.advance)
        for source, (rows, _) in case.parts.items()
        if rows
    }


def _own_rows(run: Run, case: Case) -> int:
    return len(run.engine.team.share_rows([*case.rows, *case.retained]))
