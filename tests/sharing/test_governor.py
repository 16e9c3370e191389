"""The governor speaks when a patch grows faster than it used to, and not before."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from peft_star.sharing.governor import EARLIER, RECENT, curves, warnings_of
from peft_star.sharing.ledger import Ledger
from support.ledgers import grown


def test_pushes_that_add_up_in_squares_grow_evenly() -> None:
    for count in range(1, 31):
        ledger = grown("norm", [math.sqrt(n) for n in range(1, count + 1)])
        assert warnings_of(ledger) == []
        assert [curve.pace() for curve in curves(ledger)] in ([], [None], [pytest.approx(1.0)])


def test_a_norm_that_doubles_with_each_repair_is_told_before_it_is_large() -> None:
    even = [math.sqrt(n) for n in range(1, 11)]
    sizes = [*even]
    while not warnings_of(grown("norm", sizes)):
        sizes.append(2 * sizes[-1])
    assert len(sizes) - len(even) == 1  # at once
    (told,) = warnings_of(grown("norm", sizes))
    assert told.startswith("The norm of the patch grew from 2.83 to 6.32 over the last 3 repairs")
    assert "which solve 3 of its 11 failing tokens" in told and "peft-star revert" in told


@pytest.mark.parametrize(("factor", "warns"), [(1.9, False), (2.1, True)])
def test_harm_out_of_line_is_told(factor: float, warns: bool) -> None:
    values = [0.01 * n for n in range(1, 10)]
    values += [values[-1], values[-1], factor * values[-1] * 12 / 9]
    found = {curve.measure: curve for curve in curves(grown("kl", values))}
    assert found["kl"].pace() == pytest.approx(factor) and found["kl"].out_of_line is warns
    assert len(warnings_of(grown("kl", values))) == warns


def test_a_hard_repair_among_many_is_no_alarm() -> None:
    even = [0.01 * n for n in range(1, 13)]
    assert warnings_of(grown("kl", [*even, 0.2])) == []
    assert len(warnings_of(grown("kl", [*even, 0.3]))) == 1
    assert len(warnings_of(grown("kl", [*even, 0.3, 0.31, 0.32]))) == 1
    assert warnings_of(grown("kl", [*even, 0.3, 0.31, 0.32, 0.33])) == []  # it goes on as it did


def test_a_patch_that_repairs_twice_as_much_may_be_twice_as_large() -> None:
    even, large = grown("kl", [0.01 * n for n in range(1, 9)]), grown("kl", [0.18, 0.3, 0.4], tokens=15)
    joined = Ledger((*even.entries, *large.entries))
    assert warnings_of(joined) == []


def test_where_harm_is_measured_the_norm_says_nothing() -> None:
    norms = grown("norm", [1.0] * 9 + [10.0])
    assert len(warnings_of(norms)) == 1
    even = [replace(entry, harm={"kl": 0.01 * n}) for n, entry in enumerate(norms.entries, start=1)]
    assert warnings_of(Ledger(tuple(even))) == []


def test_too_few_repairs_tell_nothing() -> None:
    sizes = [1.0] * (EARLIER + RECENT - 2) + [100.0]
    (curve,) = curves(grown("norm", sizes))
    assert curve.pace() is None and not curve.out_of_line
    assert curves(grown("norm", [1.0])) == [] and warnings_of(Ledger()) == []


def test_a_curve_is_drawn_from_zero() -> None:
    (curve,) = curves(grown("norm", [1.0, 4.0, 8.0]))
    assert curve.sparkline() == "▂▅█" and curve.sparkline(2) == "▅█"
    (flat,) = curves(grown("norm", [0.0, 0.0]))
    assert flat.sparkline() == "▁▁"


def test_what_was_taken_out_is_on_no_curve() -> None:
    ledger = grown("norm", [1.0, 50.0, 2.0])
    (curve,) = curves(ledger.revert(ledger.entries[1]))
    assert curve.values == (1.0, 2.0)
