"""Other texts in a focus's place: what a push must not answer to.

Many pushes at names have much in common, and what they have in common answers to any name. So a few others, put where
the focus stands, are protected (not in the paper).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files

from ..failures import Row

# how many other names stand in for each focus
EACH = 4


@cache
def names() -> list[str]:
    """Names of people, places, works, firms and things that come with the package, in an order that mixes them."""
    lines = (files("peft_star") / "data" / "names.txt").read_text(encoding="utf-8").splitlines()
    # a step that has no divisor in common with their number visits all
    step = next(step for step in (17, 19, 23) if len(lines) % step)
    return [lines[step * number % len(lines)] for number in range(len(lines))]


def namesakes(rows: Sequence[Row], tokenizer) -> Iterator[tuple[int, ...]]:
    """The rows' tokens up to each focus, with other names in its place; the last token is what must not be answered.

    A name that is part of a row's focus, or the other way round, is left out: there, pushes are to act.

    Args:
        rows: Rows that have a focus.
        tokenizer: The model's tokenizer.
    """
    spans = [(row, start) for row in rows for start in row.focus_starts]
    others = _others(rows, tokenizer)
    for number, (row, start) in enumerate(spans if others else []):
        for place in range(EACH):
            yield put_in_place(row.prompt_ids, start, others[(EACH * number + place) % len(others)], tokenizer)


def strangers(rows: Sequence[Row], tokenizer) -> list[str]:
    """Names that are no row's focus, and that [`namesakes`] does not take, unless it takes all."""
    others = _others(rows, tokenizer)
    return others[EACH * sum(len(row.focus_starts) for row in rows) :] or others


def _others(rows: Sequence[Row], tokenizer) -> list[str]:
    """Names that are no part of a row's focus, nor it of them."""
    spans = [(row, start, last) for row in rows for start, last in zip(row.focus_starts, row.focus)]
    said = {tokenizer.decode(row.prompt_ids[start : last + 1]).strip().casefold() for row, start, last in spans}
    return [name for name in names() if not any(name.casefold() in text or text in name.casefold() for text in said)]


def put_in_place(ids: tuple[int, ...], start: int, text: str, tokenizer) -> tuple[int, ...]:
    """Tokens up to a span that begins at `start`, and another text in its place."""
    # a word's token holds the space in front of it
    space = " " if tokenizer.decode([ids[start]])[:1].isspace() else ""
    return ids[:start] + tuple(tokenizer(space + text, add_special_tokens=False)["input_ids"])


def put_in_front(ids: tuple[int, ...], text: str, tokenizer) -> tuple[int, ...]:
    """A prompt's tokens behind another text, which stands behind what opens every prompt."""
    begin = 1 if ids[0] == tokenizer.bos_token_id else 0
    front = tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
    return ids[:begin] + front + ids[begin:]
