"""What a model says at completion tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .batch import Batch


@dataclass
class Predictions:
    """What the model says at S completion tokens, each of shape (S), on the CPU.

    The `rival` is the most probable of all tokens but the expected one; `margin` is p(expected) − p(rival), `gap` the
    same between their logits.
    """

    expected: torch.Tensor
    argmax: torch.Tensor
    rival: torch.Tensor
    margin: torch.Tensor
    gap: torch.Tensor
    p_expected: torch.Tensor

    @property
    def right(self) -> torch.Tensor:
        return self.argmax == self.expected

    def __getitem__(self, slots: slice | torch.Tensor) -> Predictions:
        """Those at some of the slots, which share their memory with these if it is a slice."""
        return Predictions(*(getattr(self, f.name)[slots] for f in fields(self)))

    def copy(self) -> Predictions:
        return Predictions(*(getattr(self, f.name).clone() for f in fields(self)))

    def solved(self, margin: float) -> torch.Tensor:
        """Right, by more than `margin` in probability."""
        return self.right & (self.margin > margin)

    @classmethod
    def empty(cls, size: int) -> Predictions:
        """Of `size` tokens that nobody has looked at yet."""
        ids = torch.full((size,), -1, dtype=torch.long)
        return cls(*(ids.clone() for _ in range(3)), *(torch.zeros(size) for _ in range(3)))

    @classmethod
    def join(cls, *parts: Predictions) -> Predictions:
        """All tokens of the parts, as tensors of their own."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    @torch.no_grad()
    def read(self, batch: Batch, logits: torch.Tensor) -> None:
        """Read a batch's logits (N, V) into its slots."""
        slots = batch.slots.cpu()
        logits = logits.float()
        log_norm = logits.logsumexp(dim=-1)
        top = logits.topk(2, dim=-1)
        expected = batch.expected.to(logits.device)
        of_expected = logits.gather(-1, expected[:, None])[:, 0]
        argmax = top.indices[:, 0]
        second = (argmax == expected).long()[:, None]
        rival = top.values.gather(-1, second)[:, 0]
        p_expected = (of_expected - log_norm).exp()
        self.expected[slots] = expected.cpu()
        self.argmax[slots] = argmax.cpu()
        self.rival[slots] = top.indices.gather(-1, second)[:, 0].cpu()
        self.p_expected[slots] = p_expected.cpu()
        self.margin[slots] = (p_expected - (rival - log_norm).exp()).cpu()
        self.gap[slots] = (of_expected - rival).cpu()
