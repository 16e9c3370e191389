"""What a patch has to reach, against probabilities computed from logits; and the loss, against autograd."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_star.engine.engine import Engine
from peft_star.engine.passes import predict
from peft_star.engine.predictions import Predictions
from peft_star.failures import encode_rows
from peft_star.method.objective import Goal, Task, differentiate
from peft_star.method.verify import Case
from support.words import LAYERS, ROWS, decided, own_continuations, word_tokenizer

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
    assert not task.done(now)


def test_harm_to_retained_rows_counts_as_that_to_the_failures_own():
    """Their slots lie behind."""
    _, before, now = five()
    right, wrong = predictions([[3, 0, 0]] * 3, [0] * 3), predictions([[0, 3, 0]] * 3, [0] * 3)
    task = Task.of(torch.tensor([0, 1, 2]), Predictions.join(before, right), 0.5)
    assert task.score(Predictions.join(now, wrong)) == (2, -4, 1)
    assert task.score(Predictions.join(now, right)) == (2, -1, 1)
    solved = predictions([[3, 0, 0]] * 5, [0] * 5)
    assert task.done(Predictions.join(solved, right)) and not task.done(Predictions.join(solved, wrong))


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


# a goal's looks


def goal_of(max_tokens=1):
    """A model, and the goal of its failures in ROWS with two retained rows, a batch each."""
    model, tokenizer = decided(), word_tokenizer()
    model.requires_grad_(False)
    engine = Engine(model, max_tokens)
    case = Case.of(engine, encode_rows(ROWS, tokenizer), encode_rows(own_continuations(tokenizer)[:2], tokenizer))
    before = predict(engine, [*case.batches, *case.retained_batches], case.nothing_seen())
    own = case.parts["failures"][1].stop
    failures = (~before.right[:own]).nonzero()[:, 0]
    assert len(failures) > 1 and before.right[own:].all()
    return engine, Goal(case.batches, case.retained_batches, Task.of(failures, before, 0.01), before)


def same(one, other):
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


@torch.no_grad()
def breaking(engine, goal):
    """Silence a word that the first of the retained rows needs, and nothing else does."""
    words = [set(batch.expected.tolist()) for batch in goal.unwatched]
    (word, *_) = words[0] - words[1]
    engine.model.lm_head.weight[word] = 0
    return goal.unwatched[0]


def test_what_is_not_looked_at_is_taken_to_be_as_it_was():
    engine, goal = goal_of()
    before = goal.before.copy()
    broken = breaking(engine, goal)
    here, _ = goal.look(engine)
    assert not goal.task.broken(here).any()
    assert torch.equal(here.gap[broken.slots], before.gap[broken.slots])
    assert same(goal.before, before)


def test_rows_that_broke_are_watched_from_then_on():
    engine, goal = goal_of()
    before = goal.before.copy()
    first = breaking(engine, goal)
    here, loss = goal.look(engine)
    looked = here.copy()
    now, broken = goal.look_at_the_rest(engine, here)
    assert broken == (first,)
    # what is found is told of, and neither the state at hand nor that before is written to
    harmed = goal.task.broken(now)
    assert harmed[first.slots].any() and int(harmed.sum()) == int(harmed[first.slots].sum())
    assert same(here, looked) and same(goal.before, before)
    watching = goal.watching(broken)
    assert watching.batches == (*goal.batches, first) and watching.unwatched == goal.unwatched[1:]
    assert watching.task is goal.task and watching.before is goal.before
    there, more = watching.look(engine)
    assert torch.equal(goal.task.broken(there), harmed)
    # what broke is at stake, and what did not is not
    assert more == pytest.approx(loss - now.p_expected[harmed].log().sum().item(), rel=1e-4)
    assert same(goal.before, before)
    # from now on, nothing else is new
    assert watching.look_at_the_rest(engine, there)[1] == ()
    assert goal.watching(()) == goal


def test_whole_rows_are_no_reason_to_watch_them():
    engine, goal = goal_of()
    here, _ = goal.look(engine)
    now, broken = goal.look_at_the_rest(engine, here)
    assert broken == () and same(now, here)


def losses_by_hand(engine, batch, chosen):
    """Cross entropy summed over the chosen slots of a batch, from the logits at all positions."""
    logits = engine.model(**batch.model_inputs()).logits[batch.rows, batch.positions]
    mask = torch.isin(batch.slots, chosen)
    return F.cross_entropy(logits[mask], batch.expected[mask], reduction="sum")


def gradient_of(engine, loss):
    weight = engine.model.get_submodule(LAYERS[1]).weight
    (gradient,) = torch.autograd.grad(loss, weight)
    return gradient


@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_the_loss_and_its_gradient_are_those_of_the_failures(max_tokens):
    engine, goal = goal_of(max_tokens)
    weight = engine.model.get_submodule(LAYERS[1]).weight.requires_grad_(True)
    failures = goal.task.medium.nonzero()[:, 0]
    wanted = sum(losses_by_hand(engine, batch, failures) for batch in goal.batches)
    _, loss = goal.look(engine)
    assert loss == pytest.approx(wanted.item(), rel=1e-4) and weight.grad is None
    _, again = goal.look(engine, differentiate=True)
    assert again == pytest.approx(loss, rel=1e-6)
    gradient = gradient_of(engine, wanted)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    # gradients add up
    goal.look(engine, differentiate=True)
    torch.testing.assert_close(weight.grad, 2 * gradient, rtol=1e-3, atol=2e-4 * gradient.abs().max().item())


def test_a_batch_that_is_solved_asks_for_nothing_and_comes_back():
    engine, goal = goal_of()
    weight = engine.model.get_submodule(LAYERS[1]).weight.requires_grad_(True)
    # as if no failure of the first batch were one: it says what is expected of it
    first, *others = goal.batches
    said = goal.before.argmax[first.slots]
    kept, first.expected = first.expected, said
    failures = goal.task.medium.nonzero()[:, 0]
    here, loss = goal.look(engine, differentiate=True)
    assert here.right[first.slots].all()
    # its loss is still told
    everything = sum(losses_by_hand(engine, batch, failures) for batch in goal.batches)
    assert loss == pytest.approx(everything.item(), rel=1e-4)
    gradient = gradient_of(engine, sum(losses_by_hand(engine, batch, failures) for batch in others))
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    weight.grad, first.expected = None, kept
    goal.look(engine, differentiate=True)
    gradient = gradient_of(engine, sum(losses_by_hand(engine, batch, failures) for batch in goal.batches))
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_any_slots_can_be_differentiated():
    engine, goal = goal_of()
    weight = engine.model.get_submodule(LAYERS[1]).weight.requires_grad_(True)
    batches = [*goal.unwatched, *goal.batches]
    chosen = torch.tensor([0, len(goal.before.right) - 1])
    wanted = torch.zeros_like(goal.before.right)
    wanted[chosen] = True
    differentiate(engine, batches, wanted)
    gradient = gradient_of(engine, sum(losses_by_hand(engine, batch, chosen) for batch in batches))
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    weight.grad = None
    differentiate(engine, batches, torch.zeros_like(wanted))
    assert weight.grad is None


def test_gaps_ask_for_more_than_the_margin():
    now = Predictions.empty(3)
    now.expected[:], now.argmax[:] = 5, 5
    now.p_expected[:], now.margin[:], now.gap[:] = 0.9, 0.85, torch.tensor([1.0, 2.0, 3.0])
    plain = Task.of(torch.tensor([0, 1]), now, 0.01)
    wide = Task.of(torch.tensor([0, 1]), now, 0.01, torch.tensor([1.5, 1.5, 9.0]))
    assert plain.done(now) and plain.num_solved(now) == 2
    # of tokens that are no failures no gap is asked for
    assert wide.wanting(now).tolist() == [True, False, False] and wide.num_solved(now) == 1
    assert wide.done_by_margin(now) and not wide.done(now)
    torch.testing.assert_close(wide.shortfall(now), torch.tensor([0.5, -0.5, 6.0]))
    assert (plain.shortfall(now) < 0).all()
