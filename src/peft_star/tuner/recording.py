"""What a configuration records of the modules that carry its adapter: neurons patched, and neurons there are."""

from __future__ import annotations

from collections.abc import Mapping

from ..models.names import plain_name
from .config import AUTO, StarConfig
from .experts import Experts
from .layer import StarLayer


def record_counts(config: StarConfig, counts: dict[str, int]) -> None:
    """Write the numbers of neurons of the modules, by plain name, into the config."""
    if config.num_neurons == AUTO:
        # what is repaired next with this adapter may need another number
        config.neurons_per_module = dict(sorted(counts.items()))
    elif len(set(counts.values())) == 1:
        config.num_neurons = next(iter(counts.values()))
        config.neurons_per_module = None
    else:
        config.num_neurons = max(counts.values())
        config.neurons_per_module = dict(sorted(counts.items()))


def widths_of(layers: Mapping[str, StarLayer]) -> dict[str, int | list[int]]:
    """How many neurons the modules have in all, by plain name; of routed experts, how many there are and in each."""
    return {
        plain_name(name): [layer.num_experts, layer.neurons_per_expert]
        if isinstance(layer, Experts)
        else layer.in_features
        for name, layer in layers.items()
    }


def record_widths(config: StarConfig, layers: Mapping[str, StarLayer]) -> None:
    """Write how many neurons the modules have in all into the config: converting a patch needs it."""
    widths = widths_of(layers)
    values = list(widths.values())
    same = len(values) > 0 and values.count(values[0]) == len(values)
    config.in_features = values[0] if same else dict(sorted(widths.items())) or None
