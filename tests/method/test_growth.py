"""How far a patch grows: what the rows tell of each other, and what it may cost beside the failures."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_star import RepairArguments, repair
from peft_star.engine.predictions import Predictions
from peft_star.failures import Row, encode_rows
from peft_star.method import bystanders, growth
from peft_star.method.bystanders import Bystanders
from peft_star.method.growth import Growth
from peft_star.method.pushes import Replies
from peft_star.method.subject import HeldLayer
from support.words import QUICK, ROWS, decided, star, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def growing(rows, expected, problems=None):
    """The growth of a patch of one neuron; a failing token, in this row, is wanted to be each of these."""
    problems = problems or [None] * len(rows)
    traced = SimpleNamespace(
        medium=torch.arange(len(rows)),
        rows=lambda: [Row(row, "", "", (0,), (0,), problem=problem) for row, problem in zip(rows, problems)],
        predictions=told([-1.0] * len(rows), expected),
    )
    return Growth.of([HeldLayer("layer", nn.Parameter(torch.zeros(1, 2)), torch.tensor([0]))], traced, None)


def told(gaps, expected=None):
    """Tokens with these gaps."""
    found = Predictions.empty(len(gaps))
    found.gap[:] = torch.tensor(gaps)
    if expected is not None:
        found.expected[:] = torch.tensor(expected)
    return found


def test_tokens_recur_that_another_row_of_the_problem_wants_too():
    assert growing([0, 0, 1, 1], [5, 6, 5, 7]).recurring == {0, 2}
    assert growing([0, 0, 1], [5, 5, 6]).recurring == set()
    assert growing([0, 1, 2, 3], [5, 5, 5, 6], ["a", "b", "a", "b"]).recurring == {0, 2}


def test_of_rows_that_share_tokens_these_grow_and_of_others_all():
    found = growing([0, 0, 1, 1, 2, 2], [5, 6, 5, 7, 8, 9])
    pushes = [SimpleNamespace(change=lambda strengths: strengths[None, :2].clone())]
    nothing = torch.zeros(7, 7, dtype=torch.float64)
    slots = torch.tensor([1, 0, 2, 3, 4, 5, 99])
    found.gains = torch.zeros(3, 100, dtype=torch.float64)
    found.add(pushes, Replies(1.0, torch.ones(7), nothing, nothing), torch.arange(1.0, 8.0), slots)
    assert found._grow(slots).tolist() == [0, 1, 1, 0, 1, 1, 0]
    assert found.changes[0].tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize(
    ("held_out", "gap_now", "needed"),
    [
        # the others would do half of what all do, which is to bring −2 to 2: just enough
        ([0.5, 0.5, 0.5], 2.0, 1.0),
        # a quarter: −1 is left, and as much again would do it
        ([0.25, 0.25, 0.25], 2.0, 2.0),
        # three in four rows are enough, rounded down
        ([0.25, 0.5, 0.0], 2.0, 2.0),
        ([0.5, -0.1, 0.0], 2.0, float("inf")),
        ([0.0, 0.0, 0.0], 2.0, float("inf")),
    ],
)
def test_what_is_needed_is_what_the_others_would_lack(held_out, gap_now, needed):
    found = growing([0, 1, 2], [5, 5, 5])
    own = 3 * torch.eye(3, dtype=torch.float64)
    replies = Replies(1.0, torch.ones(3), own, own * torch.tensor(held_out)[:, None])
    change = [SimpleNamespace(change=lambda strengths: torch.zeros(1, 2))]
    found.add(change, replies, torch.ones(3), torch.arange(3))
    assert found.needed(told([-2.0] * 3), told([gap_now] * 3)) == pytest.approx(needed)


def test_where_nothing_recurs_nothing_is_known():
    found = growing([0, 1], [5, 6])
    assert found.needed(told([-1.0, -1.0]), told([1.0, 1.0])) == float("inf")


def deltas(model):
    return [layer.star_delta["default"] for layer in model.modules() if "default" in getattr(layer, "star_delta", {})]


# several prompts, alike but for a word, after which the same is to be said
ALIKE = [{"prompt": f"w{first} w8 w30 w31", "completion": " w40"} for first in (7, 9, 12, 15)]


def right_after(model, tokenizer, rows):
    """How far the wanted word is ahead of all others behind each of the prompts."""
    gaps = []
    for row in encode_rows(rows, tokenizer):
        logits = model(input_ids=torch.tensor([row.prompt_ids])).logits[0, -1].detach()
        wanted = logits[row.completion_ids[0]].item()
        logits[row.completion_ids[0]] = -torch.inf
        gaps.append(wanted - logits.max().item())
    return gaps


def test_what_is_told_of_a_row_is_what_a_repair_without_it_does(tokenizer, monkeypatch):
    """The prediction in closed form against a real repair that lacks the row."""
    monkeypatch.setattr(growth, "GROWTH", ())
    seen = {}

    def remember(self, before, now):
        scale = (now.gap - before.gap).double().clamp(min=0) / self.gains[0].clamp(min=1e-12)
        seen["gaps"] = before.gap + scale * self.gains[1]
        return float("inf")

    monkeypatch.setattr(Growth, "needed", remember)
    monkeypatch.setattr(bystanders, "FEWEST", 1)
    failing = [row for row, gap in zip(ALIKE, right_after(decided(), tokenizer, ALIKE)) if gap < 0]
    assert len(failing) >= 3
    base = right_after(decided(), tokenizer, failing)
    assert repair(star(), tokenizer, failing, RepairArguments(**QUICK)).success
    foretold = seen["gaps"].tolist()
    for number in range(len(failing)):
        model = star()
        others = [row for other, row in enumerate(failing) if other != number]
        assert repair(model, tokenizer, others, RepairArguments(**QUICK)).success
        (gap,) = right_after(model, tokenizer, [failing[number]])
        gain, told_gain = gap - base[number], foretold[number] - base[number]
        assert gain > 0 and 0.3 * gain < told_gain < 3 * gain


def patched(tokenizer, rows, monkeypatch, needed, disturbed=False):
    """The deltas of a repair whose rows tell each other that so much is needed, where the whole may not grow."""
    monkeypatch.setattr(bystanders, "FEWEST", 1)
    monkeypatch.setattr(Bystanders, "undisturbed", lambda self, engine: self.patience != 1 and not disturbed)
    monkeypatch.setattr(Growth, "needed", lambda self, before, now: needed)
    model = star()
    report = repair(model, tokenizer, rows, RepairArguments(**QUICK))
    assert report.success
    return [delta.detach().clone() for delta in deltas(model)], report


def test_a_patch_grows_by_what_the_rows_need_of_each_other(tokenizer, monkeypatch):
    start, _ = patched(tokenizer, ALIKE, monkeypatch, 1.0)
    grown, _ = patched(tokenizer, ALIKE, monkeypatch, 1.4)
    for delta, ungrown in zip(grown, start):
        torch.testing.assert_close(delta, 1.4 * ungrown, rtol=1e-4, atol=1e-6)
    held, _ = patched(tokenizer, ALIKE, monkeypatch, 1.4, disturbed=True)
    for delta, ungrown in zip(held, start):
        torch.testing.assert_close(delta, ungrown)


def test_what_breaks_as_a_patch_grows_is_made_right_again(tokenizer, monkeypatch):
    """Three times the patch of these rows breaks tokens of theirs."""
    start, once = patched(tokenizer, ROWS, monkeypatch, 1.0)
    grown, again = patched(tokenizer, ROWS, monkeypatch, 3.0)
    assert again.steps > once.steps
    assert sum(map(torch.norm, grown)) > 2 * sum(map(torch.norm, start))
