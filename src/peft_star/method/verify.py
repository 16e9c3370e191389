"""Verification: what the model says before and after a patch, in its own arithmetic and in that of what serves it.

A row whose tokens are all right teacher-forced is a row that greedy generation completes exactly: up to its first
wrong token, both read the same tokens. So one forward tells what a generation would, and generating is only a check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..engine.batch import Batch, completion_offsets, make_batches
from ..engine.engine import Engine
from ..engine.passes import generate, next_tokens, predict
from ..engine.predictions import Predictions
from ..failures import Row
from ..models.inputs import context_length
from .serving import needed_gaps
from .subject import Run
from .trace import Trace, trace

BEHIND = 16  # tokens behind a completion, up to a line's end, that are shown of what the model goes on to say
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
    def all_batches(self) -> tuple[Batch, ...]:
        """Those of the failures' and of the retained rows, which hold the S tokens."""
        return (*self.batches, *self.retained_batches)

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

    def failing(self, seen: Predictions, gaps: torch.Tensor | None = None) -> torch.Tensor:
        """The slots (n) of what is to be repaired: tokens of the failures' rows, but for those that are left out, that
        are wrong, or right by less than the `gaps` (S) between logits that they need."""
        own = self.parts["failures"][1]
        wrong = ~seen.right[own]
        if gaps is not None:
            wrong = wrong | (seen.gap[own] < gaps[own])
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
    """What the model said.

    Attributes:
        predictions: At the completion tokens (S), with those of related rows behind them once these were looked at.
        generated: By source the generated tokens of each row; empty: nothing was generated.
        goes_on: By index of a failures' row the tokens that the model says behind its completion, where these were
            looked at.
        under: By arithmetic the predictions (S) in it, without related rows.
        gaps: How far apart the logits of each token (S) and of its rival must be to hold in all of them; None: there
            are none.
    """

    predictions: Predictions
    generated: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    goes_on: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    under: Mapping[str, Predictions] = field(default_factory=dict)
    gaps: torch.Tensor | None = None


def look_before(run: Run, case: Case) -> tuple[Seen, Trace | None]:
    """What the model says before the first patch, except at the related rows.

    In `"multiple"` mode a trace's forward tells, which comes along.
    """
    engine, journal, traced, under, thin = run.engine, run.journal, None, {}, None
    rows_of = engine.team.rows
    if run.serving:
        with journal.phase("failures", rows_of(case.all_batches)):
            under = run.serving.look(case.all_batches, case.nothing_seen())

        def thin(here: Predictions, slots: torch.Tensor) -> torch.Tensor:
            needed = needed_gaps((here, {name: there[slots] for name, there in under.items()}))
            return here.gap < (0 if needed is None else needed)

    if run.args.mode == "multiple":
        with journal.phase("trace", rows_of(case.batches)):
            start = case.nothing_seen()
            traced = trace(engine, case.batches, run.probe(), thin=thin, start=start, progress=journal.advance)
        seen = Seen(traced.predictions, under=under)
    else:
        with journal.phase("failures", rows_of(case.batches)):
            seen = Seen(predict(engine, case.batches, case.nothing_seen(), journal.advance), under=under)
    if case.retained_batches:
        with journal.phase("failures", rows_of(case.retained_batches)):
            predict(engine, case.retained_batches, seen.predictions, journal.advance)
    seen.gaps = needed_gaps((seen.predictions, under))
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


def look_after(run: Run, case: Case, after: Predictions | None) -> Seen:
    """What the model says now, except at the related rows.

    Args:
        run: What every stage is given.
        case: The rows.
        after: Predictions (S) at the failures' rows, where they are known.
    """
    with run.journal.phase("verify", run.engine.team.rows(case.all_batches)):
        now = predict(run.engine, case.batches, case.nothing_seen(), replayed=True) if after is None else after.copy()
        predict(run.engine, case.retained_batches, now, replayed=True)
        return Seen(now, under=run.serving.look(case.all_batches, case.nothing_seen()))


def verify(run: Run, case: Case, now: Seen, with_generation: bool, behind: bool = True) -> Seen:
    """What [`look_after`] saw, with all else that a report tells of the model as it is now.

    Args:
        run: What every stage is given.
        case: The rows.
        now: What was seen of the failures' and the retained rows.
        with_generation: Also generate from all rows.
        behind: Look at what is said behind the completions.
    """
    with run.journal.phase("verify", _own_rows(run, case)):
        predictions = _with_related(run, case, now.predictions) if case.related else now.predictions
        now = replace(now, predictions=predictions)
        if with_generation:
            now.generated = generate_all(run, case)
        if behind:
            now.goes_on = look_behind(run, case, now)
    return now


def generate_all(run: Run, case: Case) -> dict[str, list[tuple[int, ...]]]:
    """Greedy generation of all rows but those of earlier repairs, which may be many, by source."""
    tokenizer = run.subject.tokenizer
    return {
        source: generate(run.engine, tokenizer, rows, run.journal.advance)
        for source, (rows, _) in case.parts.items()
        if rows and source != "earlier"
    }


def look_behind(run: Run, case: Case, now: Seen) -> dict[int, tuple[int, ...]]:
    """What the model goes on to say behind completions that it says right, up to a line's end and up to `BEHIND`
    tokens, by row.

    Only the first `MOST_BEHIND` are looked at. Rows that say where their completion ends are right only when the model
    stops there. The first token is read where the rows are read anyway; where it ends the line, nothing is generated.
    """
    limit, tokenizer = context_length(run.subject.base), run.subject.tokenizer
    right = rows_right(case.rows, now.predictions)
    wanted: dict[int, int] = {}
    for row, is_right in zip(case.rows, right):
        room = BEHIND if limit is None else min(BEHIND, limit - len(row))
        if is_right and not row.ended and room > 0 and len(wanted) < MOST_BEHIND:
            wanted[row.index] = room
    first = next_tokens(run.engine, [batch for batch in case.batches if any(r.index in wanted for r in batch.items)])
    found: dict[int, tuple[int, ...]] = {index: (first[index],) for index in wanted}
    longer = [
        # of a row's completion generation reads only how long it is
        replace(row, prompt_ids=(*row.input_ids, first[row.index]), completion_ids=(0,) * (wanted[row.index] - 1))
        for row in case.rows
        if wanted.get(row.index, 0) > 1 and not _ends(tokenizer, first[row.index])
    ]
    for row, tokens in zip(longer, generate(run.engine, tokenizer, longer, line_end=True)):
        found[row.index] += tokens
    return found


def _ends(tokenizer, token: int) -> bool:
    """Whether a token ends the text or its line."""
    return token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token])


def rows_right(rows: Sequence[Row], seen: Predictions) -> list[bool]:
    """Of rows, the first of those whose tokens were looked at, which have every token right."""
    offsets = completion_offsets(rows)
    return [bool(seen.right[start:end].all()) for start, end in zip(offsets, offsets[1:])]


def _own_rows(run: Run, case: Case) -> int:
    return len(run.engine.team.share_rows([*case.rows, *case.retained, *case.related]))
