"""Pushes further what does not hold in the arithmetic that will serve it, until it does (not in the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..engine.batch import completion_offsets
from ..engine.predictions import Predictions
from .objective import Goal, Task
from .serving import AIMED, ENOUGH, ROUNDS, needed_gaps
from .subject import Run
from .trace import Trace, trace
from .verify import Case, Seen, look_after, rows_right


def hold(
    run: Run,
    case: Case,
    before: Seen,
    now: Seen,
    patch_traced: Callable[[Run, Goal, Trace], Predictions],
) -> Seen:
    """Push what is right in the model's own arithmetic and wrong in another, and retained tokens that broke there.

    A round that makes no more rows hold is taken back, and is the last; but if it broke retained tokens, one more goes
    on from there, as these may be right again then. The best state is kept.

    Args:
        run: What every stage is given.
        case: The rows.
        before: What was seen before the patch.
        now: What was seen with it.
        patch_traced: Locates, solves and patches.

    Returns:
        What is seen with the patch as it is left.
    """
    if not run.serving:
        return now
    own, looks = case.parts["failures"][1], [(before.predictions, before.under)]
    # what is at hand are these failures alone: neither shared with others, nor grown
    run = replace(run, args=replace(run.args, reach="prompt"))
    best, kept, another = now, {}, True
    for _ in range(ROUNDS):
        looks.append((now.predictions, now.under))
        gaps = needed_gaps(*looks)
        assert gaps is not None  # there are arithmetics
        lacking = _lacking(case, before, now, gaps)
        if not lacking.any():
            break
        # of retained tokens no more is asked for than they had
        gaps[own.stop :] = torch.minimum(gaps, before.predictions.gap.clamp(min=0))[own.stop :]
        medium = torch.cat([case.failing(before.predictions, before.gaps), lacking.nonzero()[:, 0]]).unique()
        task = Task.of(medium, before.predictions, run.args.margin, gaps)
        goal = Goal(case.batches, case.retained_batches, task, now.predictions)
        goal = goal.watching([batch for batch in case.retained_batches if lacking[batch.slots.cpu()].any()])
        with run.journal.phase("trace", run.engine.team.rows(goal.batches)):
            traced = trace(run.engine, goal.batches, run.probe(), at=medium, start=goal.before)
        # callbacks are told of what this round pushes
        state = run.journal.state
        state.num_failures, state.num_solved = len(medium), task.num_solved(traced.predictions)
        if best is now:
            kept = {name: (layer.neurons, layer.delta.detach().clone()) for name, layer in run.subject.held().items()}
        patch_traced(run, goal, traced)
        now = look_after(run, case, None)
        score = _score(case, before, now, gaps)
        if score > _score(case, before, best, gaps):
            best = now
        elif another and score[0] < 0:
            another = False
        else:
            break
    if best is not now:
        run.subject.put_back(kept)
    return best


def _lacking(case: Case, before: Seen, now: Seen, gaps: torch.Tensor) -> torch.Tensor:
    """Tokens (mask of S) that do not hold: those of the failures' rows that are wrong in some arithmetic or too near
    to it, and retained ones that were right in one and are wrong there."""
    own = case.parts["failures"][1]
    lacking = ~now.predictions.right | (now.predictions.gap < ENOUGH / AIMED * gaps)
    lacking[own.stop :] = (before.predictions.right & ~now.predictions.right)[own.stop :]
    for name, there in now.under.items():
        wrong = ~there.right
        wrong[own.stop :] &= before.under[name].right[own.stop :]
        lacking = lacking | wrong
    for row, start in zip(case.rows, completion_offsets(case.rows)):
        if row.index in case.left_out:
            lacking[start : start + len(row.completion_ids)] = False
    return lacking


def _score(case: Case, before: Seen, now: Seen, gaps: torch.Tensor) -> tuple[int, int, int]:
    """Ranks states: fewest retained tokens broken, then most rows right, over all arithmetics, then fewest tokens that
    do not hold."""
    own = case.parts["failures"][1]
    pairs = [(before.predictions, now.predictions), *((before.under[name], now.under[name]) for name in now.under)]
    broken = sum(int((was.right & ~here.right)[own.stop :].sum()) for was, here in pairs)
    right = sum(sum(rows_right(case.rows, here)) for _, here in pairs)
    return -broken, right, -int(_lacking(case, before, now, gaps).sum())
