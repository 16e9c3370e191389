"""How a model is called: where it takes its tokens, how many, and in which mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def embeddings_of(model: Any) -> Any:
    """The module with the model's input embeddings, whose `weight` has shape (V, d)."""
    return model.get_input_embeddings()


def head_of(model: Any) -> Any:
    """The model's LM head, None where it has none; its `weight` has shape (V, d)."""
    return model.get_output_embeddings()


def text_config(model: Any) -> Any:
    """The configuration of a model, of one with several kinds of inputs that of its text model."""
    return model.config.get_text_config()


def mask_dtype(model: nn.Module) -> torch.dtype:
    """The data type of a model's hidden states where attention begins."""
    return embeddings_of(model).weight.dtype


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens. Embeddings that accelerate offloads have no place of their own between calls."""
    embeddings = embeddings_of(model)
    if not embeddings.weight.is_meta:
        return embeddings.weight.device
    execution = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if execution is None else execution)


def context_length(model: nn.Module) -> int | None:
    """The longest text in tokens that the model takes, as far as its config tells."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    # MPT, whose ALiBi ends there, has another name for it
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
