"""Changes of a patch: exact sums, a short form where there is one, and nothing from a file that is no change."""

from __future__ import annotations

import pytest
import torch

from peft_star.sharing import changes
from peft_star.sharing.changes import NEURONS, add, difference, norm, pack, subtract, unpack

NAME = "layer"


def low_rank(k=40, d=30, rank=3):
    torch.manual_seed(0)
    return torch.arange(k) * 2, torch.randn(k, rank) @ torch.randn(rank, d)


def test_a_change_of_few_tokens_is_kept_as_factors() -> None:
    neurons, delta = low_rank()
    packed = pack((neurons, delta))
    assert {name: tuple(part.shape) for name, part in packed.items()} == {
        "neurons": (40,),
        "left": (40, 3),
        "right": (3, 30),
    }
    again = unpack(packed)
    assert torch.equal(again[0], neurons)
    assert (again[1] - delta).norm() <= 2e-6 * delta.norm()


def test_rounding_of_larger_deltas_is_no_part_of_a_change() -> None:
    neurons, delta = low_rank()
    torch.manual_seed(1)
    before = torch.randn(40, 30) * 1000
    after = before + delta
    change = difference({NAME: (neurons, after)}, {NAME: (neurons, before)})[NAME]
    assert set(pack(change)) == {"neurons", "delta"}  # of full rank, by rounding
    packed = pack(change, norm({NAME: (neurons, after)}))
    assert packed["left"].shape == (40, 3)
    assert (unpack(packed)[1] - change[1]).norm() <= 2e-6 * after.norm()
    assert difference({NAME: (neurons, before * (1 + 1e-7))}, {NAME: (neurons, before)}) == {}


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e10])
def test_any_other_change_is_kept_as_it_is(scale: float) -> None:
    torch.manual_seed(0)
    change = torch.arange(7), torch.randn(7, 5) * scale
    packed = pack(change)
    assert set(packed) == {"neurons", "delta"}
    assert torch.equal(unpack(packed)[1], change[1])


def test_sums_are_on_the_union_of_the_neurons() -> None:
    a = {NAME: (torch.tensor([1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))}
    b = {NAME: (torch.tensor([0, 4]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])), "other": a[NAME]}
    whole = add([a, b])
    assert whole[NAME][0].tolist() == [0, 1, 4] and whole[NAME][1].tolist() == [[5, 6], [1, 2], [10, 12]]
    assert whole["other"][1].tolist() == a[NAME][1].tolist()
    back = difference(whole, b)
    # what did not change is left out
    assert set(back) == {NAME} and back[NAME][0].tolist() == [1, 4] and torch.equal(back[NAME][1], a[NAME][1])
    assert norm(a) == pytest.approx(30**0.5) and norm({}) == 0


def test_what_is_taken_off_leaves_no_neuron_that_only_it_held() -> None:
    torch.manual_seed(0)
    first, second = (torch.arange(6), torch.randn(6, 3)), (torch.arange(4, 9), torch.randn(5, 3))
    patch = add([{NAME: first}, {NAME: second}])
    patch = {NAME: (patch[NAME][0], patch[NAME][1].float())}
    rest = subtract(patch, {NAME: first}, {NAME: second[0]})
    assert rest[NAME][0].tolist() == second[0].tolist() and rest[NAME][1].dtype == torch.float32
    torch.testing.assert_close(rest[NAME][1], second[1])
    # a module keeps a neuron, so that it stays one that a patch can name
    nothing = subtract(rest, {NAME: second, "elsewhere": first}, {})
    assert len(nothing[NAME][0]) == 1 and not nothing[NAME][1].any() and set(nothing) == {NAME}


def change(**parts):
    return {**pack(low_rank()), **parts}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"delta": torch.zeros(40, 30)}, "in the place of neurons and a delta"),
        ({NEURONS: torch.arange(40)}, "no vector of indices"),
        ({NEURONS: torch.arange(39, dtype=torch.int32)}, "do not belong together"),
        ({NEURONS: torch.arange(-1, 39, dtype=torch.int32)}, "neurons that cannot be"),
        ({NEURONS: torch.zeros(40, dtype=torch.int32)}, "neurons that cannot be"),
        ({"left": torch.zeros(40, 3).long()}, "no matrix in float32"),
        ({"left": torch.zeros(40)}, "no matrix in float32"),
        ({"right": torch.zeros(4, 30)}, "do not belong together"),
        ({"right": torch.full((3, 30), torch.nan)}, "not finite"),
    ],
)
def test_what_is_no_change_is_refused(parts, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpack(change(**parts))


def test_small_factors_cannot_fill_the_memory(monkeypatch) -> None:
    count = 1 << 15
    parts = {
        NEURONS: torch.arange(count, dtype=torch.int32),
        "left": torch.ones(count, 1),
        "right": torch.ones(1, count),
    }
    with pytest.raises(ValueError, match="larger than any repair"):
        unpack(parts)
    monkeypatch.setattr(changes, "MOST_NUMBERS", 40 * 30)
    assert unpack(change())[1].shape == (40, 30)
