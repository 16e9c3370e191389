"""How far a patch that solves its rows grows, to answer in other contexts of the problem, too (not in the paper).

In other contexts the neurons answer less than in the rows themselves, so a patch that just solves these does little
there. How much less, the rows tell each other where several of them want the same token: what the patch would do in
one of them had it been solved without it, in closed form. Where no row speaks for another, the words that the model
says beside the failures are all there is to go by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..engine.predictions import Predictions
from ..failures import Row
from .bystanders import Bystanders
from .objective import Goal
from .pushes import Push, Replies
from .subject import HeldLayer, Run
from .trace import Trace

# by which factors a patch grows, as long as nobody beside the failures is disturbed
GROWTH = (1.25, 1.6, 2.0, 2.5, 3.0)
# the share of rows that the others are to solve, rounded down
MOST = 0.75
# how many times a word beside the failures may lose what it may otherwise: for every two rows, at most
PATIENCE = 2.0


@dataclass
class Growth:
    """Which pushes of a patch grow, and what the rows tell of each other.

    Attributes:
        bystanders: What is not to be disturbed.
        origins: The deltas before the patch.
        rows: By a failing token's slot its row.
        recurring: Slots of failing tokens that a failing token of another row of their problem wants to be, too.
        changes: Per layer what the pushes that grow have added to the delta, shape (k, d).
        gains: By how much all pushes have lowered the cross entropy at each of S tokens, by how much they had without
            the token's row, and by how much those of them had that grow; to first order, float64, shape (3, S).
    """

    bystanders: Bystanders
    origins: list[torch.Tensor]
    rows: dict[int, Row]
    recurring: set[int]
    changes: list[torch.Tensor]
    gains: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[HeldLayer], traced: Trace, bystanders: Bystanders) -> Growth:
        """That of the failures of the first trace, before anything is pushed."""
        slots, rows = traced.medium.tolist(), traced.rows()
        keys = [(row.problem, token) for row, token in zip(rows, traced.predictions.expected[traced.medium].tolist())]
        found: dict[tuple, set[Row]] = {}
        for key, row in zip(keys, rows):
            found.setdefault(key, set()).add(row)
        recurring = {slot for slot, key in zip(slots, keys) if len(found[key]) > 1}
        gains = torch.zeros(3, len(traced.predictions.gap), dtype=torch.float64)
        origins = [layer.delta.detach().clone() for layer in layers]
        return cls(bystanders, origins, dict(zip(slots, rows)), recurring, list(map(torch.zeros_like, origins)), gains)

    def add(self, pushes: Sequence[Push], replies: Replies, strengths: torch.Tensor, slots: torch.Tensor) -> None:
        """The tokens in these slots (n) have been pushed with these strengths (n)."""
        grown = strengths * self._grow(slots)
        for change, push in zip(self.changes, pushes):
            change += push.change(grown)
        pairs = (replies.own, strengths), (replies.held_out, strengths), (replies.held_out, grown)
        self.gains[:, slots] += torch.stack([matrix @ c.double() for matrix, c in pairs])

    def _grow(self, slots: torch.Tensor) -> torch.Tensor:
        """Which of these pushes (n) grow, 1 or 0: of a row that shares tokens with others, those of these tokens."""
        sharing = {self.rows[slot] for slot in self.recurring}
        known = {slot for slot, row in self.rows.items() if slot in self.recurring or row not in sharing}
        return torch.tensor([float(slot in known) for slot in slots.tolist()])

    @property
    def witnesses(self) -> int:
        """How many rows have something that recurs."""
        return len({self.rows[slot] for slot in self.recurring})

    def needed(self, before: Predictions, now: Predictions) -> float:
        """The factor with which the pushes of the others would solve what recurs in `MOST` of the rows that have
        something that does; infinite where they would not, or where nothing recurs.

        A token's gap is taken to follow the pushes of other rows as it has followed all of them.

        Args:
            before: What the model says without the patch (S).
            now: What it says with it (S).
        """
        scale = (now.gap - before.gap).double().clamp(min=0) / self.gains[0].clamp(min=1e-12)
        short, gain = -before.gap.double() - scale * self.gains[1], scale * self.gains[2]
        factors = torch.where(short <= 0, 1.0, torch.where(gain > 0, 1 + short / gain, torch.inf))
        wanting: dict[Row, float] = {}
        for slot in self.recurring:
            row = self.rows[slot]
            wanting[row] = max(float(factors[slot]), wanting.get(row, 1.0))
        ranked = sorted(wanting.values())
        return ranked[int(MOST * len(ranked)) - 1] if ranked else float("inf")


@torch.no_grad()
def grow(run: Run, goal: Goal, layers: Sequence[HeldLayer], growth: Growth, here: Predictions) -> Predictions:
    """Let a patch that does its task grow: as a whole by the largest factor of `GROWTH` with which it disturbs no word
    beside the failures, if that leaves the task done. Where that is less than the rows need of each other (see
    [`Growth.needed`]), what recurs in them grows instead, as long as that disturbs no word more than it did.

    Args:
        here: What the model says with the patch.

    Returns:
        What it says then; what recurs may have grown at the cost of the rows' other tokens.
    """
    starts = [layer.delta.detach().clone() for layer in layers]
    whole = [start - origin for start, origin in zip(starts, growth.origins)]

    def put(changes: Sequence[torch.Tensor], factor: float) -> None:
        for layer, start, change in zip(layers, starts, changes):
            layer.delta.copy_(start + (factor - 1) * change)

    def largest(changes: Sequence[torch.Tensor], factors: Sequence[float], beside: Bystanders) -> float:
        found = 1.0
        for factor in factors:
            put(changes, factor)
            if not beside.undisturbed(run.engine):
                break
            found = factor
        put(changes, found)
        return found

    def seen() -> Predictions:
        now, _ = goal.look(run.engine)
        return goal.look_at_the_rest(run.engine, now)[0]

    needed, factor, now = growth.needed(goal.before, here), largest(whole, GROWTH, growth.bystanders), here
    if factor > 1:
        now = seen()
        if not goal.task.done(now):
            factor, now = 1.0, here
            put(whole, factor)
    if factor < needed <= max(GROWTH, default=0):
        put(whole, 1)
        beside = growth.bystanders.as_now(run.engine, min(growth.witnesses / 2, PATIENCE))
        if largest(growth.changes, [*(step for step in GROWTH if step < needed), needed], beside) > factor:
            return seen()
        put(whole, factor)
    return now
