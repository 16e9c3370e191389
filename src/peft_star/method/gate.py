"""The acceptance gate: a repair that changes too much of what the model says by itself is not left as it is.

Nothing of it is the paper's. What a patch costs is measured on texts of the model's own that no patch is solved by
(see `evaluation/own_texts.py`). Above the limit the repair starts again: first without reaching beyond its rows, then
without the rows that cost most. How many these are is searched for, between as many as did not hold and as few as did.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from weakref import WeakKeyDictionary

from torch import nn

from ..engine.batch import Batch, completion_offsets
from ..engine.replay import Replay
from ..evaluation.own_texts import BATCH_TOKENS, Heard, TextsHarm, hear, texts_harm
from .subject import Run
from .trace import Trace, trace
from .unfinished import AdapterState
from .verify import Case, Seen

# how many patches of fewer rows are tried
ROUNDS = 4
# what is aimed at, as a share of the limit: what a row costs is an estimate
AIM = 0.8

# of a model what the last kinds of repairs have heard: two may take turns
VOICES = 2
Voice = tuple[dict[Batch, Heard], Replay]
_VOICES: WeakKeyDictionary[nn.Module, dict[tuple, Voice]] = WeakKeyDictionary()

Patch = Callable[[Run, Case, Seen, Trace | None], Seen]


def within_limits(
    run: Run, case: Case, before: Seen, traced: Trace | None, patch: Patch, start: AdapterState
) -> tuple[Seen, TextsHarm]:
    """Patch such that at most `max_harm` of the model's own texts change, what an earlier patch changed included.

    Args:
        run: What every stage is given.
        case: The rows.
        before: What the model says at them before the patch.
        traced: Their trace, in mode "multiple".
        patch: It patches, and says what is seen then.
        start: What the adapter held before the repair.

    Returns:
        What is seen with the patch, and the harm. Rows that were left out are wrong as before, and the journal has a
        warning for each.
    """
    now, harm = patch(run, case, before, traced), measure(run)
    limit = run.args.max_harm
    if harm.changed_share <= limit:
        return now, harm
    reached = _Trial.of(run, case, now, harm)
    start.put_back(run.subject)
    run.forget()
    limit = max(limit, measure(run).changed_share)  # what was there before is no fault of this repair
    modest = replace(run, args=replace(run.args, reach="prompt"), resumed=False)

    def attempt(left_out: frozenset[int]) -> _Trial:
        start.put_back(run.subject)
        run.forget()
        run.journal.begin_again()
        tried = replace(case, left_out=case.left_out | left_out)
        seen = patch(modest, tried, before, _traced_again(run, tried, before, traced))
        return _Trial.of(run, tried, seen, measure(run))

    all_rows = trial = reached if run.args.reach == "prompt" else attempt(frozenset())
    if all_rows.harm.changed_share > limit:
        trial = _most_rows(attempt, all_rows, _costs(run, case, before), limit)
    trial.put_back(run)
    _tell(run, trial, limit, all_rows.harm)
    return trial.now, trial.harm


@dataclass(frozen=True)
class _Trial:
    """A patch of some of the rows, and what there is to know of it."""

    case: Case
    now: Seen
    harm: TextsHarm
    state: AdapterState
    tell: Callable[[], None]

    @classmethod
    def of(cls, run: Run, case: Case, now: Seen, harm: TextsHarm) -> _Trial:
        """The patch as it is."""
        return cls(case, now, harm, AdapterState.of(run.subject), run.journal.told())

    def put_back(self, run: Run) -> None:
        """Make the adapter hold the patch, and the journal tell of it."""
        self.state.put_back(run.subject)
        run.forget()
        self.tell()


def _most_rows(
    attempt: Callable[[frozenset[int]], _Trial], all_rows: _Trial, costs: dict[int, float], limit: float
) -> _Trial:
    """Of the patches that hold the limit the one of the most rows that is found in `ROUNDS`; where none does, that of
    the fewest rows that was tried.

    Args:
        attempt: Patches all rows but those of these indices.
        all_rows: The patch of all rows, which does not hold the limit.
        costs: By a row's index an estimate of what its pushes cost.
        limit: The share of own texts that may change.
    """
    cheapest_first = sorted(costs, key=costs.__getitem__)
    # how far text is moved adds up by squares
    moved = [total**0.5 for total in accumulate(costs[index] for index in cheapest_first)]
    few, many, best, too_much = 0, len(costs), all_rows, all_rows.harm.changed_share
    for _ in range(ROUNDS):
        if many - few <= 1:
            break
        aim = AIM * limit / too_much * moved[many - 1]
        count = max(1, bisect_right(moved, aim, 0, many - 1))
        if count <= few or not moved[-1]:  # nothing is known that would tell
            count = (few + many) // 2
        trial = attempt(frozenset(cheapest_first[count:]))
        if trial.harm.changed_share <= limit:
            few, best = count, trial
        else:
            many, too_much = count, trial.harm.changed_share
            best = best if few else trial
    return best


def tell_of_echoes(run: Run, case: Case, before: Seen, harm: TextsHarm) -> None:
    """Warn where several of the model's own texts now say what the failures were to say: there, the patch answers to
    something else than the problem."""
    failing = set(case.failing(before.predictions, before.gaps).tolist())
    taught: dict[int, int] = {}
    for row, start in zip(case.rows, completion_offsets(case.rows)):
        for slot, token in enumerate(row.completion_ids, start):
            if slot in failing:
                taught.setdefault(token, row.index)
    said = Counter(parting.now for parting in harm.partings if parting.now in taught)
    for token, count in said.items():
        text = run.subject.tokenizer.decode([token])
        # a bracket or a line's end stands everywhere
        if count > 1 and any(map(str.isalpha, text)):
            sentence = (
                f"{count} of {harm.texts} texts that the model says by itself say {text!r} now, as failures are to, "
                "where they said something else: the patch answers to more than the problem."
            )
            run.journal.warnings.append((taught[token], sentence))


def measure(run: Run) -> TextsHarm:
    """What the patch as it is does to the model's own texts; to none of them where nothing is to be protected."""
    if not run.args.background:
        return texts_harm(run.engine, {})
    heard, replay = _voice(run)
    below = any(run.subject.decoder_of.get(name) not in run.subject.decoder_layers for name in _patched(run))
    return texts_harm(replace(run.engine, replay=nullcontext if below else replay), heard)


def _voice(run: Run) -> Voice:
    """What the base says in those of its own texts that no patch is solved by, and what its lower layers do there;
    found out once for each model and the layers that may be patched."""
    model, (lowest, changing) = run.subject.base, run.subject.lowest
    key = run.subject.fingerprint, lowest, changing, run.args.max_batch_tokens
    known = _VOICES.setdefault(model, {})
    if key in known:
        return known[key]
    replay, texts = Replay(model, lowest, changing=changing), run.own_texts().measured
    engine = replace(run.engine, replay=replay, max_batch_tokens=min(BATCH_TOKENS, run.args.max_batch_tokens))
    with run.subject.unpatched():
        heard = hear(engine, engine.batches(texts) if texts else [])
    if run.engine.team.size == 1:  # who has which batch is dealt out anew in each repair
        known[key] = heard, replay
        for old in list(known)[:-VOICES]:
            del known[old]
    return heard, replay


def _patched(run: Run) -> list[str]:
    """The modules whose deltas are not zero."""
    adapter = run.subject.adapter
    return [name for name, layer in run.subject.layers().items() if layer.star_delta[adapter].any()]


def _traced_again(run: Run, case: Case, before: Seen, traced: Trace | None) -> Trace | None:
    """The trace of the failures that are not left out."""
    if traced is None:
        return None
    return trace(
        run.engine,
        case.batches,
        run.probe(),
        at=case.failing(before.predictions, before.gaps),
        start=before.predictions,
    )


def _costs(run: Run, case: Case, before: Seen) -> dict[int, float]:
    """By a failing row's index the estimated effect of its pushes on other text."""
    failing = set(case.failing(before.predictions, before.gaps).tolist())
    starts = completion_offsets(case.rows)
    return {
        row.index: sum(run.journal.costs.get(slot, 0.0) for slot in failing.intersection(range(start, end)))
        for row, start, end in zip(case.rows, starts, starts[1:])
        if failing.intersection(range(start, end))
    }


def _tell(run: Run, trial: _Trial, limit: float, all_rows: TextsHarm) -> None:
    """Say of each row that was left out why it was, and what limit would have kept it; `all_rows` is what the patch of
    all rows does."""
    case, harm, percent = trial.case, trial.harm, f"{100 * limit:.0f}%"
    over = harm.changed_share > limit
    for row in (row for row in case.rows if row.index in case.left_out):
        called = f"{row.number} ({row.id})" if row.id else str(row.number)
        sentence = (
            f"Row {called} was left out: the limit is that {percent} of the texts that the model says by itself "
            f"change, and all rows together change {_count(all_rows)} (--max-harm)."
        )
        run.journal.warnings.append((row.index, sentence))
    if over:
        sentence = (
            f"The patch changes {_count(harm)} texts that the model says by itself, more than the limit of {percent} "
            "(--max-harm); repair fewer rows at once, or allow more."
        )
        run.journal.warnings.append((case.rows[0].index, sentence))


def _count(harm: TextsHarm) -> str:
    return f"{harm.texts - harm.unchanged} of {harm.texts}"
