"""What the benchmarks' pictures share: one look for each method, readable by the colour-blind, and error bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's palette ("Color Universal Design", 2008)
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#666666"

_METHODS = {
    "sgd": ("SGD", VERMILION, "s"),
    "mint": ("MINT", ORANGE, "^"),
    "star": ("STAR", BLUE, "o"),
    "star-general": ("STAR, generalising", VERMILION, "o"),
    "star-paper": ("STAR (Algorithm 1)", SKY, "D"),
    "star-model-wise": ("STAR[model-wise]", BLUE, "X"),
    "star-layer": ("STAR[layer]", GREEN, "v"),
    "star-neuron": ("STAR[neuron]", PURPLE, "P"),
    "logit-bias": ("logit bias", BLACK, "x"),
    "lora": ("LoRA", "#8C6D00", "<"),
    "lora-practice": ("LoRA, usual settings", "#8C6D00", "d"),
    "shira": ("SHiRA", "#7F3C8D", ">"),
    "rome": ("ROME", ORANGE, "p"),
    "memit": ("MEMIT", GREEN, "*"),
    "alphaedit": ("AlphaEdit", PURPLE, "8"),
}
_SPARE = ((GREY, "h"), ("#A05195", "p"), ("#2F4B7C", "8"), ("#665191", "*"))


@dataclass(frozen=True)
class Look:
    """How a method is drawn: its label, colour and marker."""

    label: str
    color: str
    marker: str

    @property
    def keywords(self) -> dict[str, Any]:
        """For `Axes.plot` and `Axes.errorbar`."""
        return {"label": self.label, "color": self.color, "marker": self.marker}


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """The look of each method by name; names that are not among the benchmarks' methods get spare ones in turn."""
    unknown = [name for name in methods if name not in _METHODS]
    spare = {name: (name, *_SPARE[number % len(_SPARE)]) for number, name in enumerate(unknown)}
    return {name: Look(*(_METHODS.get(name) or spare[name])) for name in methods}


def label(method: str) -> str:
    """What tables and legends call a method."""
    return looks([method])[method].label


@contextmanager
def drawing() -> Iterator[Any]:
    """`matplotlib.pyplot` with the benchmarks' style, drawing to files only.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("Pictures need matplotlib; pip install 'peft-star[plot]'.") from None
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    style = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
        "lines.markersize": 6,
        "errorbar.capsize": 2,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 140,
    }
    with plt.rc_context(style):
        yield plt


def save(figure: Any, path: Path) -> None:
    """Write a picture; the file at `path` is replaced only when the new one is complete."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp.{path.name}")
    figure.savefig(temporary)
    plt.close(figure)
    temporary.replace(path)


def offsets(low_high: Sequence[tuple[float, float]], middle: Sequence[float]) -> list[list[float]]:
    """Intervals as `Axes.errorbar` wants them: distances below and above the middle."""
    below = [max(0.0, m - low) for (low, _), m in zip(low_high, middle)]
    above = [max(0.0, high - m) for (_, high), m in zip(low_high, middle)]
    return [below, above]


def bootstrap(
    cases: Any, statistic: Callable[[np.ndarray], float], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over cases (rows of a table, repairs).

    Args:
        cases: Array whose first axis is resampled, shape (n, ...).
        statistic: From such an array to a number.
        seed, resamples, level: Of the bootstrap.

    Returns:
        `tuple[float, float]`: The interval; two NaNs when there are fewer than two cases.
    """
    cases = np.asarray(cases, dtype=float)
    if len(cases) < 2:
        return float("nan"), float("nan")
    chosen = np.random.default_rng(seed).integers(len(cases), size=(resamples, len(cases)))
    values = [statistic(cases[index]) for index in chosen]
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def with_interval(figures: Mapping[str, Any], name: str, form: str) -> str:
    """`figures[name]` with its interval `figures[name_interval]` in brackets, if there is one."""
    value, (low, high) = figures[name], figures[f"{name}_interval"]
    return f"{value:{form}}" if np.isnan(low) else f"{value:{form}} [{low:{form}}, {high:{form}}]"
