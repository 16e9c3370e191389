"""Rows as padded batches, and the logits at just the positions whose next token is a completion token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .failures import Row


@dataclass(eq=False)  # a batch is a key by its identity: tensors do not compare to one truth value
class Batch:
    """B rows padded on the right to T tokens, holding N completion tokens in all.

    `rows` and `positions` (N) say where the N logits are read: entry i is position `positions[i]` of row `rows[i]`,
    whose next token should be `expected[i]`. `slots` (N) numbers the completion tokens over all batches.
    """

    items: list[Row]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    expected: torch.Tensor
    slots: torch.Tensor

    def __len__(self) -> int:
        return self.expected.numel()


def completion_offsets(rows: Sequence[Row]) -> list[int]:
    """Number of completion tokens before each row, and at the end their total."""
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row.completion_ids))
    return offsets


def make_batches(rows: Sequence[Row], max_tokens: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Group rows of similar length so that rows x longest row stays within `max_tokens` (one row always fits)."""
    offsets = dict(zip((row.index for row in rows), completion_offsets(rows)))
    batches, group = [], []
    for row in sorted(rows, key=len):
        if group and (len(group) + 1) * len(row) > max_tokens:
            batches.append(_collate(group, offsets, device))
            group = []
        group.append(row)
    if group:
        batches.append(_collate(group, offsets, device))
    return batches


def _collate(group: list[Row], offsets: dict[int, int], device: torch.device | str) -> Batch:
    width = max(len(row) for row in group)
    input_ids = torch.zeros(len(group), width, dtype=torch.long)
    attention_mask = torch.zeros(len(group), width, dtype=torch.long)
    rows, positions, expected, slots = [], [], [], []
    for number, row in enumerate(group):
        input_ids[number, : len(row)] = torch.tensor(row.input_ids)
        # the model's own padding id is masked out either way; repeating a real token keeps embeddings in range
        input_ids[number, len(row) :] = row.input_ids[-1]
        attention_mask[number, : len(row)] = 1
        rows += [number] * len(row.completion_ids)
        positions += row.medium_positions
        expected += row.completion_ids
        slots += range(offsets[row.index], offsets[row.index] + len(row.completion_ids))
    index = [torch.tensor(values, device=device) for values in (rows, positions, expected, slots)]
    return Batch(group, input_ids.to(device), attention_mask.to(device), *index)


@contextmanager
def head_reads(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Let the LM head see only the batch's N representations, (1, N, d) instead of (B, T, d).

    What the model does behind its head (scaling, soft-capping, bias) still happens, on N rows of logits.
    """
    head = model.get_output_embeddings()

    def gather(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        rows, positions = batch.rows.to(hidden.device), batch.positions.to(hidden.device)
        return (hidden[rows, positions].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def completion_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (N, V) at the batch's completion tokens."""
    with head_reads(model, batch):
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return output.logits[0]


def loss_at(logits: torch.Tensor, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
    """Cross entropy, summed over the `chosen` (mask of N, or indices) of a batch's logits (N, V)."""
    chosen = chosen.to(logits.device)
    return F.cross_entropy(logits[chosen].float(), batch.expected.to(logits.device)[chosen], reduction="sum")
