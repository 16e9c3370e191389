"""The governor speaks when a patch grows faster than it used to, and not before."""

from __future__ import annotations

import math

import pytest

from peft_star.sharing.governor import EARLIER, RECENT, curves, warnings_of
from peft_star.sharing.ledger import Ledger
from support.ledgers import grown


def test_pushes_that_add_up_in_squares_grow_evenly() -> None:
    (curve,) = curves(grown("norm", [math.sqrt(n) for n in range(1, 31)]))
    assert curve.pace() == pytest.approx(1.0) and not curve.out_of_line
    assert warnings_of(grown("norm", [math.sqrt(n) for n in range(1, 31)])) == []


def test_a_norm_that_doubles_with_each_repair_is_told_before_it_is_large() -> None:
    even = [math.sqrt(n) for n in range(1, 11)]
    sizes = [*even]
    while not warnings_of(grown("norm", sizes)):
        sizes.append(2 * sizes[-1])
    assert len(sizes) - len(even) == 1  # at once
    (told,) = warnings_of(grown("norm", sizes))
    assert told.startswith("The norm of the patch grew") and "peft-star revert" in told


@pytest.mark.parametrize(("factor", "warns"), [(2.9, False), (3.1, True)])
def test_harm_out_of_line_is_told(factor: float, warns: bool) -> None:
    values = [0.01 * n for n in range(1, 9)]
    for _ in range(RECENT):
        values.append(values[-1] + 0.01 * factor)
    found = {curve.measure: curve for curve in curves(grown("kl", values))}
    assert found["kl"].pace() == pytest.approx(factor) and found["kl"].out_of_line is warns
    assert len(warnings_of(grown("kl", values))) == warns


def test_many_tokens_at_once_are_no_alarm() -> None:
    """Growth counts by failing token."""
    even, large = grown("kl", [0.01 * n for n in range(1, 9)]), grown("kl", [0.09, 0.1, 0.2], tokens=10)
    joined = Ledger((*even.entries, *large.entries))
    assert warnings_of(joined) == []


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
