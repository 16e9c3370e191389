"""Rows as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..failures import Row
from ..models.inputs import mask_dtype
from .packs import Pack, pad, prefix_mask
from .prefix import pack_rows


@dataclass(eq=False)  # a batch is a key by its identity: tensors do not compare to one truth value
class Batch:
    """B sequences padded on the right to T tokens, holding N completion tokens in all.

    A sequence is a row, or, in a packed batch, several rows behind the prefix that they share (see `prefix.py`).
    `rows` and `positions` (N) say where the N logits are read: entry i is position `positions[i]` of sequence
    `rows[i]`, whose next token should be `expected[i]`. `slots` (N) numbers the completion tokens over all batches.

    Attributes:
        items: The rows.
        input_ids: Token ids, shape (B, T).
        attention_mask: 1 for tokens and 0 for padding, shape (B, T).
        position_ids, segments: Of a packed batch, each token's position in its row and the number of its row in the
            sequence (0: the prefix), shape (B, T).
        dtype: Of a packed batch, the type of its mask.
    """

    items: list[Row]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    expected: torch.Tensor
    slots: torch.Tensor
    position_ids: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return self.expected.numel()

    @property
    def tokens(self) -> torch.Tensor:
        """Which of the B x T tokens are no padding, bool."""
        return self.attention_mask.bool()

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the model is to be called with. The mask (B, 1, T, T) of a packed batch is made anew each time."""
        if self.segments is None or self.dtype is None or self.position_ids is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        mask = prefix_mask(self.segments, self.dtype)
        return {"input_ids": self.input_ids, "attention_mask": mask, "position_ids": self.position_ids}


def completion_offsets(rows: Sequence[Row]) -> list[int]:
    """Number of completion tokens before each row, and at the end their total."""
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row.completion_ids))
    return offsets


def make_batches(
    rows: Sequence[Row],
    max_tokens: int,
    device: torch.device | str = "cpu",
    model: nn.Module | None = None,
) -> list[Batch]:
    """Group rows of similar length so that rows x longest row stays within `max_tokens` (one row always fits).

    Args:
        rows: The rows.
        max_tokens: Tokens of a batch, padding included.
        device: Where the batches go.
        model: With the model that they are for, rows that begin alike are packed behind their common prefix, if that
            saves computation and this model computes the same then. Losses and gradients agree up to rounding.
    """
    offsets = dict(zip((row.index for row in rows), completion_offsets(rows)))
    dtype = None if model is None else mask_dtype(model)
    packs = [Pack((row,)) for row in rows] if model is None else pack_rows(rows, max_tokens, model)
    batches = []
    # packed sequences need a mask of T² entries, so they keep to themselves
    for packed in (False, True):
        group: list[Pack] = []
        for pack in sorted((pack for pack in packs if (len(pack.rows) > 1) == packed), key=len):
            if group and (len(group) + 1) * len(pack) > max_tokens:
                batches.append(_collate(group, offsets, device, dtype if packed else None))
                group = []
            group.append(pack)
        if group:
            batches.append(_collate(group, offsets, device, dtype if packed else None))
    return batches


def _collate(
    packs: list[Pack], offsets: dict[int, int], device: torch.device | str, dtype: torch.dtype | None
) -> Batch:
    """A batch of sequences, packed if they come with the `dtype` of their mask."""
    tensors = pad(packs, device)
    packed = (None, None) if dtype is None else (tensors["position_ids"], tensors["segments"])
    items: list[Row] = []
    rows: list[int] = []
    positions: list[int] = []
    expected: list[int] = []
    slots: list[int] = []
    for number, pack in enumerate(packs):
        items += pack.rows
        positions += pack.medium_positions()
        for row in pack.rows:
            rows += [number] * len(row.completion_ids)
            expected += row.completion_ids
            slots += range(offsets[row.index], offsets[row.index] + len(row.completion_ids))
    tokens = tensors["input_ids"], tensors["attention_mask"]
    at, places, wanted, numbers = (torch.tensor(part, device=device) for part in (rows, positions, expected, slots))
    position_ids, segments = packed
    return Batch(items, *tokens, at, places, wanted, numbers, position_ids, segments, dtype)
