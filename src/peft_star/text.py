"""Texts of unknown origin, made fit to be shown: what a patch says of itself may come from a stranger."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they turn the direction of a text


def harmless(text: str) -> str:
    """A text without characters that move or turn what is written, by which a stranger's patch could hide what it
    is: they are spelled out. Line ends and tabs stay."""
    return "".join(_code_point(char) if _moves(char) else char for char in text)


def harmless_json(text: str) -> str:
    """A JSON text without such characters: JSON has a spelling of its own for them, and means the same."""
    return "".join(f"\\u{ord(char):04x}" if _moves(char) else char for char in text)


def one_line(text: str) -> str:
    """A piece of text on one line, its line ends and the spaces around it shown."""
    inner = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    text = "·" * start + inner + "·" * (len(text) - start - len(inner))
    return harmless(text.replace("\n", "\\n").replace("\t", "\\t") or "(none)")


def _moves(char: str) -> bool:
    return char not in "\n\t" and (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _DIRECTIONS)


def _code_point(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
