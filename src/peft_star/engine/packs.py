"""Rows that begin alike, packed into one sequence so that their common prefix is computed once.

A few-shot prompt is the same in every row of a repair. Packed, it stands once in front of what the rows have of their
own: prefix, suffix 1, suffix 2, ... Each suffix counts its positions on from the prefix, and an attention mask lets it
see the prefix and itself alone. So every token sees what it saw in a row of its own. When that pays, and whether a
model allows it, is told in `prefix.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..failures import Row


@dataclass(frozen=True)
class Pack:
    """Rows with `shared` first tokens in common, as one sequence. One row alone is a pack, too, with `shared` 0."""

    rows: tuple[Row, ...]
    shared: int = 0

    def __len__(self) -> int:
        return self.shared + sum(len(row) - self.shared for row in self.rows)

    def starts(self) -> list[int]:
        """Where each row's own tokens begin in the sequence."""
        starts, start = [], self.shared
        for row in self.rows:
            starts.append(start)
            start += len(row) - self.shared
        return starts

    def input_ids(self) -> list[int]:
        ids = list(self.rows[0].input_ids[: self.shared])
        for row in self.rows:
            ids += row.input_ids[self.shared :]
        return ids

    def position_ids(self) -> list[int]:
        positions = list(range(self.shared))
        for row in self.rows:
            positions += range(self.shared, len(row))
        return positions

    def segments(self) -> list[int]:
        """0 for the prefix, i + 1 for the tokens of row i."""
        segments = [0] * self.shared
        for number, row in enumerate(self.rows, start=1):
            segments += [number] * (len(row) - self.shared)
        return segments

    def medium_positions(self) -> list[int]:
        """Positions in the sequence whose next token, in the row, is a completion token; row after row."""
        return [
            position - self.shared + start
            for row, start in zip(self.rows, self.starts())
            for position in row.medium_positions
        ]


def pad(packs: Sequence[Pack], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Sequences padded on the right to the longest, T tokens.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `position_ids`, `segments` (−1: padding) and `attention_mask` (1: a
        token, 0: padding), each of shape (B, T).
    """
    size = len(packs), max(map(len, packs))
    tensors = {name: torch.zeros(size, dtype=torch.long) for name in ("input_ids", "position_ids", "attention_mask")}
    tensors["segments"] = torch.full(size, -1)
    for number, pack in enumerate(packs):
        length, ids = len(pack), pack.input_ids()
        tensors["input_ids"][number, :length] = torch.tensor(ids)
        # the model's own padding id is masked out either way; repeating a real token keeps embeddings in range
        tensors["input_ids"][number, length:] = ids[-1]
        tensors["position_ids"][number, :length] = torch.tensor(pack.position_ids())
        tensors["segments"][number, :length] = torch.tensor(pack.segments())
        tensors["attention_mask"][number, :length] = 1
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def prefix_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The attention mask of packed sequences: causal, and from a suffix to its prefix and itself alone.

    Args:
        segments (`torch.Tensor`): 0 for the prefix, another number for each suffix and for padding, shape (B, T).
        dtype (`torch.dtype`): The model's.

    Returns:
        `torch.Tensor`: To be added to the attention's logits: 0 or the type's lowest value, shape (B, 1, T, T).
    """
    query, key = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = (seen & ((key == 0) | (key == query)))[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
