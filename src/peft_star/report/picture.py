"""A report as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .records import FailureRecord, Labels, PatchedLayer

SHOWN_FAILURES = 40


def draw(
    path: str | os.PathLike, failures: Sequence[FailureRecord], layers: Sequence[PatchedLayer], labels: Labels
) -> None:
    """Draw each failing token's probability gap before and after, and the size of the patch in each layer.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("Plots need matplotlib; pip install 'peft-star[plot]'.") from None
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    shown = failures[:SHOWN_FAILURES]
    height = max(3.0, 1.2 + 0.22 * max(len(shown), len(layers)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), width_ratios=(3, 2), layout="constrained")
    for number, item in enumerate(shown):
        color = "tab:green" if item.solved else "tab:red"
        left.plot([item.gap_before, item.gap_after], [number, number], color=color, alpha=0.5, zorder=1)
        left.scatter([item.gap_before], [number], color="tab:gray", s=18, zorder=2)
        left.scatter([item.gap_after], [number], color=color, s=18, zorder=2)
    left.axvline(0, color="black", linewidth=0.8)
    texts = [_label(f"{labels['failures', item.row]}: {item.before} → {item.expected}") for item in shown]
    left.set_yticks(range(len(shown)), texts)
    left.tick_params(axis="y", labelsize=7)
    left.invert_yaxis()
    left.set_xlabel("p(expected) − largest other probability: before (gray), after")
    more = len(failures) - len(shown)
    solved = sum(item.solved for item in failures)
    left.set_title(f"{solved} of {len(failures)} failing tokens solved" + (f" ({more} not shown)" if more else ""))
    right.barh(range(len(layers)), [item.delta_norm for item in layers], color="tab:blue")
    right.set_yticks(range(len(layers)), [_label(f"{item.name} ({len(item.neurons)})", 44) for item in layers])
    right.tick_params(axis="y", labelsize=7)
    right.invert_yaxis()
    right.set_xlabel("norm of the delta")
    right.set_title(f"{sum(len(item.neurons) for item in layers)} neurons in {len(layers)} layers")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(text: str, width: int = 34) -> str:
    # matplotlib reads a pair of dollar signs as mathematics
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$")
    return text if len(text) <= width else text[: width - 1] + "…"
