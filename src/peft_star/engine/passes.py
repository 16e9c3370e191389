"""Passes of a model over rows: the logits at completion tokens, their loss, predictions, greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..failures import Row
from ..models.inputs import input_device
from .batch import Batch
from .engine import Engine
from .predictions import Predictions
from .recording import head_reads


def completion_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (N, V) at the batch's completion tokens."""
    with head_reads(model, batch):
        output = model(**batch.model_inputs(), use_cache=False)
    return output.logits[0]


def loss_at(logits: torch.Tensor, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
    """Cross entropy, summed over the `chosen` (mask of N, or indices) of a batch's logits (N, V)."""
    chosen = chosen.to(logits.device)
    return F.cross_entropy(logits[chosen].float(), batch.expected.to(logits.device)[chosen], reduction="sum")


@torch.no_grad()
def predict(
    engine: Engine,
    batches: Sequence[Batch],
    into: Predictions,
    progress: Callable[[int], None] | None = None,
    replayed: bool = False,
) -> Predictions:
    """Read what the model says at the batches' completion tokens, given the right ones before them, into their slots
    of `into` (S), which is returned. `replayed`: the engine records the batches' lower layers, or replays them."""
    for batch in engine.team.share(batches):
        with engine.replay(batch) if replayed else nullcontext():
            logits = completion_logits(engine.model, batch)
        into.read(batch, logits)
        if progress is not None:
            progress(len(batch.items))
    engine.team.join(into, batches)
    return into


def teacher_forced(
    engine: Engine, batches: Sequence[Batch], progress: Callable[[int], None] | None = None
) -> Predictions:
    """The model's predictions at every completion token of the batches, which number their slots from 0."""
    return predict(engine, batches, Predictions.empty(sum(map(len, batches))), progress)


@torch.no_grad()
def next_tokens(engine: Engine, batches: Sequence[Batch]) -> dict[int, int]:
    """By index of the batches' rows the token that the model says behind their completions."""
    found: dict[int, int] = {}
    for batch in engine.team.share(batches):
        counts = torch.tensor([len(row.completion_ids) for row in batch.items], device=batch.rows.device)
        last = counts.cumsum(0) - 1
        reader = replace(batch, rows=batch.rows[last], positions=batch.positions[last] + 1)
        with engine.replay(batch):
            said = completion_logits(engine.model, reader).argmax(-1)
        found |= dict(zip((row.index for row in batch.items), said.tolist()))
    return {index: token for part in engine.team.gather(found) for index, token in part.items()}


def generate(
    engine: Engine,
    tokenizer,
    rows: Sequence[Row],
    progress: Callable[[int], None] | None = None,
    line_end: bool = False,
) -> list[tuple[int, ...]]:
    """Greedy generation after each row's prompt, as many tokens as its completion has (fewer when the model stops).

    Args:
        engine: Its model has `generate`.
        tokenizer: Its tokenizer, for the end-of-sequence token.
        rows: The rows, dealt out to the engine's processes.
        progress: Called with the number of rows done.
        line_end: Also stop behind the first token with a line's end.

    Returns:
        `list[tuple[int, ...]]`: New token ids per row; equal to `row.completion_ids` when the row is right.
    """
    done: dict[int, tuple[int, ...]] = {}
    for group in _groups(engine.team.share_rows(rows), engine.team.limit(engine.max_batch_tokens, rows)):
        done |= _generate_group(engine.model, tokenizer, group, line_end)
        if progress is not None:
            progress(len(group))
    found = {index: tokens for part in engine.team.gather(done) for index, tokens in part.items()}
    return [found[row.index] for row in rows]


def _groups(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar length, such that prompts and new tokens of a group, padding included, fit."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: (len(row.prompt_ids), len(row.completion_ids))):
        longest = max([len(row.completion_ids), *(len(other.completion_ids) for other in group)])
        if group and (len(group) + 1) * (len(row.prompt_ids) + longest) > max_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


class _LineEnded(StoppingCriteria):
    """Ends a sequence behind its first token with a line's end."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        ended = ["\n" in self.tokenizer.decode([token]) for token in input_ids[:, -1].tolist()]
        return torch.tensor(ended, device=input_ids.device)


def _generate_group(model: Any, tokenizer, group: Sequence[Row], line_end: bool = False) -> dict[int, tuple[int, ...]]:
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos if eos is not None else 0
    width = max(len(row.prompt_ids) for row in group)
    ids = torch.full((len(group), width), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(group):
        ids[number, width - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
        mask[number, width - len(row.prompt_ids) :] = 1
    device = input_device(model)
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            eos_token_id=eos,
            pad_token_id=pad,
            use_cache=True,
            max_new_tokens=max(len(row.completion_ids) for row in group),
        ),
        stopping_criteria=StoppingCriteriaList([_LineEnded(tokenizer)] if line_end else []),
    )
    done = {}
    for row, tokens in zip(group, output[:, width:].tolist()):
        tokens = tokens[: len(row.completion_ids)]
        ends = (n for n, token in enumerate(tokens) if token == eos or line_end and "\n" in tokenizer.decode([token]))
        tokens = tokens[: next(ends, len(tokens)) + 1]
        done[row.index] = tuple(tokens)
    return done
