"""What a patch has to reach, against probabilities computed from logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_star.engine.predictions import Predictions
from peft_star.method.objective import Task

MARGINS = [0.0, 0.01, 0.5, 0.95]


def predictions(logits, expected):
    """The model's word at S tokens, from logits (S, V), the plain way."""
    logits, expected = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(expected)
    p = logits.softmax(-1)
    at = torch.arange(len(expected))
    others = logits.clone()
    others[at, expected] = -torch.inf
    rival = others.argmax(-1)
    margin, gap = p[at, expected] - p[at, rival], logits[at, expected] - logits[at, rival]
    return Predictions(expected, logits.argmax(-1), rival, margin.float(), gap.float(), p[at, expected].float())


def two_tokens(gap, share, others=2000):
    """Logits of tokens of which the first is `gap` above the second, and both have `share` of the probability."""
    pair = torch.tensor([gap, 0.0], dtype=torch.float64)
    rest = pair.logsumexp(0) + torch.tensor((1 - share) / share / others, dtype=torch.float64).log()
    return [*pair.tolist(), *[rest.item()] * others]


def five(margin=0.5):
    """Five tokens, the first of which is expected: solved, short of the margin, wrong, right, broken."""
    before = predictions([[0, 3, 0], [0, 3, 0], [0, 3, 0], [3, 0, 0], [3, 0, 0]], [0] * 5)
    now = predictions([[3, 0, 0], [1, 0.5, 0], [0, 3, 0], [1, 0.5, 0], [0, 3, 0]], [0] * 5)
    return Task.of(torch.tensor([0, 1, 2]), before, margin), before, now


def test_what_is_wanting_broken_and_counted():
    task, before, now = five()
    assert task.medium.tolist() == [True, True, True, False, False]
    assert task.right_before.tolist() == [False, False, False, True, True]
    # a token that was right need not keep a margin
    assert task.wanting(now).tolist() == [False, True, True, False, True]
    assert task.broken(now).tolist() == [False, False, False, False, True]
    assert task.wanting(before).tolist() == [True, True, True, False, False]
    assert task.score(now) == (2, -1, 1)
    assert task.score(now, harmed=3) == (2, -4, 1)
    assert not task.done(now)


def test_a_task_is_done_when_every_failure_has_its_margin_and_nothing_is_broken():
    task, _, _ = five()
    good, short, wrong = [3, 0, 0], [1, 0.5, 0], [0, 3, 0]
    assert task.done(predictions([good, good, good, short, short], [0] * 5))
    assert not task.done(predictions([good, good, short, good, good], [0] * 5))
    assert not task.done(predictions([good, good, good, good, wrong], [0] * 5))


def test_no_token_is_both_a_failure_and_to_be_kept():
    """A failure may be right before a step, as those of single mode that come up again."""
    before = predictions([[3, 0, 0], [3, 0, 0]], [0, 0])
    task = Task.of(torch.tensor([0]), before, 0.01)
    assert task.medium.tolist() == [True, False] and task.right_before.tolist() == [False, True]


def test_a_token_that_failed_and_is_no_task_of_this_repair_may_stay_wrong():
    before = predictions([[0, 3, 0], [0, 3, 0]], [0, 0])
    task = Task.of(torch.tensor([1]), before, 0.01)
    assert task.done(predictions([[0, 3, 0], [3, 0, 0]], [0, 0]))


def test_scores_rank_failures_before_harm_and_harm_before_margins():
    task, _, _ = five()
    good, short, wrong = [3, 0, 0], [1, 0.5, 0], [0, 3, 0]

    def score(*logits):
        return task.score(predictions(logits, [0] * 5))

    assert score(short, short, short, wrong, wrong) > score(good, good, wrong, good, good)
    assert score(short, short, short, good, good) > score(good, good, good, good, wrong)
    assert score(good, good, good, good, good) > score(good, good, short, good, good)


@settings(max_examples=200, deadline=None)
@given(
    margin=st.sampled_from(MARGINS),
    share=st.floats(0.05, 0.999),
    gap=st.floats(-4, 4),
)
def test_the_shortfall_says_whether_the_margin_is_met(margin, share, gap):
    """Where expected token and rival hold enough of the probability, its sign is the sign of the missing margin."""
    now = predictions([two_tokens(gap, share)], [0])
    assert now.rival[0] == 1
    shortfall = Task.of(torch.tensor([0]), now, margin).shortfall(now)[0].item()
    enough = min((1 + margin) / 2, 2 * margin)
    if share > enough + 1e-6:
        needed = 2 * torch.atanh(torch.tensor(margin / share, dtype=torch.float64)).item()
        assert shortfall == pytest.approx(needed - gap, abs=1e-3 * (1 + abs(needed)))
        met = predictions([two_tokens(needed, share)], [0])
        assert met.margin[0].item() == pytest.approx(margin, abs=1e-5)
    else:
        assert shortfall == pytest.approx(2 * torch.atanh(torch.tensor(margin / enough)).item() - gap, abs=1e-3)
    if shortfall < -1e-2 and share > enough:
        assert now.margin[0] > margin
    if shortfall > 1e-2:
        assert now.margin[0] <= margin


@pytest.mark.parametrize("margin", MARGINS)
def test_the_shortfall_vanishes_exactly_at_the_margin(margin):
    needed = 2 * torch.atanh(torch.tensor(margin / 0.99, dtype=torch.float64)).item()
    now = predictions([two_tokens(needed + change, 0.99) for change in (-0.01, 0, 0.01)], [0] * 3)
    task = Task.of(torch.arange(3), now, margin)
    below, at, above = task.shortfall(now).tolist()
    assert at == pytest.approx(0, abs=1e-4)
    assert below == pytest.approx(0.01, abs=1e-4) and above == pytest.approx(-0.01, abs=1e-4)
    assert not now.solved(margin)[0] and now.solved(margin)[2]


@pytest.mark.parametrize("margin", MARGINS)
def test_shortfalls_are_finite_where_the_tokens_have_no_probability(margin):
    now = predictions([[-90.0, 0.0, 100.0], [-90.0, 60.0, 60.0], [100.0, 0.0, 0.0]], [0] * 3)
    shortfall = Task.of(torch.arange(3), now, margin).shortfall(now)
    assert torch.isfinite(shortfall).all()
    assert (shortfall[:2] > 0).all() and shortfall[2] < 0


def test_a_margin_of_zero_asks_for_a_positive_gap():
    now = predictions([[0.3, 0.0, -1.0], [-0.3, 0.0, -1.0]], [0, 0])
    torch.testing.assert_close(Task.of(torch.arange(2), now, 0.0).shortfall(now), -now.gap)
