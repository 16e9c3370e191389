"""Names of modules: as they are in the base model, and a `target_modules` that selects just some of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _find_minimal_target_modules
from torch import nn

try:
    from re import _parser  # type: ignore[attr-defined]  # it is no public one
except ImportError:  # Python 3.10
    import sre_parse as _parser

# what PEFT puts before a module's name, in its models and in saved adapters
PEFT_PREFIX = "base_model.model."
_WRAPPER_PREFIXES = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
# a pattern that can go wrong in more ways than this on a name of `_NAME_LENGTH` letters may take forever
_MOST_WAYS = 2_000_000
_NAME_LENGTH = 64


def check_pattern(pattern: str, what: str) -> None:
    """Refuse a pattern of modules' names that is none, or that could keep `re` busy for hours on one of them.

    Patterns may come with a stranger's patch, and PEFT runs them on every name.

    Args:
        pattern: A regular expression.
        what: The setting that holds it, for the message.

    Raises:
        ValueError: One sentence.
    """
    try:
        ways = _ways(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`{what}` is no regular expression that can be used: {error}.") from None
    if ways > _MOST_WAYS:
        raise ValueError(f"`{what}` is a regular expression that may take forever; give names or a simpler one.")


def _ways(parsed: Iterable[tuple[Any, Any]]) -> int:
    """In how many ways at most a parsed pattern can match from one place on, which bounds what `re` tries; more than
    `_MOST_WAYS` is too many anyway."""
    ways = 1
    for operator, value in parsed:
        kind = str(operator)
        if "REPEAT" in kind:
            least, most, body = value
            most = min(most, _NAME_LENGTH)
            ways *= max(most - least + 1, 1) * _ways(body) ** most
        elif kind == "BRANCH":
            ways *= sum(map(_ways, value[1]))
        elif isinstance(value, tuple):  # groups, what is looked ahead for, and conditions
            for part in value:
                ways *= _ways(part) if isinstance(part, _parser.SubPattern) else 1
        elif isinstance(value, _parser.SubPattern):
            ways *= _ways(value)
        ways = min(ways, _MOST_WAYS + 1)
    return ways


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
