"""The map on a patch's page: each patched module as a strip of its neurons, coloured by how much they were changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..report import ProblemRecord
from .patch_files import Patch

CELLS = 240  # of a strip; a cell stands for several neurons where a module has more
LEVELS = 4  # of colour


@dataclass(frozen=True)
class Strip:
    """One patched module.

    Attributes:
        label: What tells it from the other modules of the map.
        name: Its whole name.
        neurons: How many of its neurons are patched.
        norm: The Frobenius norm of its delta.
        share: That norm over the largest one of the map.
        how: Where in a text the patch acts through it, as the report says ("" if it does not).
        paths: For each level of colour, from faint to strong, the cells as the data of an SVG path, one unit high.
    """

    label: str
    name: str
    neurons: int
    norm: float
    share: float
    how: str
    paths: list[str]


@dataclass(frozen=True)
class Map:
    """All strips, the pattern that their names have in common ("" if none), and the neurons that a strip spans."""

    strips: list[Strip]
    pattern: str
    width: int


def neuron_map(patch: Patch, problems: Sequence[ProblemRecord] = ()) -> Map:
    """The map of a patch; `problems` tell which module acts where."""
    width = max(
        [_width(patch.config), *(int(neurons.max()) + 1 for neurons in patch.neurons.values() if len(neurons))]
    )
    labels, pattern = _labels(list(patch.neurons))
    acts = {layer: act["how"] for problem in problems for act in problem.acts for layer in act["layers"]}
    norms = {name: delta.float().norm(dim=1) for name, delta in patch.deltas.items()}
    largest = max((float(norm.norm()) for norm in norms.values()), default=0.0)
    top = max((float(norm.max()) for norm in norms.values() if len(norm)), default=0.0)
    strips = [
        Strip(
            label=label,
            name=name,
            neurons=len(neurons),
            norm=float(norms[name].norm()),
            share=float(norms[name].norm()) / largest if largest else 0.0,
            how=acts.get(name, ""),
            paths=_paths(neurons, norms[name], width, top),
        )
        for label, (name, neurons) in zip(labels, patch.neurons.items())
    ]
    return Map(strips, pattern, width)


def _paths(neurons: torch.Tensor, norms: torch.Tensor, width: int, top: float) -> list[str]:
    """The cells that hold patched neurons, by the norm of the largest delta in them."""
    cells = min(CELLS, width)
    levels = [0] * cells
    for neuron, norm in zip(neurons.tolist(), norms.tolist()):
        cell = neuron * cells // width
        level = min(LEVELS, 1 + int(LEVELS * math.sqrt(norm / top))) if top else 1  # a few neurons are far ahead
        levels[cell] = max(levels[cell], level)
    return [
        "".join(f"M{cell} 0h1v1h-1z" for cell, found in enumerate(levels) if found == level)
        for level in range(1, LEVELS + 1)
    ]


def _width(config: dict[str, Any]) -> int:
    """The number of neurons of a module, where a patch's configuration says it (0: it does not)."""
    value = config.get("in_features")
    # a stranger's number only sets how wide a strip is taken to be
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else 0


def _labels(names: list[str]) -> tuple[list[str], str]:
    """What tells modules apart, and the rest: names that differ in one part have that for a label."""
    parts = [name.split(".") for name in names]
    if len(names) > 1 and len({len(part) for part in parts}) == 1:
        differing = [place for place in range(len(parts[0])) if len({part[place] for part in parts}) > 1]
        if len(differing) == 1:
            place = differing[0]
            return [part[place] for part in parts], ".".join([*parts[0][:place], "*", *parts[0][place + 1 :]])
    return names, ""


def scale(value: float, lowest: float = -1.0, highest: float = 1.0) -> float:
    """A value as a percentage of the way from `lowest` to `highest`, 0 where it is no number."""
    if not math.isfinite(value):
        return 0.0
    return 100 * (min(max(value, lowest), highest) - lowest) / (highest - lowest)
