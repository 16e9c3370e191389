"""The acceptance gate: a repair that changes too much of what the model says by itself is not left as it is.

Nothing of it is the paper's. What a patch costs is measured on texts of the model's own that no patch is solved by
(see `evaluation/own_texts.py`). Above the limit the repair starts again: first without reaching beyond its rows, then
without the rows that cost most, until the limit holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from ..engine.batch import Batch, completion_offsets
from ..engine.replay import Replay
from ..evaluation.own_texts import Heard, TextsHarm, hear, texts_harm
from ..models.fingerprint import fingerprint
from .subject import Run
from .trace import Trace, trace
from .unfinished import AdapterState
from .verify import Case, Seen

# how often rows are left out before the gate gives up
ROUNDS = 3
# what is aimed at, as a share of the limit: which rows cost most is an estimate
AIM = 0.8

_VOICES: WeakKeyDictionary[nn.Module, tuple[tuple, dict[Batch, Heard], Replay]] = WeakKeyDictionary()

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
    reached = AdapterState.of(run.subject)
    start.put_back(run.subject)
    run.forget()
    limit = max(limit, measure(run).changed_share)  # what was there before is no fault of this repair
    reached.put_back(run.subject)
    run.forget()
    modest = replace(run, args=replace(run.args, reach="prompt"), resumed=False)
    for number in range(ROUNDS + 1):
        if harm.changed_share <= limit:
            break
        if number or run.args.reach == "prompt":
            costly = _costly(run, case, before, AIM * limit / harm.changed_share)
            if not costly:
                break
            case = replace(case, left_out=case.left_out | costly)
        start.put_back(run.subject)
        run.forget()
        run.journal.begin_again()
        now, harm = patch(modest, case, before, _traced_again(run, case, before, traced)), measure(run)
    _tell(run, case, harm, limit)
    return now, harm


def measure(run: Run) -> TextsHarm:
    """What the patch as it is does to the model's own texts; to none of them where nothing is to be protected."""
    if not run.args.background:
        return texts_harm(run.engine, {})
    heard, replay = _voice(run)
    below = any(run.subject.decoder_of.get(name) not in run.subject.decoder_layers for name in _patched(run))
    return texts_harm(replace(run.engine, replay=nullcontext if below else replay), heard)


def _voice(run: Run) -> tuple[dict[Batch, Heard], Replay]:
    """What the base says in those of its own texts that no patch is solved by, and what its lower layers do there;
    found out once for each model."""
    model, lowest = run.subject.base, next(iter(run.subject.decoder_layers))
    key = fingerprint(model), lowest, run.args.max_batch_tokens
    if model in _VOICES and _VOICES[model][0] == key:
        return _VOICES[model][1:]
    replay, texts = Replay(model, lowest), run.own_texts().measured
    with run.subject.unpatched():
        heard = hear(replace(run.engine, replay=replay), run.engine.batches(texts) if texts else [])
    if run.engine.team.size == 1:  # who has which batch is dealt out anew in each repair
        _VOICES[model] = key, heard, replay
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


def _costly(run: Run, case: Case, before: Seen, share: float) -> frozenset[int]:
    """The rows, by index, without which the patch's estimated effect on other text is no more than `share` of what it
    is: those that cost most, but never all."""
    failing = set(case.failing(before.predictions, before.gaps).tolist())
    starts = completion_offsets(case.rows)
    costs = {
        row.index: sum(run.journal.costs.get(slot, 0.0) for slot in failing.intersection(range(start, end)))
        for row, start, end in zip(case.rows, starts, starts[1:])
        if failing.intersection(range(start, end))
    }
    # how far text is moved adds up by squares
    allowed = share**2 * sum(costs.values())
    kept = 0.0
    cheapest_first = sorted(costs, key=costs.__getitem__)
    for number, index in enumerate(cheapest_first):
        kept += costs[index]
        if number and kept > allowed:
            return frozenset(cheapest_first[number:])
    return frozenset()


def _tell(run: Run, case: Case, harm: TextsHarm, limit: float) -> None:
    """Say of each row that was left out why it was."""
    percent = f"{100 * limit:.0f}%"
    over = harm.changed_share > limit
    for row in (row for row in case.rows if row.index in case.left_out):
        called = f"{row.number} ({row.id})" if row.id else str(row.number)
        sentence = (
            f"Row {called} was left out: with it, more than {percent} of the texts that the model says by itself "
            "would change (--max-harm)."
        )
        run.journal.warnings.append((row.index, sentence))
    if over:
        sentence = (
            f"The patch changes {harm.texts - harm.unchanged} of {harm.texts} texts that the model says by itself, "
            f"more than the limit of {percent} (--max-harm); repair fewer rows at once, or allow more."
        )
        run.journal.warnings.append((case.rows[0].index, sentence))
