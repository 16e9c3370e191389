"""The governor: how a patch grows over its repairs, and whether it still grows as it should.

A sound patch grows evenly: pushes that have nothing to do with each other add up in squares, so the square of its
norm, and with it the divergence on other text, grows by about the same amount with each failing token. A patch near
its capacity does not: its pushes work against earlier ones and have to outdo them, so each failing token costs more
than those before, and what the patch does elsewhere grows with it. That shows before anything falls apart.

The rule, of each measure: over the last `RECENT` repairs it grew by more than `FACTOR` times as much for each failing
token as it typically did (the median) over the repairs before, of which there are at least `EARLIER`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .ledger import Ledger

RECENT, EARLIER, FACTOR = 3, 4, 3.0
NORM = "norm"
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """One measure over the standing entries that have it.

    Attributes:
        measure: "norm", or what the entries' `harm` calls it.
        ids: The entries.
        values: The measure behind each of them.
        tokens: The failing tokens of each.
    """

    measure: str
    ids: tuple[str, ...]
    values: tuple[float, ...]
    tokens: tuple[int, ...]

    def growth(self) -> list[float]:
        """By how much the measure grew with each entry, for each failing token; the norm in squares."""
        power = 2 if self.measure == NORM else 1
        sizes = [0.0, *(value**power for value in self.values)]
        return [(new - old) / max(1, count) for old, new, count in zip(sizes, sizes[1:], self.tokens)]

    def pace(self) -> float | None:
        """How many times as fast as it used to be the growth is now, or None where there is too little to tell."""
        growth = self.growth()
        if len(growth) < EARLIER + RECENT:
            return None
        usual = median(growth[:-RECENT])
        recent = sum(growth[-RECENT:]) / RECENT
        return recent / usual if usual > 0 else None

    @property
    def out_of_line(self) -> bool:
        pace = self.pace()
        return pace is not None and pace > FACTOR

    def sparkline(self, width: int = 40) -> str:
        """The values as a line of bars from 0 up, the last `width` of them."""
        shown, top = self.values[-width:], max(self.values, default=0.0)
        last = len(BARS) - 1
        return "".join(BARS[min(last, max(0, round(last * value / top)))] if top > 0 else BARS[0] for value in shown)


def curves(ledger: Ledger) -> list[Curve]:
    """The norm, and each measure of harm that two entries or more have."""
    entries = [entry for entry in ledger.standing if NORM in entry.patch]
    found = [_curve(NORM, [(entry, entry.patch[NORM]) for entry in entries])]
    for measure in dict.fromkeys(name for entry in entries for name in entry.harm):
        found.append(_curve(measure, [(entry, entry.harm[measure]) for entry in entries if measure in entry.harm]))
    return [curve for curve in found if len(curve.values) > 1]


def _curve(measure: str, points: Sequence[tuple]) -> Curve:
    counts = [entry.summary.get("failures", 0) for entry, _ in points]
    tokens = tuple(count if isinstance(count, int) else 0 for count in counts)
    return Curve(measure, tuple(entry.id for entry, _ in points), tuple(float(v) for _, v in points), tokens)


def warnings_of(ledger: Ledger) -> list[str]:
    """A sentence for each measure that grows out of line."""
    return [
        f"The {curve.measure} of the patch grew {curve.pace():.1f} times as fast over the last {RECENT} repairs as it "
        "used to (for each failing token): it nears what it can hold. Take out repairs that are no longer needed "
        "(`peft-star revert`), or begin another patch."
        for curve in curves(ledger)
        if curve.out_of_line
    ]
