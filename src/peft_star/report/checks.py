"""Reports of unknown origin: whether what a file says has the types that a report is to have."""

from __future__ import annotations

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
    "dict[str, float]": dict,
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
    for name, seconds in getattr(record, "seconds", {}).items():
        if not isinstance(seconds, (int, float)):
            raise TypeError(f"the seconds of {name} are {type(seconds).__name__}")
    harm = getattr(record, "harm", {})
    named = [harm[name] for name in ("changed_share", *HARM) if name in harm]
    if not all(isinstance(value, (int, float)) for value in named) or "texts" in harm and not harm.keys() >= set(HARM):
        raise TypeError("what is said of the model's own texts is no numbers")
    earlier = getattr(record, "earlier", {})
    if earlier and not all(isinstance(earlier.get(name), int) for name in ("rows", "right", "broken")):
        raise TypeError("what is said of earlier repairs is no counts")
    if not all(isinstance(text, str) for text in getattr(record, "warnings", [])):
        raise TypeError("a warning is no text")
    for act in getattr(record, "acts", []):
        if not all(isinstance(text, str) for text in (act["how"], *act["tokens"], *act["layers"])):
            raise TypeError("where it acts is no text")
    return record
