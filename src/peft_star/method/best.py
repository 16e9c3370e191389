"""The best finished state of a patch, which is what is left whatever ends the patching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..engine.predictions import Predictions
from .callbacks import Journal
from .objective import Task


@dataclass
class Best:
    """The best state offered so far.

    Attributes:
        predictions: What the model says there (S).
        kept: The deltas' values there.
        score: Its [`Task.score`]; None: no step has been finished yet.
    """

    task: Task
    deltas: Sequence[nn.Parameter]
    journal: Journal
    predictions: Predictions
    kept: list[torch.Tensor]
    score: tuple | None = None

    def offer(self, step: int, here: Predictions, loss: float) -> None:
        """A step is finished: keep its state if it is the best one, or if it is all that was wanted."""
        self.keep(here)
        self.journal.step(step, self.task.num_solved(here), loss)

    def keep(self, here: Predictions) -> None:
        """Keep the deltas as they are if that is the best state so far, or all that was wanted."""
        score = self.task.score(here)
        if self.score is None or score > self.score or self.task.done(here):
            self.score, self.predictions = score, here
            self.kept = [delta.detach().clone() for delta in self.deltas]


@contextmanager
def keeping_best(deltas: Sequence[nn.Parameter], task: Task, start: Predictions, journal: Journal) -> Iterator[Best]:
    """Leave the deltas as they were at the best finished step: most failures right, then fewest tokens broken.

    So also when the block is left by an exception, such as Ctrl-C within a step: no step is half done afterwards, and
    none is kept that nobody has looked at.

    Args:
        deltas: The patched layers' deltas.
        task: What has to be reached.
        start: Predictions (S) at the deltas as they are.
        journal: Hears of every step.
    """
    best = Best(task, deltas, journal, start, [delta.detach().clone() for delta in deltas])
    try:
        yield best
    finally:
        put(deltas, best.kept)


@torch.no_grad()
def put(deltas: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """Make the deltas hold these values."""
    for delta, value in zip(deltas, values):
        delta.copy_(value)
