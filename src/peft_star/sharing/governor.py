"""The governor: how a patch grows over its repairs, and whether it still grows as it should.

A sound patch grows in step with its load: pushes that have nothing to do with each other add up in squares, so the
square of its norm, and with it the divergence on other text, grows like the number of failing tokens. A patch near its
capacity does not: its pushes work against earlier ones and have to outdo them, so each failing token costs more than
those before, and what the patch does elsewhere grows with it. That shows before anything falls apart.

The rule, of each measure: it is out of line when it grew by `FACTOR` times as much as the number of failing tokens
over the last `RECENT` repairs, with at least `EARLIER` before them. So a patch is told of that doubles with three
repairs of a few tokens, and one is not that has doubled because it repairs twice as much. The norm speaks only where
no measure of harm does: it hints at harm, and differs between kinds of pushes that do as little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .ledger import Ledger

RECENT, EARLIER, FACTOR = 3, 6, 2.0
NORM = "norm"
# of what an entry's `harm` has, what grows with the damage
HARM = ("kl", "changed_share")
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

    def pace(self) -> float | None:
        """By how much the measure (the norm in squares) grew over the last repairs, relative to the number of failing
        tokens: 1 where they grew alike. None where there is too little to tell."""
        if len(self.values) < EARLIER + RECENT:
            return None
        power = 2 if self.measure == NORM else 1
        before, now = self.values[-RECENT - 1] ** power, self.values[-1] ** power
        load_before, load = sum(self.tokens[:-RECENT]), sum(self.tokens)
        return now / before * load_before / load if before > 0 and load_before > 0 else None

    @property
    def out_of_line(self) -> bool:
        """Whether the measure grows as it should not."""
        pace = self.pace()
        return pace is not None and pace >= FACTOR

    def warning(self) -> str:
        """What is out of line, and what to do."""
        return (
            f"The {self.measure} of the patch grew from {self.values[-RECENT - 1]:.3g} to {self.values[-1]:.3g} over "
            f"the last {RECENT} repairs, which solve {sum(self.tokens[-RECENT:])} of its {sum(self.tokens)} failing "
            "tokens: it nears what it can hold. Take repairs out (`peft-star revert`), or begin another patch."
        )

    def sparkline(self, width: int = 40) -> str:
        """The values as a line of bars from 0 up, the last `width` of them."""
        shown, top = self.values[-width:], max(self.values, default=0.0)
        last = len(BARS) - 1
        return "".join(BARS[min(last, max(0, round(last * value / top)))] if top > 0 else BARS[0] for value in shown)


def curves(ledger: Ledger) -> list[Curve]:
    """The norm, and each measure of `HARM` that two entries or more have."""
    entries = [entry for entry in ledger.standing if NORM in entry.patch]
    found = [_curve(NORM, [(entry, entry.patch[NORM]) for entry in entries])]
    for measure in HARM:
        found.append(_curve(measure, [(entry, entry.harm[measure]) for entry in entries if measure in entry.harm]))
    return [curve for curve in found if len(curve.values) > 1]


def _curve(measure: str, points: Sequence[tuple]) -> Curve:
    counts = [entry.summary.get("failures", 0) for entry, _ in points]
    tokens = tuple(count if isinstance(count, int) else 0 for count in counts)
    return Curve(measure, tuple(entry.id for entry, _ in points), tuple(float(v) for _, v in points), tokens)


def warnings_of(ledger: Ledger) -> list[str]:
    """A sentence for each measure that grows out of line."""
    found = [curve for curve in curves(ledger) if curve.pace() is not None]
    harm = [curve for curve in found if curve.measure != NORM]
    return [curve.warning() for curve in harm or found if curve.out_of_line]
