"""Reports of unknown origin: whether what a file says has the types that a report is to have."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

# of `harm`, what is read by name
HARM = ("texts", "unchanged", "kl")

_NONE = type(None)
_KINDS: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "int | None": (int, _NONE),
    "bool": bool,
    "str | None": (str, _NONE),
    "bool | None": (bool, _NONE),
    "list[int]": list,
    "dict[str, Any]": dict,
    "dict[str, float]": dict,
    "dict[str, str]": dict,
    "dict[str, int]": dict,
    "dict[str, bool]": dict,
    "list[dict[str, Any]]": list,
    "list[str]": list,
}


def checked(record: Any) -> Any:
    """A record whose simple values are of the types that its class names.

    Raises:
        TypeError: One is not.
    """
    for item in fields(record):
        value, kinds = getattr(record, item.name), _KINDS.get(str(item.type))
        if kinds and not isinstance(value, kinds):
            raise TypeError(f"{item.name} is {type(value).__name__}")
        if str(item.type) == "float" and not _is_figure(value):
            raise TypeError(f"{item.name} is no figure")
    for name, seconds in getattr(record, "seconds", {}).items():
        if not _is_figure(seconds):
            raise TypeError(f"the seconds of {name} are no figure")
    if not _is_figure(getattr(record, "arguments", {}).get("max_harm", 1.0)):
        raise TypeError("the argument max_harm is no figure")
    harm = getattr(record, "harm", {})
    named = [harm[name] for name in ("changed_share", *HARM) if name in harm]
    if not all(map(_is_figure, named)) or "texts" in harm and not harm.keys() >= set(HARM):
        raise TypeError("what is said of the model's own texts is no numbers")
    earlier = getattr(record, "earlier", {})
    if earlier and not all(isinstance(earlier.get(name), int) for name in ("rows", "right", "broken")):
        raise TypeError("what is said of earlier repairs is no counts")
    if not all(isinstance(text, str) for text in getattr(record, "warnings", [])):
        raise TypeError("a warning is no text")
    for act in getattr(record, "acts", []):
        lists = isinstance(act, dict) and all(isinstance(act[name], list) for name in ("tokens", "layers"))
        if not lists or not all(isinstance(text, str) for text in (act["how"], *act["tokens"], *act["layers"])):
            raise TypeError("where it acts is no text")
    return record


def _is_figure(value: Any) -> bool:
    """Whether a value is a number that a float can be; JSON's whole numbers have no limit."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (isinstance(value, float) or abs(value) <= sys.float_info.max)
