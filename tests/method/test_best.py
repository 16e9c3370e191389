"""The state of a patch that is left, whatever ends the patching."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_star.engine.predictions import Predictions
from peft_star.method.best import keeping_best
from peft_star.method.objective import Task

SURE, BARELY, WRONG = 3.0, 0.01, -3.0
MARGIN = 0.1


def told(*gaps):
    """Predictions whose expected word is so many logits above the only other one."""
    gap = torch.tensor(gaps)
    p = gap.sigmoid()
    zeros = torch.zeros(len(gaps), dtype=torch.long)
    return Predictions(zeros, (gap < 0).long(), zeros + 1, 2 * p - 1, gap, p)


# two failures, and two tokens that were right
START = told(WRONG, WRONG, SURE, SURE)
TASK = Task.of(torch.tensor([0, 1]), START, MARGIN)


class Patching:
    """Two deltas that are 1, 2, ... after each step, in a block that keeps the best."""

    def __init__(self, interrupt_after=None):
        self.deltas = [nn.Parameter(torch.full((2, 3), 0.5)), nn.Parameter(torch.full((1, 3), -0.5))]
        self.heard, self.interrupt_after = [], interrupt_after

    def step(self, step, solved, loss):
        self.heard.append((step, solved, loss))
        if step == self.interrupt_after:
            raise KeyboardInterrupt

    def run(self, states, end=None):
        with keeping_best(self.deltas, TASK, START, SimpleNamespace(step=self.step)) as self.best:
            for step, state in enumerate(states, start=1):
                self.move(step)
                self.best.offer(step, state, 10.0 - step)
            if end is not None:
                # half of a step
                self.move(99)
                raise end

    @torch.no_grad()
    def move(self, value):
        for delta in self.deltas:
            delta.fill_(value)

    def assert_left(self, step, state):
        assert self.best.predictions is state
        assert all((delta == step).all() for delta in self.deltas)


GOOD = told(SURE, SURE, SURE, SURE)
ONE = told(SURE, WRONG, SURE, SURE)
ONE_BARELY = told(BARELY, WRONG, SURE, SURE)
ONE_BUT_BROKEN = told(SURE, WRONG, SURE, WRONG)
ALL_BUT_BROKEN = told(SURE, SURE, WRONG, WRONG)
BARELY_BUT_BROKEN = told(BARELY, BARELY, SURE, WRONG)
BARELY_ALL = told(BARELY, BARELY, SURE, SURE)
NONE = told(WRONG, WRONG, SURE, SURE)


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError])
def test_an_exception_within_a_step_leaves_the_best_finished_one(end):
    patching = Patching()
    with pytest.raises(end):
        patching.run([NONE, ONE, ONE_BUT_BROKEN], end("within a step"))
    patching.assert_left(2, ONE)


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_an_exception_within_the_first_step_leaves_what_was_there_before(end):
    patching = Patching()
    with pytest.raises(end):
        patching.run([], end("within a step"))
    assert patching.best.predictions is START and patching.best.score is None
    assert (patching.deltas[0] == 0.5).all() and (patching.deltas[1] == -0.5).all()


def test_whoever_hears_of_a_step_may_end_it_there():
    """The step is finished by then."""
    patching = Patching(interrupt_after=2)
    with pytest.raises(KeyboardInterrupt):
        patching.run([NONE, ONE, GOOD])
    patching.assert_left(2, ONE)


@pytest.mark.parametrize(
    ("states", "best"),
    [
        ([NONE, ONE, NONE], 2),
        ([ONE, NONE, NONE], 1),
        # a step that makes things worse than they were is still the best of all steps
        ([told(WRONG, WRONG, WRONG, SURE)], 1),
    ],
)
def test_when_the_steps_run_out_the_best_is_left(states, best):
    patching = Patching()
    patching.run(states)
    patching.assert_left(best, states[best - 1])
    # every step was heard of, with the failures that it had solved
    solved = [int((state.gap[:2] == SURE).sum()) for state in states]
    assert patching.heard == [(step, count, 10.0 - step) for step, count in enumerate(solved, start=1)]


def test_of_equals_the_first_is_left():
    patching = Patching()
    other = told(WRONG, SURE, SURE, SURE)
    patching.run([NONE, ONE, other, ONE_BUT_BROKEN])
    patching.assert_left(2, ONE)


# each is better than those before it
ORDER = [NONE, ONE_BUT_BROKEN, ONE_BARELY, ONE, ALL_BUT_BROKEN, BARELY_BUT_BROKEN, BARELY_ALL, GOOD]


@pytest.mark.parametrize("worse", range(len(ORDER) - 1))
def test_failures_count_before_harm_and_harm_before_margins(worse):
    for better in range(worse + 1, len(ORDER)):
        for places in ([worse, better], [better, worse]):
            patching = Patching()
            patching.run([ORDER[place] for place in places])
            patching.assert_left(1 + places.index(better), ORDER[better])


def test_what_is_kept_is_no_view_of_the_deltas():
    patching = Patching()
    with keeping_best(patching.deltas, TASK, START, SimpleNamespace(step=patching.step)) as best:
        patching.move(1)
        best.offer(1, ONE, 1.0)
        patching.move(2)
        best.offer(2, NONE, 1.0)
        assert all((kept == 1).all() and not kept.requires_grad for kept in best.kept)
        assert all((delta == 2).all() for delta in patching.deltas)
    assert all((delta == 1).all() and delta.requires_grad for delta in patching.deltas)
