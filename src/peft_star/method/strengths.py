"""How strongly to push each failure, found by forward passes alone, before another backward pass is paid.

The gap between a failure's expected token and its rival is nearly linear in the strength of its own push, so the
secant between two forwards says which strength solves it. Two or three forwards, each a third of the cost of a
forward-backward, find strengths that solve every failure and exceed none's need by much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..engine.predictions import Predictions
from .objective import Task

# a search looks at most at so many points
MAX_FORWARDS = 4
# aim a little beyond the point where the secant meets the goal
OVERSHOOT = 1.1
# a token that just misses its goal is pushed by at least this gap between logits
LEAST_GAP = 0.05
# strengths that solve everything are good enough when need is at least this share of them
NEAR = 0.7


def first_strengths(here: Predictions, task: Task, slots: torch.Tensor, descent: torch.Tensor) -> torch.Tensor:
    """A guess of the strengths (n) that solve the failures, from their slopes alone.

    To first order a push of strength c lowers its failure's cross entropy by c · `descent`. When the expected token
    rises and the rival falls as much, the gap opens 2 / (1 − p(expected) + p(rival)) times as fast.
    """
    rate = (1 - here.margin[slots]) / 2
    need = task.shortfall(here)[slots].clamp(min=LEAST_GAP) * OVERSHOOT
    return torch.where(task.wanting(here)[slots], need * rate / descent.clamp(min=1e-12), 0)


def next_strengths(
    here: Predictions, there: Predictions, task: Task, slots: torch.Tensor, strengths: torch.Tensor
) -> torch.Tensor:
    """The strengths (n) at which the secants through no push (`here`) and `strengths` (`there`) meet the goal."""
    need = task.shortfall(here)[slots]
    gain = there.gap[slots] - here.gap[slots]
    short = task.wanting(there)[slots]
    # a push that gains nothing yet is doubled; a token that had no push and suffers from the others' gets one
    aim = torch.where(gain > 0, strengths * (need.clamp(min=0) / gain.clamp(min=1e-12)) * OVERSHOOT, 2 * strengths)
    pushed = strengths[strengths > 0]
    idle = pushed.median() / 2 if pushed.numel() else strengths.new_zeros(())
    aim = torch.where(short, torch.maximum(aim, torch.maximum(OVERSHOOT * strengths, idle)), aim)
    return torch.minimum(aim, torch.maximum(4 * strengths, idle))


def search_strengths(
    look: Callable[[torch.Tensor], tuple[Predictions, float]],
    here: Predictions,
    task: Task,
    slots: torch.Tensor,
    descent: torch.Tensor,
    limit: float,
) -> tuple[torch.Tensor, Predictions, float]:
    """Find strengths that fulfil the task, by forward passes.

    Args:
        look: Predictions (S) and loss with given strengths (n).
        here: Predictions without a push.
        task: What has to be reached.
        slots: The tokens (n) that are pushed.
        descent: Slope (n) of each token's cross entropy, as a positive number.
        limit: The largest strength.

    Returns:
        The strengths, and the predictions and the loss with them: the weakest looked at that fulfil the task, or the
        best by [`Task.score`].
    """
    strengths = first_strengths(here, task, slots, descent).clamp(max=limit)
    best: tuple[Any, ...] | None = None
    for _ in range(MAX_FORWARDS):
        there, loss = look(strengths)
        done = task.done(there)
        rank = (done, *((-strengths.norm().item(),) if done else task.score(there)), -loss)
        if best is None or rank > best[0]:
            best = rank, strengths, there, loss
        aim = next_strengths(here, there, task, slots, strengths).clamp(max=limit)
        content = not task.wanting(there)[slots].any()
        # with every pushed token content only much weaker pushes are worth a look, also where others broke
        if best[0][0] and not done or content and not aim.norm() < NEAR * strengths.norm():
            break
        if torch.allclose(aim, strengths, rtol=1e-3):
            break
        strengths = aim
    assert best is not None  # the first look is the best so far
    return best[1:]
