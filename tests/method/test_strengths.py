"""The search for strengths on gap functions whose answer is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_star.engine.predictions import Predictions
from peft_star.method.objective import Task
from peft_star.method.strengths import MAX_FORWARDS, search_strengths

MARGIN = 0.01


class Gaps:
    """Tokens whose expected word is `gap(strengths)` logits above one rival; nothing else has any probability."""

    def __init__(self, start, slope, slots=None, bend=0.0, others=None):
        self.start = torch.as_tensor(start, dtype=torch.float64)
        self.slots = torch.arange(len(slope)) if slots is None else torch.as_tensor(slots)
        self.slope, self.bend = torch.as_tensor(slope, dtype=torch.float64), bend
        self.others = others  # (S, n): what a push does to other tokens
        self.looks = []
        before = self.predictions(self.start)
        self.task = Task.of(self.slots[~before.right[self.slots]], before, MARGIN)
        self.before = before

    @staticmethod
    def predictions(gap):
        p = gap.sigmoid()
        expected = torch.zeros(len(gap), dtype=torch.long)
        right = gap > 0
        gap, p = gap.float(), p.float()
        return Predictions(expected, (~right).long(), torch.ones_like(expected), 2 * p - 1, gap, p)

    def gaps(self, strengths):
        strengths = strengths.double()
        gap = self.start.clone()
        reach = self.slope * strengths
        gap[self.slots] += reach + self.bend * reach * reach / 10
        return gap if self.others is None else gap + self.others.double() @ strengths

    def __call__(self, strengths):
        self.looks.append(strengths.clone())
        now = self.predictions(self.gaps(strengths))
        return now, torch.nn.functional.softplus(-now.gap[self.task.medium]).sum().item()

    @property
    def descent(self):
        """∂(cross entropy)/∂strength, negated: with two words it is (1 − p) · ∂gap."""
        return ((1 - self.before.p_expected[self.slots]) * self.slope).float()

    def need(self):
        """Strengths that just solve each token, were the gaps linear and the pushes independent."""
        return self.task.shortfall(self.before)[self.slots].double() / self.slope

    def search(self, limit=1e6, descent=None):
        descent = self.descent if descent is None else torch.as_tensor(descent)
        found = search_strengths(self, self.before, self.task, self.slots, descent, limit)
        strengths, there, loss = found
        # what comes back belongs together, and was looked at
        again, same = Gaps.__call__(self, strengths)
        assert torch.equal(again.gap, there.gap) and same == loss
        self.looks.pop()
        assert any(torch.equal(strengths, looked) for looked in self.looks)
        assert 1 <= len(self.looks) <= MAX_FORWARDS
        return strengths, there


def test_linear_gaps_with_a_true_slope_are_solved_at_the_first_look():
    gaps = Gaps([-0.3, -2.0, -9.0], [1.0, 0.2, 30.0])
    strengths, there = gaps.search()
    assert gaps.task.done(there) and len(gaps.looks) == 1
    assert (strengths >= gaps.need()).all() and (strengths < 1.2 * gaps.need()).all()


@pytest.mark.parametrize("wrong", [0.1, 0.3, 3.0, 10.0])
def test_a_wrong_slope_costs_looks_but_hardly_strength(wrong):
    gaps = Gaps([-1.0, -2.0, -9.0], [1.0, 0.2, 30.0])
    strengths, there = gaps.search(descent=gaps.descent * wrong)
    assert gaps.task.done(there) and len(gaps.looks) > 1
    assert (strengths >= gaps.need()).all() and strengths.norm() < 1.45 * gaps.need().norm()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 8), bend=st.floats(-0.15, 0.5), wrong=st.floats(0.4, 3))
def test_mildly_bent_gaps_are_solved(data, n, bend, wrong):
    gaps, there, strengths, need = bent(data, n, bend, wrong)
    assert gaps.task.done(there) and (strengths > 0).all()
    # a convex gap's secant from too far falls short, and then the first strengths are kept
    if bend <= 0:
        assert strengths.double().norm() < 1.6 * need.norm()


def bent(data, n, bend, wrong):
    start = [data.draw(st.floats(-3, -0.1)) for _ in range(n)]
    slope = [data.draw(st.floats(0.1, 10)) for _ in range(n)]
    gaps = Gaps(start, slope, bend=bend)
    strengths, there = gaps.search(descent=gaps.descent * wrong)
    # the least reach with which reach + bend · reach² / 10 meets the need, by bisection
    need = gaps.task.shortfall(gaps.before).double().clamp(min=0.05)
    low, high = torch.zeros(n, dtype=torch.float64), 3 * need
    for _ in range(60):
        middle = (low + high) / 2
        enough = middle + bend * middle * middle / 10 >= need
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return gaps, there, strengths, high / gaps.slope


def test_what_solves_with_less_wins():
    """The first look solves with ten times the need; the second with less."""
    gaps = Gaps([-1.0, -2.0], [1.0, 1.0])
    strengths, there = gaps.search(descent=gaps.descent / 10)
    assert gaps.task.done(there)
    first = gaps.looks[0]
    assert gaps.task.done(gaps(first)[0]) and strengths.norm() < 0.2 * first.norm()


def test_when_less_does_not_solve_the_last_that_did_is_kept():
    """Gaps that jump: the secant from far beyond the step lands short of it."""
    gaps = Gaps([-1.0], [1.0])
    gaps.gaps = lambda strengths: torch.where(strengths.double() >= 5, 8.0, -0.9)
    strengths, there = gaps.search(descent=gaps.descent / 10)
    assert gaps.task.done(there) and strengths.item() >= 5 and len(gaps.looks) >= 2


@pytest.mark.parametrize("limit", [0.01, 0.5, 2.0])
def test_no_look_exceeds_the_limit(limit):
    gaps = Gaps([-0.3, -2.0, -9.0], [1.0, 0.2, 3.0])
    strengths, there = gaps.search(limit=limit, descent=gaps.descent / 5)
    assert all((looked <= limit).all() and (looked >= 0).all() for looked in gaps.looks)
    reachable = gaps.need() <= limit
    assert torch.equal(there.right, reachable) and not gaps.task.done(there)


def test_what_the_limit_leaves_as_it_was_is_not_looked_at_again():
    gaps = Gaps([-3.0, -2.0], [1.0, 0.2])
    strengths, there = gaps.search(limit=0.01)
    assert len(gaps.looks) == 1 and not gaps.task.done(there)


def test_without_a_solution_the_best_looked_at_is_given():
    """The second token cannot be moved; the first is not sacrificed to it."""
    gaps = Gaps([-1.0, -1.0], [1.0, 1e-9])
    strengths, there = gaps.search(limit=50.0, descent=torch.tensor([0.7, 0.7]))
    scores = [gaps.task.score(gaps.predictions(gaps.gaps(looked))) for looked in gaps.looks]
    assert there.right.tolist() == [True, False]
    assert gaps.task.score(there) == max(scores) and len(gaps.looks) == MAX_FORWARDS


def test_among_equal_scores_the_lower_loss_is_given():
    """Nothing is solved at any look, but the tokens come nearer: so does what is given."""
    gaps = Gaps([-9.0, -9.0], [0.01, 0.01])
    strengths, there = gaps.search(limit=100.0, descent=gaps.descent * 50)
    assert len(gaps.looks) > 1
    losses = [Gaps.__call__(gaps, looked)[1] for looked in list(gaps.looks)]
    assert not there.right.any()
    assert gaps(strengths)[1] == min(losses)


def test_a_push_that_gains_nothing_yet_is_doubled():
    gaps = Gaps([-1.0], [1.0])
    gaps.gaps = lambda strengths: torch.where(strengths.double() > 3, strengths.double() - 1, -1.0)
    strengths, there = gaps.search(descent=gaps.descent)
    assert gaps.task.done(there)
    assert [looked.item() / gaps.looks[0].item() for looked in gaps.looks[:3]] == pytest.approx([1, 2, 4])


def test_tokens_that_just_miss_are_pushed_too():
    """Right, but not by the margin: the shortfall is next to nothing and no push would come of it."""
    needed = 2 * torch.atanh(torch.tensor(MARGIN, dtype=torch.float64)).item()
    gaps = Gaps([-1e-7, -2.0], [1.0, 1.0])
    assert gaps.task.shortfall(gaps.before)[0] < 0.05
    strengths, there = gaps.search()
    assert gaps.task.done(there) and there.gap[0] > needed
    assert 0.05 <= strengths[0] < 0.1


def test_a_push_is_made_up_for_where_it_hurts_another_pushed_token():
    others = torch.tensor([[0.0, -0.2], [-0.1, 0.0]])
    gaps = Gaps([-1.0, -2.0], [1.0, 1.0], others=others)
    strengths, there = gaps.search()
    assert gaps.task.done(there)
    alone = gaps.need()
    exact = torch.linalg.solve(torch.diag(gaps.slope) + others.double(), gaps.task.shortfall(gaps.before).double())
    assert (strengths > alone).all() and strengths.norm() < 1.6 * exact.norm()


def test_a_broken_token_that_needs_no_push_yet_gets_one_when_anothers_breaks_it():
    """Slots of a later step: the second token was right before the repair and is right now, by little."""
    gaps = Gaps([-2.0, 0.1], [1.0, 1.0], slots=[0, 1], others=torch.tensor([[0.0, 0.0], [-0.4, 0.0]]))
    assert gaps.task.medium.tolist() == [True, False] and gaps.task.right_before.tolist() == [False, True]
    strengths, there = gaps.search(descent=gaps.descent * 1.5)
    assert gaps.looks[0][1] == 0 and gaps.task.broken(gaps(gaps.looks[0])[0]).tolist() == [False, True]
    assert gaps.task.done(there) and strengths[1] > 0


def test_harm_to_tokens_that_are_not_pushed_counts():
    """Of two strengths that solve the failure, the one that leaves the third token right is given."""
    gaps = Gaps([-1.0, 2.0], [1.0], slots=[0], others=torch.tensor([[0.0], [-0.5]]))
    strengths, there = gaps.search(descent=gaps.descent / 6)
    assert gaps.task.broken(gaps(gaps.looks[0])[0]).any()
    assert gaps.task.done(there) and strengths.item() < 4
