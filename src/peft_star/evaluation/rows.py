"""The rows that a model is measured on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..failures import Row, encode_rows
from ..models.inputs import context_length


def encode(model: nn.Module, tokenizer, rows: Iterable[dict[str, Any] | Row]) -> list[Row]:
    """Prompt-completion rows, or [`~peft_star.failures.Row`]s, which stay as they are, as rows for a model.

    Raises:
        TypeError, ValueError: A row or the model does not fit.
    """
    if rows is None or isinstance(rows, (str, bytes, dict)):
        raise TypeError("The rows must be a list (or a dataset) of objects with 'prompt' and 'completion'.")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"{type(model).__name__} has no LM head; an evaluation needs a causal language model.")
    given: list[Any] = rows if isinstance(rows, list) else list(rows)
    if given and all(isinstance(row, Row) for row in given):
        return given
    return encode_rows(given, tokenizer, context_length(model))
