"""Pushes at what a problem is about: the tokens that a row names as its `focus`, in early layers (not in the paper).

A failure shows at the token before the one that is wrong, but what it is about may have been read long before: the
subject of a fact, the name of a function. A push at the last token of that span, in the layers that gather what is
known of it, carries over to other ways of asking, and leaves alone what is asked of others. Editors of facts act there
(ROME and MEMIT, Meng et al. 2022); the frame is this package's: few neurons, least squares under protection, checked
by forward passes, and whatever it does not solve is left to the pushes at the failing tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from ..engine.batch import completion_offsets
from ..engine.predictions import Predictions
from ..failures import Row
from ..models import structure
from . import counterfactuals
from .band import FRONT, Band, Named
from .best import keeping_best, put
from .objective import Goal
from .subject import Run
from .targets import find_targets

# the layers that a push is spread over, as shares of the depth: the fifth to the ninth of 30
BAND = (4 / 30, 8 / 30)
# rounds until all is as wanted, and by how much more the targets of what is wanting are asked for in the next
ROUNDS, MORE = 3, 1.4
# behind so many other texts it is asked whether a push holds
ASKED = 3


def patch(
    run: Run, goal: Goal, rows: Sequence[Row], retained: Sequence[Row], how: Mapping[int, str]
) -> Predictions | None:
    """Push the rows that have a focus, all of them at once, if that holds up: if more of the goal's tokens are as
    wanted with the pushes than without.

    Args:
        run: What every stage is given.
        goal: The failures, over the rows' slots.
        rows: The failures' rows.
        retained: Rows that must stay right; what the neurons do in them is protected.
        how: What the report calls each row's focus, by the row's index.

    Returns:
        [`Predictions`] (S) with the pushes, or None where there are none; the adapter is then as it was.
    """
    # the lower layers change, so none is replayed
    run = replace(run, engine=replace(run.engine, replay=nullcontext))
    failing = {int(slot) for slot in goal.task.medium.nonzero()[:, 0]}
    starts = completion_offsets(rows)
    named = [
        Named.of(run, row, slice(start, end))
        for row, start, end in zip(rows, starts, starts[1:])
        if row.focus and failing.intersection(range(start, end))
    ]
    if not named:
        return None
    layers_of_model = [name for name, _ in structure.find_decoder_layers(run.subject.base)]
    names = _in_band(run, layers_of_model)
    if not names:
        _warn(run, named, "The adapter does not reach the layers in which a push at the focus acts.")
        return None
    with run.journal.phase("solve", len(run.own_texts().protected) if run.args.background else 0):
        band = Band(run, names)
    with run.journal.phase("solve", len(named)):
        above = layers_of_model[layers_of_model.index(band.top) + 1]
        sites = [one.searched for one in named]
        tokens = run.args.max_batch_tokens
        found = find_targets(band.model, band.top, above, sites, tokens, run.journal.advance, band.fisher)
        protection = band.protection(named, retained)
        unpatched = band.at_sites(named)
        layers = run.subject.hold(band.locate(unpatched[0], protection))
    deltas = [layer.delta for layer in layers]
    origins = [delta.detach().clone() for delta in deltas]
    with run.journal.phase("patch", ROUNDS), keeping_best(deltas, goal.task, goal.before, run.journal) as best:
        least, costs = goal.task.wanting(goal.before).sum(), torch.zeros(len(torch.cat(found)), dtype=torch.float64)
        for step in range(1, ROUNDS + 1):
            costs += band.spread(layers, named, torch.cat(found), protection, unpatched)
            now, loss = goal.look(run.engine)
            wanting = goal.task.wanting(now)
            if wanting.sum() < least:
                least = wanting.sum()
                best.offer(step, now, loss)
            if not least:
                break
            found = [MORE * delta if wanting[one.slots].any() else delta for one, delta in zip(named, found)]
    if best.score is None:
        _warn(run, named, "A push at the focus did not help, so the failing tokens were pushed instead.")
        return None
    astray = _astray(run, named, deltas, origins)
    if astray:
        # without these, what is left of the others' push is another one
        put(deltas, origins)
        rest = [replace(row, focus=(), focus_starts=()) if row.index in astray else row for row in rows]
        return patch(run, goal, rest, retained, how)
    for one, cost in zip(named, costs.split([one.site.size for one in named])):
        run.journal.cost(min(failing.intersection(range(one.slots.start, one.slots.stop))), float(cost.sum()))
        index = one.row.index
        run.journal.acts.append({"row": index, "how": how[index], "tokens": list(one.row.focus), "layers": names})
    return best.predictions


def _astray(
    run: Run, named: Sequence[Named], deltas: Sequence[nn.Parameter], origins: Sequence[torch.Tensor]
) -> set[int]:
    """The rows, by index, whose pushes answer to other names, too; of these, and of those that answer behind no other
    text, a warning says so."""

    @contextmanager
    def without() -> Iterator[None]:
        pushed = [delta.detach().clone() for delta in deltas]
        put(deltas, origins)
        try:
            yield
        finally:
            put(deltas, pushed)

    rows = [one.row for one in named]
    verdicts = counterfactuals.look(run.engine, rows, run.subject.tokenizer, FRONT[1 : 1 + ASKED], without)
    for one in named:
        found = verdicts[one.row.index]
        if found.astray:
            _warn(
                run,
                [one],
                f"A push at the focus answered to {found.taken} of {found.names} other names, too, so the failing "
                "tokens were pushed instead.",
            )
        elif found.bound:
            _warn(run, [one], "Behind other text the push at the focus does not hold: it answers to its place, too.")
    return {index for index, found in verdicts.items() if found.astray}


def _warn(run: Run, named: Sequence[Named], sentence: str) -> None:
    run.journal.warnings += [(one.row.index, sentence) for one in named]


def _in_band(run: Run, names: Sequence[str]) -> list[str]:
    """The second matrices in the band of these decoder layers, of those that the adapter may patch, by depth."""
    first, last = (min(round(share * len(names)), len(names) - 2) for share in BAND)
    inside = set(names[first : last + 1]) if len(names) > 1 else set()
    found = [name for name, layer in run.subject.decoder_of.items() if layer in inside]
    return [name for name in found if structure.routed_shape(run.subject.base.get_submodule(name)) is None]
