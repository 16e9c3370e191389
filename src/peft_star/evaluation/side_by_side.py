"""What a model generates with and without its patch, side by side, and where the two part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..engine import passes
from ..engine.engine import Engine
from ..failures import Row
from ..files import parse_json
from ..models.inputs import context_length, evaluating
from ..row_checks import FileRows
from ..row_checks import where as place_of


@dataclass(frozen=True)
class Pair:
    """One prompt and what follows it.

    Attributes:
        row: Its index.
        prompt: Its text; of chat messages as the template renders them.
        base, patched: What greedy generation says without and with the patch.
        base_ended, patched_ended: Whether the model stopped there by itself.
        token: The first generated token that differs, counted from 0 (None: none does).
        at: How many characters the two texts have in common before they part (None: no token differs).
    """

    row: int
    prompt: str
    base: str
    patched: str
    base_ended: bool
    patched_ended: bool
    token: int | None
    at: int | None

    @property
    def changed(self) -> bool:
        return self.token is not None


@dataclass(frozen=True)
class SideBySide:
    """What [`side_by_side`] returns: a [`Pair`] for each prompt."""

    pairs: list[Pair]

    @property
    def changed(self) -> list[Pair]:
        """Those whose texts differ."""
        return [pair for pair in self.pairs if pair.changed]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return {"prompts": len(self.pairs), "changed": len(self.changed), "pairs": [asdict(p) for p in self.pairs]}


def side_by_side(
    model: PeftModel,
    tokenizer: Any,
    prompts: Iterable[str | Sequence[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    max_batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> SideBySide:
    """Generate behind each prompt with the patch and without it, greedily, in the same batches.

    Args:
        model: A base model with its patch (or several, all active) on it; the base is the same model with them off.
        tokenizer: Its tokenizer.
        prompts: Texts, or lists of chat messages.
        max_new_tokens: The most tokens that are generated behind a prompt.
        max_batch_tokens: Tokens of one batch, padding included.
        progress: Called with the number of prompts done; over the whole run each counts twice.

    Raises:
        TypeError: The model has no patch that could be turned off, or a prompt is neither text nor messages.
        ValueError: A prompt is empty, or too long for the model.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"{type(model).__name__} has no patch to compare with; put one on it with load_patch.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least one token has to be generated.")
    rows = encode_prompts(prompts, tokenizer, max_new_tokens, context_length(model))
    engine = Engine(model, max_batch_tokens)
    with evaluating(model):
        with model.disable_adapter():
            before = passes.generate(engine, tokenizer, rows, progress)
        after = passes.generate(engine, tokenizer, rows, progress)
    return SideBySide([_pair(row, was, now, tokenizer) for row, was, now in zip(rows, before, after)])


def read_prompts(path: str | Path) -> FileRows:
    """The prompts of a JSON Lines file of rows `{"prompt": ...}`, whatever else these say.

    Raises:
        FileNotFoundError, ValueError: One sentence with the file and line that is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a JSON Lines file of rows with 'prompt'.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    prompts = FileRows(path, "line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)}); write one object a line.") from None
        if not isinstance(row, dict) or "prompt" not in row:
            raise ValueError(f"{where}: a row is an object with 'prompt'.")
        try:
            _check(row["prompt"], where)
        except TypeError as error:
            raise ValueError(str(error)) from None
        prompts.add(number, row["prompt"])
    if not prompts:
        raise ValueError(f"{path} holds no rows; write one object with 'prompt' a line.")
    return prompts


def encode_prompts(
    prompts: Iterable[str | Sequence[dict[str, str]]], tokenizer: Any, new_tokens: int, limit: int | None
) -> list[Row]:
    """Rows that generation reads.

    Args:
        prompts: Texts, or lists of chat messages.
        tokenizer: The model's tokenizer.
        new_tokens: The most tokens that are to be generated behind a prompt.
        limit: The model's context, None where it is not known.

    Raises:
        TypeError, ValueError: A prompt is none, or too long; or there is none.
    """
    prompts = prompts if isinstance(prompts, FileRows) else list(prompts)
    places = [place_of(prompts, index, "prompt") for index in range(len(prompts))]
    rows = [_encode(index, prompt, places[index], tokenizer, new_tokens) for index, prompt in enumerate(prompts)]
    _check_room(rows, places, limit)
    return rows


def _check(prompt: Any, where: str) -> None:
    """Refuse what is neither text nor a list of chat messages."""
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, Sequence) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in prompt
    ):
        texts = [item["content"] for item in prompt]
    else:
        raise TypeError(f"{where}: the prompt must be text, or a list of messages with 'role' and 'content'.")
    if not texts or not any(texts):
        raise ValueError(f"{where}: the prompt is empty; generation needs at least one token to start from.")
    for text in texts:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"{where}: the prompt holds half of a character (a lone surrogate); leave it out.")


def _encode(index: int, prompt: Any, where: str, tokenizer: Any, new_tokens: int) -> Row:
    """A row that generation reads: its prompt, and how many tokens are to follow."""
    _check(prompt, where)
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        # some tokenizers close every text with an end token, which would end the prompt as well
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{where}: chat messages need a chat template, and this tokenizer has none.")
        prompt = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{where}: the prompt has no tokens; give it some text.")
    return Row(index, prompt, "", tuple(ids), (0,) * new_tokens)


def _check_room(rows: Sequence[Row], places: Sequence[str], limit: int | None) -> None:
    if not rows:
        raise ValueError("There is no prompt; give at least one.")
    long = next((row for row in rows if limit is not None and len(row) > limit), None)
    if long is not None:
        raise ValueError(
            f"{places[long.index]}: its {len(long.prompt_ids)} tokens and {len(long.completion_ids)} new ones "
            f"exceed the model's context of {limit}; shorten it, or generate fewer."
        )


def _pair(row: Row, before: tuple[int, ...], after: tuple[int, ...], tokenizer: Any) -> Pair:
    base, patched = (tokenizer.decode(list(ids), skip_special_tokens=True) for ids in (before, after))
    token = len(commonprefix([before, after])) if before != after else None
    base_ended, patched_ended = (bool(ids) and ids[-1] == tokenizer.eos_token_id for ids in (before, after))
    at = None if token is None else len(commonprefix([base, patched]))
    return Pair(row.index, row.prompt, base, patched, base_ended, patched_ended, token, at)
