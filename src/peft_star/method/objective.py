"""What a patch has to reach: every failure solved by the margin, and nothing that was right wrong; and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.passes import completion_logits, loss_at, predict
from ..engine.predictions import Predictions


@dataclass(frozen=True)
class Task:
    """The failures `medium` and the tokens `right_before`, masks over the S completion tokens; no token is in both.
    A failure is solved by the `margin` in probability, and by its gap in logits where there are `gaps` (S)."""

    medium: torch.Tensor
    right_before: torch.Tensor
    margin: float
    gaps: torch.Tensor | None = None

    @classmethod
    def of(cls, medium: torch.Tensor, before: Predictions, margin: float, gaps: torch.Tensor | None = None) -> Task:
        """The task of solving the slots `medium` (n), starting from the predictions `before` (S)."""
        is_medium = torch.zeros_like(before.right)
        is_medium[medium] = True
        return cls(is_medium, before.right & ~is_medium, margin, gaps)

    def solved(self, now: Predictions) -> torch.Tensor:
        """Which of the S tokens are right by as much as is asked for."""
        solved = now.solved(self.margin)
        return solved if self.gaps is None else solved & (now.gap >= self.gaps)

    def broken(self, now: Predictions) -> torch.Tensor:
        return self.right_before & ~now.right

    def at_stake(self, now: Predictions) -> torch.Tensor:
        """Where the loss is taken: the failures, solved or not, and the broken tokens."""
        return self.medium | self.broken(now)

    def wanting(self, now: Predictions) -> torch.Tensor:
        """Tokens that are not as they should be: failures not solved by the margin, and broken ones."""
        return self.medium & ~self.solved(now) | self.broken(now)

    def done(self, now: Predictions) -> bool:
        return not self.wanting(now).any()

    def done_by_margin(self, now: Predictions) -> bool:
        """Whether all is as wanted but for the gaps."""
        return not (self.medium & ~now.solved(self.margin) | self.broken(now)).any()

    def num_solved(self, now: Predictions) -> int:
        return int(self.solved(now)[self.medium].sum())

    def score(self, now: Predictions) -> tuple[int, int, int]:
        """Ranks states: most failures right, then fewest tokens broken, then most solved."""
        return int(now.right[self.medium].sum()), -int(self.broken(now).sum()), self.num_solved(now)

    def shortfall(self, now: Predictions) -> torch.Tensor:
        """By how much the logit gap of each of the S tokens falls short of what is asked for (below 0: enough).

        With s = p(expected) + p(rival), the margin is s · tanh(gap / 2). Where s is still too small for the margin, a
        gap is aimed at with which both would hold enough of the probability.
        """
        enough = min((1 + self.margin) / 2, 2 * self.margin)
        share = (2 * now.p_expected - now.margin).clamp(min=max(enough, 1e-6))
        wanted = 2 * torch.atanh(self.margin / share)
        return (wanted if self.gaps is None else torch.maximum(wanted, self.gaps)) - now.gap


@dataclass(frozen=True)
class Goal:
    """What one set of failures must reach, and the rows by which it is seen.

    Attributes:
        batches: The rows that every pass looks at.
        unwatched: Rows that must stay right, and are looked at only when the task seems fulfilled.
        task: The task, over the slots (S) of all batches.
        before: Predictions (S) at the start; what a pass does not look at is taken to be as it was then.
    """

    batches: tuple[Batch, ...]
    unwatched: tuple[Batch, ...]
    task: Task
    before: Predictions

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        unwatched: Sequence[Batch],
        medium: torch.Tensor,
        before: Predictions,
        margin: float,
        gaps: torch.Tensor | None = None,
    ) -> Goal:
        """The goal of solving the slots `medium` (n), starting from the predictions `before` (S)."""
        return cls(tuple(batches), tuple(unwatched), Task.of(medium, before, margin, gaps), before)

    def look(self, engine: Engine, *, differentiate: bool = False) -> tuple[Predictions, float]:
        """What the model says now, and the loss over what is at stake.

        With `differentiate`, its gradient is accumulated, that of this process's batches. A batch whose failures are
        all solved and whose other tokens are whole is left out: it has nothing to ask for, and comes back when a later
        step undoes it.
        """
        now, total = self.before.copy(), 0.0
        for batch in engine.team.share(self.batches):
            slots = batch.slots.cpu()
            with torch.set_grad_enabled(differentiate), engine.replay(batch):
                logits = completion_logits(engine.model, batch)
            now.read(batch, logits.detach())
            chosen = self.task.at_stake(now)[slots]
            if chosen.any():
                with torch.set_grad_enabled(differentiate):
                    loss = loss_at(logits, batch, chosen)
                total += loss.item()
                if differentiate and self.task.wanting(now)[slots].any():
                    loss.backward()
        engine.team.join(now, self.batches)
        return now, engine.team.total(total)

    def look_at_the_rest(self, engine: Engine, here: Predictions) -> tuple[Predictions, tuple[Batch, ...]]:
        """`here` with the unwatched rows as they are now, and those of them that have broken."""
        now = predict(engine, self.unwatched, here.copy())
        broken = self.task.broken(now)
        return now, tuple(batch for batch in self.unwatched if broken[batch.slots.cpu()].any())

    def watching(self, batches: Sequence[Batch]) -> Goal:
        """The same goal, with these of the unwatched batches looked at in every pass from now on."""
        rest = tuple(batch for batch in self.unwatched if batch not in batches)
        return replace(self, batches=(*self.batches, *batches), unwatched=rest)


def differentiate(engine: Engine, batches: Sequence[Batch], wanted: torch.Tensor) -> None:
    """Accumulate the gradient of the cross entropy at the slots `wanted` (mask of S); of this process's batches."""
    for batch in engine.team.share(batches):
        chosen = wanted[batch.slots.cpu()]
        if chosen.any():
            with engine.replay(batch):
                logits = completion_logits(engine.model, batch)
            loss_at(logits, batch, chosen).backward()
