"""Batches that memory does not hold: the work starts over with batches of half the size."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from .distributed import is_distributed

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; on a CPU torch has no kind of its own for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def halving(attempt: Callable[[int], T], tokens: int, least: int) -> T:
    """Call `attempt` with the tokens of a batch, and again with half of them as often as memory runs out.

    Args:
        attempt: The whole work, which has to start over.
        tokens: Tokens of a batch at first.
        least: The longest row, which no batch can be shorter than.

    Raises:
        MemoryError: Not even single rows fit.

    One of several processes does not start over: the others would wait for it, so the error ends all of them.
    """
    while True:
        try:
            return attempt(tokens)
        except (RuntimeError, MemoryError) as error:
            # of several processes the others would wait for this one
            if not is_out_of_memory(error) or is_distributed():
                raise
            if tokens <= least:
                raise MemoryError(
                    f"Memory does not hold a single row, the longest of which has {least} tokens; shorten it, or take "
                    "a smaller model, data type or number of layers."
                ) from error
        # outside the handler, whose exception holds the frames and with them the tensors
        half = max(least, tokens // 2)
        warnings.warn(f"Batches of {tokens} tokens do not fit into memory; starting over with {half}.", stacklevel=3)
        tokens = half
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
