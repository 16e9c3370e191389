"""Names of modules: as they are in the base model, and a `target_modules` that selects just some of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer, _find_minimal_target_modules
from torch import nn

# what PEFT puts before a module's name, in its models and in saved adapters
PEFT_PREFIX = "base_model.model."
_WRAPPER_PREFIXES = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def plain_name(name: str) -> str:
    """Return a module's name as it is in the base model, without what wrappers and PEFT insert."""
    return _WRAPPER_PREFIXES.sub("", name).lstrip(".").removeprefix(PEFT_PREFIX)


def own_keys(model: nn.Module) -> list[str]:
    """Return the names of the modules in `model` that do not lie inside of a tuner layer."""
    tuner_layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name, _ in model.named_modules() if name and not name.startswith(tuner_layers)]


def matches(target_modules: set[str], name: str) -> bool:
    """Whether PEFT takes the module `name` for one of `target_modules`: by its full name or by the end of it."""
    return name in target_modules or any(name.endswith(f".{target}") for target in target_modules)


def select(targets: Iterable[str], keys: Iterable[str]) -> set[str] | str:
    """Return a `target_modules` that selects just `targets` among `keys`: their full names where that works."""
    wanted = set(targets)
    if all(matches(wanted, key) == (key in wanted) for key in keys):
        return wanted
    # a full name is the end of another full name, so only a regex is exact
    return "|".join(re.escape(name) for name in sorted(wanted))


def condense(targets: Iterable[str], keys: Iterable[str]) -> set[str] | None:
    """Return the shortest suffixes that select just `targets` among `keys`, or None when there are none."""
    wanted, keys = set(targets), list(keys)
    condensed = _find_minimal_target_modules(wanted, [key for key in keys if key not in wanted])
    # PEFT does not apply `layers_to_transform` to full names, so these do not count as suffixes
    if condensed.isdisjoint(wanted) and all(matches(condensed, key) == (key in wanted) for key in keys):
        return condensed
    return None
