"""Locating "buggy neurons": the layers, then the neurons in them (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tuner.config import AUTO_NEURONS
from ..tuner.layer import count_of
from .attribution import exact_occlusion, rank_agreement
from .subject import Run
from .trace import Trace

# Measured with 82 failing tokens: of 40 texts beside them 16 stay with 256 neurons, 23 with 768, 24 with all 1,536.
NEURONS_PER_FAILURE = 8


def locate(run: Run, traced: Trace) -> dict[str, torch.Tensor]:
    """The buggy neurons of what was traced: per module its neurons, ascending int64, shape (k)."""
    config, num_neurons = run.subject.config, run.subject.num_neurons
    layers = run.subject.decoder_layers
    exact = run.args.occlusion == "exact" and config.layer_selection == "occlusion"
    with run.journal.phase("locate", len(layers) if exact else 0):
        importance = dict(traced.occlusion)
        run.journal.occlusion = {"first-order": importance}
        if exact:
            losses = exact_occlusion(run.engine, layers, traced.batches, traced.medium, run.journal.advance)
            measured = {name: loss - traced.loss for name, loss in losses.items()}
            count = count_of(config.num_layers or 1.0, len(importance), "layers")
            agreement = rank_agreement(importance, measured, count)
            run.journal.occlusion |= {"exact": measured, "agreement": agreement}
            importance = measured
        scores = traced.scores()
        if config.neuron_pattern == "layer-wise":
            chosen = set(select_layers(importance, config.layer_selection, config.num_layers))
            scores = {name: values for name, values in scores.items() if run.subject.decoder_of[name] in chosen}
        if isinstance(num_neurons, str):
            num_neurons = enough_neurons(len(traced.medium), scores)
        return select_neurons(scores, num_neurons, config.neuron_pattern)


def enough_neurons(failures: int, scores: dict[str, torch.Tensor]) -> int:
    """How many neurons of each layer tell so many failing tokens from each other and from all else, as far as the
    smallest of the layers has them."""
    return min(max(AUTO_NEURONS, NEURONS_PER_FAILURE * failures), *(len(values) for values in scores.values()))


def select_layers(
    importance: dict[str, float], selection: str | Sequence[int], num_layers: int | float | None
) -> list[str]:
    """The decoder layers to patch, in order of depth.

    Args:
        importance: Change in loss per candidate layer, in order of depth.
        selection: With `"occlusion"` those of the largest change in magnitude; otherwise all candidates.
        num_layers: With `"occlusion"`: count or share.
    """
    names = list(importance)
    if selection != "occlusion" or num_layers is None:
        return names
    count = count_of(num_layers, len(names), "layers")
    chosen = set(sorted(names, key=lambda name: abs(importance[name]), reverse=True)[:count])
    return [name for name in names if name in chosen]


def select_neurons(
    scores: dict[str, torch.Tensor], num_neurons: int | float, pattern: str = "layer-wise"
) -> dict[str, torch.Tensor]:
    """The buggy neurons: those with the highest attribution.

    `"layer-wise"` takes `num_neurons` in each layer; `"model-wise"` spends the same budget where the scores are
    highest over all layers, so some layers may get none (paper section 3.1).

    Args:
        scores: Attribution per layer, each of shape (m).
        num_neurons: Count for each layer, or share.
        pattern: `"layer-wise"` or `"model-wise"`.

    Returns:
        `dict[str, torch.Tensor]`: Per patched layer its neurons, ascending int64, shape (k).
    """
    counts = {name: count_of(num_neurons, values.numel(), f"neurons of {name}") for name, values in scores.items()}
    if pattern == "layer-wise":
        return {name: values.topk(counts[name]).indices.sort().values for name, values in scores.items()}
    sizes = [values.numel() for values in scores.values()]
    top = torch.cat([values.cpu() for values in scores.values()]).topk(sum(counts.values())).indices.sort().values
    chosen, start = {}, 0
    for (name, values), size in zip(scores.items(), sizes):
        inside = top[(top >= start) & (top < start + size)] - start
        if inside.numel():
            chosen[name] = inside.to(values.device)
        start += size
    return chosen
