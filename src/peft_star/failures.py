"""Failures: prompt-completion rows, the tokens generation would have to produce, and the medium tokens.

Row format is TRL's prompt-completion: both strings, or both lists of chat messages. Beside these a row may say what of
its prompt the problem is about (`focus`), which problem that is (`problem`), whether the model is to stop where the
completion does (`end`), and what the row is called elsewhere, such as in a bug tracker (`id`).

Position `p` of a row is a *medium token* when the model's argmax for `p + 1` differs from the expected token (paper
section 2.1 and 3.2); that is one failure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .row_checks import check_focus, is_chat, number_of, spans_of, validate_row, where
from .row_files import read_rows

__all__ = ["Row", "encode_rows", "read_rows", "validate_row"]


@dataclass(frozen=True)
class Row:
    """One tokenised row: generation starts after `prompt_ids` and is right when it yields `completion_ids`.

    `focus` holds the positions in `prompt_ids`, ascending, at which the spans that the problem is about end, and
    `focus_starts` where they begin; `problem` is the problem's name; `ended` says that the last of `completion_ids` is
    where the model is to stop; `id` is the row's name; `line` is where it stands in the file that it was read from.
    """

    index: int
    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    focus: tuple[int, ...] = ()
    focus_starts: tuple[int, ...] = ()
    problem: str | None = None
    ended: bool = False
    id: str | None = None
    line: int | None = None

    @property
    def number(self) -> int:
        """How people count the row: by its line, or else from 1."""
        return self.index + 1 if self.line is None else self.line

    @property
    def input_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids

    @property
    def medium_positions(self) -> range:
        """Positions whose next token is a completion token."""
        return range(len(self.prompt_ids) - 1, len(self.prompt_ids) + len(self.completion_ids) - 1)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def encode_rows(rows: Iterable[dict[str, Any]], tokenizer, max_length: int | None = None, *, name: str = "row"):
    """Tokenise rows into exactly the tokens that generation would have to produce after the prompt's own tokens.

    The prompt is tokenised alone, as at inference. The completion's tokens are those that, appended to the prompt's,
    decode to prompt + completion. Where the model is to stop (`end`, the default for chat messages), the last of them
    is the one that says so: of chat messages the token with which the template ends a turn; of text that completes a
    line of a prompt with lines the line's end; of any other text the end-of-text token.

    Args:
        rows: prompt-completion rows (dicts or a `datasets.Dataset`), with `focus` (a span of the prompt, or a list of
            spans), `problem` (a name), `end` (true or false) and `id` (text or a whole number) if they like.
        tokenizer: A transformers tokenizer.
        max_length: The model's context in tokens; None: unlimited.
        name: What a row is called in messages.

    Returns:
        `list[Row]`

    Raises:
        ValueError: A row is malformed, has no tokens, or is longer than `max_length`.
    """
    encoded = []
    for index, row in enumerate(rows):
        place = where(rows, index, name)
        validate_row(row, place)
        chat, spans = is_chat(row["prompt"]), spans_of(row)
        if chat:
            prompt, completion, prompt_ids, completion_ids, ended = _encode_chat(row, tokenizer, place)
        else:
            prompt, completion, ended = row["prompt"], row["completion"], bool(row.get("end"))
            by_line = ended and "\n" in prompt and "\n" not in completion
            completion += "\n" if by_line else ""
            prompt_ids = tokenizer(prompt)["input_ids"]
            # some tokenizers close every text with an end token, which would end the prompt as well
            if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
                prompt_ids = prompt_ids[:-1]
            completion_ids = _completion_ids(prompt, completion, list(prompt_ids), tokenizer)
            if ended and not by_line:
                completion_ids = [*completion_ids, _end_token(tokenizer, place)]
                completion += tokenizer.eos_token
        if not prompt_ids or not completion_ids:
            empty = "prompt" if not prompt_ids else "completion"
            raise ValueError(f"{place}: the {empty} has no tokens; give it some text.")
        check_focus(spans, prompt, place)
        places = dict(sorted(_place(span, prompt, prompt_ids, tokenizer, special=not chat) for span in spans))
        ids = tuple(prompt_ids), tuple(completion_ids)
        item = Row(
            index,
            prompt,
            completion,
            *ids,
            focus=tuple(places),
            focus_starts=tuple(places.values()),
            problem=row.get("problem"),
            ended=ended,
            id=None if row.get("id") is None else str(row["id"]),
            line=number_of(rows, index),
        )
        if max_length is not None and len(item) > max_length:
            raise ValueError(
                f"{place}: {len(item)} tokens (prompt {len(prompt_ids)}, completion {len(completion_ids)}) exceed the "
                f"model's context of {max_length}; shorten it."
            )
        encoded.append(item)
    if not encoded:
        raise ValueError(f"There is no {name} to work on; give at least one row with 'prompt' and 'completion'.")
    return encoded


def _decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _place(span: str, prompt: str, prompt_ids: Sequence[int], tokenizer, *, special: bool) -> tuple[int, int]:
    """The positions in `prompt_ids` of the last and the first token of the span's last occurrence in the prompt.

    Spaces at the span's ends do not count: with most tokenizers they belong to the next word's token.
    """
    start = prompt.rindex(span)
    ends = start + len(span.rstrip()), start + len(span) - len(span.lstrip()) + 1
    last, first = (_token_at(end, prompt, prompt_ids, tokenizer, special=special) for end in ends)
    return last, first


def _token_at(end: int, prompt: str, prompt_ids: Sequence[int], tokenizer, *, special: bool) -> int:
    """The position in `prompt_ids` of the token that holds the last of the prompt's first `end` characters."""
    ids = list(prompt_ids)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt, add_special_tokens=special, return_offsets_mapping=True)
        inside = [
            position
            for position, (start, stop) in enumerate(encoded["offset_mapping"][: len(ids)])
            if start < min(stop, end)  # special tokens take no text
        ]
        if inside and encoded["input_ids"][: len(ids)] == ids:
            return inside[-1]
    text = _decode(tokenizer, ids)
    if (found := text.rfind(prompt)) >= 0:  # it may lie behind a start token
        wanted = text[: found + end]
        # the token with which the tokens so far spell everything up to the span's end
        return bisect_left(
            range(len(ids) - 1), True, key=lambda position: _decode(tokenizer, ids[: position + 1]).startswith(wanted)
        )
    # a tokenizer that changes the text: as many tokens as the text up to there has alone
    alone = tokenizer(prompt[:end], add_special_tokens=special)["input_ids"]
    closed = bool(alone) and alone[-1] == tokenizer.eos_token_id
    return min(max(len(alone) - closed, 1), len(ids)) - 1


def _completion_ids(prompt: str, completion: str, prompt_ids: list[int], tokenizer) -> list[int]:
    """Tokens that continue `prompt_ids` and spell `completion`; tokens merged across the boundary are taken apart."""
    base = _decode(tokenizer, prompt_ids)

    def spells(ids: list[int]) -> bool:
        return bool(ids) and _decode(tokenizer, prompt_ids + ids) == base + completion

    whole = tokenizer(prompt + completion, add_special_tokens=True)["input_ids"]
    if whole and whole[-1] == tokenizer.eos_token_id and not completion.endswith(tokenizer.eos_token):
        whole = whole[:-1]
    if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
        return whole[len(prompt_ids) :]
    alone = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if spells(alone):
        return alone
    # SentencePiece opens a text with a space of its own: tokenise behind an anchor that does not merge
    for anchor in ("\n", "a", ".", "("):
        anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        anchored = tokenizer(anchor + completion, add_special_tokens=False)["input_ids"]
        if anchored[: len(anchor_ids)] == anchor_ids and spells(anchored[len(anchor_ids) :]):
            return anchored[len(anchor_ids) :]
    # tokenizers that normalise text (lower-case, accents) never decode to the very same string
    return alone


def _end_token(tokenizer, where: str) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{where}: 'end' is true, but this tokenizer has no end-of-text token; let the completion end with "
            "something that marks its end, such as a line end."
        )
    return tokenizer.eos_token_id


def _encode_chat(row: dict[str, Any], tokenizer, where: str):
    """Prompt and completion as texts and as tokens, and whether the last of these ends the turn."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where}: chat messages need a chat template, and this tokenizer has none; give text instead."
        )
    prompt_text = tokenizer.apply_chat_template(list(row["prompt"]), tokenize=False, add_generation_prompt=True)
    whole_text = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    if not whole_text.startswith(prompt_text):
        raise ValueError(
            f"{where}: the chat template does not render the completion as a continuation of the prompt; "
            "give prompt and completion as text instead."
        )
    completion_text = whole_text[len(prompt_text) :]
    prompt_ids = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    whole_ids = tokenizer(whole_text, add_special_tokens=False)["input_ids"]
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        completion_ids = whole_ids[len(prompt_ids) :]
    else:
        completion_ids = tokenizer(completion_text, add_special_tokens=False)["input_ids"]
    # generation stops at the end of the turn; what the template writes behind it is never generated
    eos = tokenizer.eos_token
    if eos and eos in row["completion"][0]["content"]:
        raise ValueError(f"{where}: 'completion' holds {eos}, at which generation stops; leave it out.")
    stop = _end_of_turn(completion_ids, tokenizer)
    if row.get("end") is False:
        return prompt_text, completion_text, prompt_ids, completion_ids[:stop], False
    if stop is not None:
        return prompt_text, completion_text, prompt_ids, completion_ids[: stop + 1], True
    ended = bool(row.get("end"))  # of a template that marks no end
    return prompt_text, completion_text, prompt_ids, [*completion_ids, *[_end_token(tokenizer, where)] * ended], ended


def _end_of_turn(ids: Sequence[int], tokenizer) -> int | None:
    """The place of the token with which a chat template ends a turn: end-of-text, or else the first of the special
    tokens that stand behind the message."""
    if tokenizer.eos_token_id in ids:
        return ids.index(tokenizer.eos_token_id)
    special = {token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items() if added.special}
    stop = None
    for place in reversed(range(len(ids))):
        if ids[place] in special:
            stop = place
        elif _decode(tokenizer, [ids[place]]).strip():
            break
    return stop
