"""Whether the values of a configuration make sense, each check on its own; what is wrong is said in a sentence.

All of them raise `ValueError` for a value out of its range or unknown, and `TypeError` for one of a wrong type.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..models.names import check_pattern
from ..sharing.patch_files import is_module_name

LAYER_SELECTIONS = ("occlusion", "last", "all")
NEURON_PATTERNS = ("layer-wise", "model-wise")

# the number of neurons that a repair chooses by itself, and how many an adapter has before
AUTO, AUTO_NEURONS = "auto", 64


def check_amount(name: str, value: Any, noun: str, other: str = "") -> int | float:
    """Return `value` as a Python int (a count) or float (a share in (0, 1]), or say what is wrong with it."""
    # bool is an Integral in Python, so it has to be refused before the other checks
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` should be an int (the number of {noun}) or a float in (0, 1] (a share of them){other}, "
            f"got {value!r} of type {type(value).__name__}."
        )
    if isinstance(value, numbers.Integral):
        if value <= 0:
            raise ValueError(f"`{name}` should be a positive number of {noun}, got {int(value)}; pass 1 or more.")
        return int(value)
    value = float(value)
    if not math.isfinite(value) or not 0.0 < value <= 1.0:
        raise ValueError(
            f"`{name}` as a float is a share of the {noun} and should be in (0, 1], got {value!r}; "
            "pass an int for a number of them."
        )
    return value


def check_index(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` should hold layer indices (ints), got {value!r} of type {type(value).__name__}.")
    if value < 0:
        raise ValueError(f"`{name}` should hold layer indices counted from 0, got {int(value)}.")
    return int(value)


def check_counts(field_name: str, value: Any) -> dict[str, int]:
    """Return `value` as a dict from module names to numbers of neurons, or say what is wrong with it."""
    if not isinstance(value, dict):
        raise TypeError(
            f"`{field_name}` should be a dict from full module names to numbers of neurons, got {value!r}."
        )
    checked = {}
    for name, count in value.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"The keys of `{field_name}` should be full module names, got {name!r}.")
        if isinstance(count, bool) or not isinstance(count, numbers.Integral):
            raise TypeError(f"`{field_name}[{name!r}]` should be an int, got {count!r}.")
        if count <= 0:
            raise ValueError(f"`{field_name}[{name!r}]` should be 1 or more, got {int(count)}.")
        checked[name] = int(count)
    return checked


def check_scope(scope: Any) -> None:
    modules = scope.get("modules") if isinstance(scope, dict) else None
    if not isinstance(modules, list) or not all(map(is_module_name, modules)) or "num_neurons" not in scope:
        raise ValueError(f"`scope` should hold a list of `modules` and `num_neurons`, got {scope!r}.")
    if scope["num_neurons"] != AUTO:
        check_amount("num_neurons", scope["num_neurons"], "neurons")


def check_layers_to_transform(layers: Any, pattern: Any, target_modules: Any) -> list[int] | int | None:
    """Return `layers_to_transform` as Python's own types."""
    if isinstance(layers, (list, tuple, set)):
        layers = [check_index("layers_to_transform", index) for index in layers]
    elif layers is not None:
        layers = check_index("layers_to_transform", layers)
    for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
        if isinstance(target_modules, str) and value is not None:
            raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
    if pattern and layers is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
    return layers


def check_modules_to_save(names: Any) -> None:
    # PEFT compares ends of names, of which "" is one of all, and makes parts of patterns of them
    if not isinstance(names, (list, tuple, set)) or not all(is_module_name(name) for name in names):
        raise TypeError(f"`modules_to_save` should be a list of names of modules, got {names!r}.")


def check_patterns(target_modules: Any, exclude_modules: Any, layers_pattern: Any) -> None:
    given = {"target_modules": target_modules, "exclude_modules": exclude_modules, "layers_pattern": layers_pattern}
    for name, value in given.items():
        names = value if isinstance(value, (set, list, tuple)) else [value]
        if value is not None and not all(isinstance(item, str) for item in names):
            raise TypeError(f"`{name}` should be a list of names of modules or a pattern, got {value!r}.")
    patterns = layers_pattern if isinstance(layers_pattern, (list, tuple)) else [layers_pattern]
    for name, values in (
        ("target_modules", [target_modules]),
        ("exclude_modules", [exclude_modules]),
        # PEFT puts as much around it
        ("layers_pattern", [rf".*?\.{value}\.\d+\." if isinstance(value, str) else value for value in patterns]),
    ):
        for value in values:
            if isinstance(value, str):
                check_pattern(value, name)


def check_layer_selection(selection: Any) -> Any:
    """Return `layer_selection` as a word, or as a sorted list of indices."""
    if isinstance(selection, str):
        if selection not in LAYER_SELECTIONS:
            raise ValueError(_not_a_selection(selection))
        return selection
    if not isinstance(selection, (list, tuple, set, range)):
        raise TypeError(_not_a_selection(selection))
    indices = [check_index("layer_selection", index) for index in selection]
    if not indices:
        raise ValueError("`layer_selection` is an empty list; name at least one layer or pass 'all'.")
    if len(set(indices)) != len(indices):
        raise ValueError(f"`layer_selection` names a layer twice: {indices}.")
    return sorted(indices)


def _not_a_selection(value: Any) -> str:
    words = ", ".join(map(repr, LAYER_SELECTIONS))
    return f"`layer_selection` should be one of {words} or a list of layer indices, got {value!r}."


def check_in_features(in_features: Any) -> None:
    widths = in_features if isinstance(in_features, dict) else {"": in_features}
    for name, width in widths.items():
        counts = width if isinstance(width, list) and len(width) == 2 else [width]
        if not isinstance(name, str) or not all(type(count) is int and count > 0 for count in counts):
            raise ValueError(
                "`in_features` should be a number of neurons, a list of the number of experts and of the neurons "
                f"in each, or a dict of these by full module name, got {in_features!r}."
            )
