"""A model's own texts: what it says by itself to some prompts, greedily. What a patch should leave as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..cache import JSON, kept
from ..failures import Row, encode_rows
from ..models.fingerprint import UNKNOWN, fingerprint
from ..models.inputs import context_length
from .engine import Engine
from .passes import generate, teacher_forced

# of a text, prompt apart
TOKENS = 32
# Above this share of the entropy of drawing words by chance a model, one that was never trained, has no own texts.
# SmolLM2-135M-Instruct foretells the prompts with 0.41 of it.
CHANCE = 0.8
# geometric mean of the probabilities of a text's words, below which the model might as well have said another text;
# SmolLM2-135M-Instruct says its texts with 0.29 to 0.79
SURE = 0.2
# every so many texts is kept apart: nothing is protected by it, so it tells what others' texts will do
MEASURED_EVERY = 4

_CACHE: WeakKeyDictionary[nn.Module, OwnTexts] = WeakKeyDictionary()


@dataclass(frozen=True)
class OwnTexts:
    """Texts as rows, whose completions are what the model says.

    Attributes:
        protected: Those that a patch may be solved by.
        measured: Those that it is only measured on.
    """

    protected: Sequence[Row]
    measured: Sequence[Row]


@cache
def own_prompts() -> tuple[dict, ...]:
    """The prompts that come with the package, rows of prose, code and chat without their completions."""
    lines = (files("peft_star") / "data" / "own_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(map(json.loads, lines))


def own_texts(engine: Engine, tokenizer, progress: Callable[[int], None] | None = None) -> OwnTexts:
    """What the model says to the package's prompts; generated once for each model, and kept on disk by fingerprint.

    There are none of a model that foretells these prompts no better than by chance, and what is said without
    preference is left out.

    Args:
        engine: Its model has `generate`; adapters that should not speak are off.
        tokenizer: The model's tokenizer. Without a chat template the chat prompts are left out.
        progress: Called with the number of texts generated.
    """
    model = engine.model
    if model not in _CACHE:
        prompts = _encode(tokenizer, context_length(model))

        def speak() -> list[tuple[int, ...]]:
            if not _foretells(engine, prompts):
                return [()] * len(prompts)
            return _meant(engine, prompts, generate(engine, tokenizer, prompts, progress))

        team = engine.team
        said = kept(
            "own_texts",
            _asked(model, prompts),
            speak,
            JSON,
            lambda said: _whole(said, len(prompts)),
            gather=team.gather,
            writes=team.rank == 0,
        )
        texts = [replace(row, completion_ids=tuple(ids)) for row, ids in zip(prompts, said) if ids]
        _CACHE[model] = OwnTexts(
            *(
                [replace(row, index=index) for index, row in enumerate(part)]
                for part in (
                    [row for number, row in enumerate(texts) if number % MEASURED_EVERY],
                    texts[::MEASURED_EVERY],
                )
            )
        )
    return _CACHE[model]


def _encode(tokenizer, limit: int | None) -> list[Row]:
    """The prompts as rows with room for what the model says."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    rows: list[Row] = []
    for row in own_prompts():
        is_chat = not isinstance(row["prompt"], str)
        if is_chat and not chat:
            continue
        filler = [{"role": "assistant", "content": "a"}] if is_chat else "a"
        try:
            (encoded,) = encode_rows([{**row, "completion": filler}], tokenizer)
        except ValueError:  # a tokenizer that leaves nothing of a prompt, or a template that wants more than a turn
            continue
        # one token all through: a tokenizer that knows no word of it
        known = len(set(encoded.prompt_ids)) > 1
        if known and (limit is None or len(encoded.prompt_ids) + TOKENS <= limit):
            rows.append(replace(encoded, index=len(rows), completion="", completion_ids=(0,) * TOKENS, ended=False))
    return rows


def _foretells(engine: Engine, prompts: Sequence[Row]) -> bool:
    """Whether the model foretells the words of the prompts better than by chance, so that what it says means
    something."""
    rows = [
        replace(row, prompt_ids=row.prompt_ids[:1], completion_ids=row.prompt_ids[1:])
        for row in prompts
        if len(row.prompt_ids) > 1
    ]
    if not rows:
        return False
    p = teacher_forced(engine, engine.batches(rows)).p_expected
    surprisal = p.clamp(min=torch.finfo(p.dtype).tiny).log().neg().mean().item()
    return surprisal <= CHANCE * math.log(_vocabulary(engine.model))


def _meant(engine: Engine, prompts: Sequence[Row], said: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What is said with some preference; in place of other texts, nothing."""
    rows = [replace(row, completion_ids=ids) for row, ids in zip(prompts, said) if ids]
    if not rows:
        return list(said)
    p = teacher_forced(engine, engine.batches(rows)).p_expected
    means = [part.log().mean().exp().item() for part in p.split([len(row.completion_ids) for row in rows])]
    sure = {row.index for row, mean in zip(rows, means) if mean >= SURE}
    return [ids if row.index in sure else () for row, ids in zip(prompts, said)]


def _vocabulary(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _asked(model: nn.Module, prompts: Sequence[Row]) -> str | None:
    """All that the texts depend on: these weights, after these tokens; None where the weights cannot be told."""
    weights = fingerprint(model)
    if weights == UNKNOWN:
        return None
    return json.dumps([weights, CHANCE, SURE, [(row.prompt_ids, len(row.completion_ids)) for row in prompts]])


def _whole(said: Sequence[Sequence[int]], count: int) -> bool:
    """Whether this is one text of tokens for each prompt."""
    return len(said) == count and all(type(token) is int and token >= 0 for ids in said for token in ids)
