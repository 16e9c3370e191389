"""What a row of failures may hold: its columns and their types, and rows that cannot all be right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "completion")
OPTIONAL = ("focus", "problem", "end", "id")
SHOWN = 40  # characters of a text in a message


class FileRows(list[Any]):
    """Rows that were read from a file, and where they stand in it.

    Attributes:
        path: The file.
        unit: What its places are called, "line" or "row".
        numbers: Where each row begins, counted from 1.
    """

    def __init__(self, path: Path, unit: str):
        super().__init__()
        self.path, self.unit, self.numbers = path, unit, list[int]()

    def add(self, number: int, row: Any) -> None:
        self.append(row)
        self.numbers.append(number)


def number_of(rows: Any, index: int) -> int:
    """How people count a row: by its line in the file that it was read from, or else from 1 among the others."""
    if isinstance(rows, FileRows) and len(rows.numbers) == len(rows):
        return rows.numbers[index]
    return index + 1


def where(rows: Any, index: int, name: str) -> str:
    """What messages call a row; `name` is what they call one that comes from no file."""
    place = f"{rows.path}, {rows.unit}" if isinstance(rows, FileRows) else name
    return f"{place} {number_of(rows, index)}"


def is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_answer(messages: Sequence[Any], where: str) -> None:
    if not any(message["content"] for message in messages):
        raise ValueError(f"{where}: 'completion' is empty; there is nothing to repair towards.")
    if len(messages) > 1:
        # generation stops at the end of the first, and what comes between two turns is nothing to repair towards
        raise ValueError(
            f"{where}: 'completion' holds {len(messages)} messages, and a model generates one at a time; give each "
            "assistant turn a row of its own, with the messages before it in 'prompt'."
        )


def _check_messages(messages: Sequence[Any], where: str, column: str) -> None:
    if not messages:
        raise ValueError(f"{where}: '{column}' has no messages.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where}: '{column}' holds {message!r}; a chat message has 'role' and 'content'.")
        if not isinstance(message["content"], str):
            raise ValueError(f"{where}: a message's 'content' in '{column}' must be text.")


def spans_of(row: dict[str, Any]) -> list[str]:
    """The spans of a valid row's `focus`; a missing value of a data set is None."""
    focus = row.get("focus")
    return [] if focus is None else [focus] if isinstance(focus, str) else list(focus)


def _check_text(value: Any, what: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can hold and no tokenizer takes, in texts, messages and lists."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            bad = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(
                f"{what} holds {bad}, half of a character; write the whole one or leave it out."
            ) from None
    elif isinstance(value, dict):
        for item in value.values():
            _check_text(item, what)
    elif is_chat(value):
        for item in value:
            _check_text(item, what)


def _check_optional(row: dict[str, Any], where: str) -> None:
    focus, problem, end, name = (row.get(column) for column in OPTIONAL)
    if name is not None and (isinstance(name, bool) or not isinstance(name, int | str)):
        raise ValueError(f"{where}: 'id' is {type(name).__name__}; it must be text or a whole number.")
    if isinstance(name, str) and not name.strip():
        raise ValueError(f"{where}: 'id' is empty; give the row a name, or leave the column out.")
    if not isinstance(end, bool | None):
        raise ValueError(f"{where}: 'end' is {end!r}; it must be true or false.")
    if focus is not None:
        spans = [focus] if isinstance(focus, str) else focus
        if not isinstance(spans, (list, tuple)) or not all(isinstance(span, str) for span in spans):
            raise ValueError(
                f"{where}: 'focus' is {focus!r}; it must be a piece of the prompt's text, or a list of them."
            )
        if not spans or not all(span.strip() for span in spans):
            raise ValueError(f"{where}: 'focus' is empty; give a piece of the prompt's text, or leave the column out.")
    if problem is not None:
        if not isinstance(problem, str):
            raise ValueError(f"{where}: 'problem' is {type(problem).__name__}; it must be text.")
        if not problem.strip():
            raise ValueError(f"{where}: 'problem' is empty; give a name, or leave the column out.")


def check_focus(spans: Sequence[str], prompt: str, where: str) -> None:
    for span in spans:
        if span not in prompt:
            raise ValueError(f"{where}: 'focus' {span!r} does not occur in the prompt.")


def validate_row(row: Any, where: str) -> None:
    """Check one row's columns and types.

    Whether a span of `focus` occurs in chat messages is seen only where they are rendered, by [`encode_rows`].

    Raises:
        ValueError: One sentence that starts with `where`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}; a row is an object with 'prompt' and 'completion'.")
    missing = [column for column in COLUMNS if column not in row]
    unknown = sorted(set(map(str, row)) - {*COLUMNS, *OPTIONAL})
    if missing:
        had = f" (it has {', '.join(map(repr, sorted(map(str, row))))})" if row else ""
        raise ValueError(f"{where}: column {' and '.join(map(repr, missing))} is missing{had}.")
    if unknown:
        raise ValueError(f"{where}: unknown column {', '.join(map(repr, unknown))}; remove it or rename it.")
    prompt, completion = row["prompt"], row["completion"]
    for column, value in row.items():
        _check_text(value, f"{where}: '{column}'")
    _check_optional(row, where)
    if is_chat(prompt) != is_chat(completion):
        raise ValueError(f"{where}: 'prompt' and 'completion' must both be text or both be lists of chat messages.")
    if is_chat(prompt):
        _check_messages(prompt, where, "prompt")
        _check_messages(completion, where, "completion")
        _check_answer(completion, where)
        return
    for column in COLUMNS:
        if not isinstance(row[column], str):
            raise ValueError(f"{where}: '{column}' is {type(row[column]).__name__}; it must be text.")
    if not completion:
        raise ValueError(f"{where}: 'completion' is empty; there is nothing to repair towards.")
    if not prompt:
        raise ValueError(f"{where}: 'prompt' is empty; generation needs at least one token to start from.")
    check_focus(spans_of(row), prompt, where)


def check_contradictions(failures: Sequence[dict[str, Any]], retained: Sequence[dict[str, Any]] = ()) -> None:
    """Refuse rows that cannot all become right: behind one prompt a model says one thing.

    Completions of which one begins with the other agree, unless the shorter says that the model is to stop there.
    Retained rows are held against the failures, but not against each other.

    Args:
        failures, retained: Valid rows.

    Raises:
        ValueError: One sentence that names two rows.
    """
    said: dict[str, tuple[str, str]] = {}
    for rows, name in ((failures, "failures row"), (retained, "retain row")):
        for index, row in enumerate(rows):
            place, text = where(rows, index, name), _said(row)
            key = json.dumps(row["prompt"], sort_keys=True)
            if key not in said:
                if rows is failures:
                    said[key] = place, text
                continue
            other, known = said[key]
            if not (text.startswith(known) or known.startswith(text)):
                what = "has to stay" if rows is retained else "is wanted"
                raise ValueError(
                    f"{place}: {_short(row)} {what} behind the same prompt as in {other}, where something else is "
                    "wanted; a model can say only one of them, so remove one."
                )
            if rows is failures and len(text) > len(known):
                said[key] = place, text


def _said(row: dict[str, Any]) -> str:
    """What the model is to say behind the prompt, with a mark where it is to stop."""
    completion, end = row["completion"], row.get("end")
    if is_chat(completion):
        return "".join(message["content"] for message in completion) + ("" if end is False else "\0")
    if not end:
        return completion
    # as it is encoded: of a prompt with lines, the completion of a line ends with the line
    return completion + ("\n" if "\n" in row["prompt"] and "\n" not in completion else "\0")


def _short(row: dict[str, Any]) -> str:
    completion = row["completion"]
    text = completion[-1]["content"] if is_chat(completion) else completion
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")
