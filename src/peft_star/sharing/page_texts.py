"""Texts of a patch's page, in pieces: what changed between two of them, and which tokens of a completion failed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from os.path import commonprefix

from ..report import FailureRecord, RowRecord

LONGEST = 2000  # characters of a text that are shown; of a prompt the last ones, with what is asked
MOST_WORDS = 300  # of texts that are compared word by word; that takes time in the square of them
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Piece:
    """A part of a text, and whether it is marked."""

    text: str
    marked: bool = False


def changed(text: str, other: str) -> list[Piece]:
    """A text, with those of its words marked that another text does not have in this place."""
    text, other = text[:LONGEST], other[:LONGEST]
    words, others = _WORDS.findall(text), _WORDS.findall(other)
    if len(words) <= MOST_WORDS and len(others) <= MOST_WORDS:
        matcher = SequenceMatcher(None, words, others, autojunk=False)
        parts = [(words[start:end], tag != "equal") for tag, start, end, _, _ in matcher.get_opcodes()]
    else:
        front = len(commonprefix([words, others]))
        back = len(commonprefix([words[front:][::-1], others[front:][::-1]]))
        end = len(words) - back
        parts = [(words[:front], False), (words[front:end], True), (words[end:], False)]
    return [Piece(_shown("".join(part), marked), marked) for part, marked in parts if part]


def _shown(text: str, marked: bool) -> str:
    """A part of a text; a line end that is marked has to be seen."""
    return text.replace("\n", "↵\n") if marked else text


def failing(row: RowRecord, failures: Sequence[FailureRecord]) -> list[Piece]:
    """A row's completion, with the tokens marked that the model got wrong.

    A report keeps a token's text and what stands before it, not where it begins; a token that is not found by these is
    left unmarked.
    """
    text, start, pieces = row.prompt + row.completion, len(row.prompt), []
    done = start
    for failure in sorted(failures, key=lambda failure: failure.position):
        length = len(failure.context)
        place = text.find(failure.context + failure.expected, max(0, done - length)) + length
        if failure.expected and place >= max(done, length):
            pieces += [Piece(text[done:place]), Piece(_shown(failure.expected, True), True)]
            done = place + len(failure.expected)
    pieces.append(Piece(text[done:]))
    return [Piece(piece.text[:LONGEST], piece.marked) for piece in pieces if piece.text]


def ending(prompt: str) -> str:
    """The end of a prompt, with what is asked."""
    return prompt if len(prompt) <= LONGEST else "…" + prompt[-LONGEST:]
