"""Passes of a model over rows: the logits at completion tokens, their loss, predictions, greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig

from ..failures import Row
from ..models.inputs import input_device
from .batch import Batch
from .distributed import ALONE, Team
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
def teacher_forced(
    model: nn.Module,
    batches: Sequence[Batch],
    progress: Callable[[int], None] | None = None,
    team: Team = ALONE,
) -> Predictions:
    """The model's predictions at every completion token, given the right tokens before it."""
    predictions = Predictions.empty(sum(len(batch) for batch in batches))
    for batch in team.share(batches):
        predictions.read(batch, completion_logits(model, batch))
        if progress is not None:
            progress(len(batch.items))
    team.join(predictions, batches)
    return predictions


def generate(
    model: nn.Module,
    tokenizer,
    rows: Sequence[Row],
    max_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[int, ...]]:
    """Greedy generation after each row's prompt, as many tokens as its completion has (fewer when the model stops).

    Args:
        model: A causal LM with `generate`.
        tokenizer: Its tokenizer, for the end-of-sequence token.
        rows: The rows.
        max_tokens: Prompts and new tokens of one batch, padding included.
        progress: Called with the number of rows done.

    Returns:
        `list[tuple[int, ...]]`: New token ids per row; equal to `row.completion_ids` when the row is right.
    """
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos if eos is not None else 0
    settings = {"do_sample": False, "num_beams": 1, "eos_token_id": eos, "pad_token_id": pad, "use_cache": True}
    device = input_device(model)
    done: dict[int, tuple[int, ...]] = {}
    group: list[Row] = []

    def flush() -> None:
        width = max(len(row.prompt_ids) for row in group)
        new = max(len(row.completion_ids) for row in group)
        ids = torch.full((len(group), width), pad)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(group):
            ids[number, width - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
            mask[number, width - len(row.prompt_ids) :] = 1
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(**settings, max_new_tokens=new),
        )
        for row, tokens in zip(group, output[:, width:].tolist()):
            tokens = tokens[: len(row.completion_ids)]
            if eos in tokens:
                tokens = tokens[: tokens.index(eos) + 1]
            done[row.index] = tuple(tokens)
        if progress is not None:
            progress(len(group))

    for row in sorted(rows, key=lambda row: (len(row.prompt_ids), len(row.completion_ids))):
        longest = max([len(row.completion_ids), *(len(other.completion_ids) for other in group)])
        if group and (len(group) + 1) * (len(row.prompt_ids) + longest) > max_tokens:
            flush()
            group = []
        group.append(row)
    if group:
        flush()
    return [done[row.index] for row in rows]
