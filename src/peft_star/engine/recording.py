"""Hooks around one forward: what goes into and comes out of its parts, and a head that reads a few positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .batch import Batch


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
