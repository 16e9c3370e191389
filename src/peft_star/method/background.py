"""What the neurons do on text that has nothing to do with a repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..engine.distributed import ALONE, Team
from ..models.inputs import input_device

# tokens that are read at once
WINDOW = 256

_CACHE: WeakKeyDictionary[nn.Module, dict[tuple, torch.Tensor]] = WeakKeyDictionary()


@cache
def background_text() -> str:
    """A few pages of prose, code and configuration files that come with the package."""
    return (files("peft_star") / "data" / "background.txt").read_text(encoding="utf-8")


def background_activations(
    model: nn.Module,
    tokenizer,
    ffns: dict[str, nn.Module],
    tokens: int,
    progress: Callable[[int], None] | None = None,
    team: Team = ALONE,
) -> dict[str, torch.Tensor]:
    """Activations of the FFNs' second matrices on the package's background text, computed once for each model.

    Args:
        model: The causal LM.
        tokenizer: Its tokenizer.
        ffns: The second matrices by name.
        tokens: How many tokens of the text are read, in windows of 256.
        progress: Called with 1 after each window.
        team: The processes that the windows are dealt out to.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of each second matrix in this process's windows, in the model's precision,
        shape (N, m); a process without a window has no entries.
    """
    known = _CACHE.setdefault(model, {})
    key = (tokens,) if team.size == 1 else (tokens, team.rank, team.size)
    missing = {name: ffn for name, ffn in ffns.items() if (name, *key) not in known}
    if missing:
        # `truncation` only keeps a tokenizer from warning of a text that no model call will see whole
        ids = tokenizer(
            background_text(), add_special_tokens=False, truncation=True, max_length=tokens, return_tensors="pt"
        )["input_ids"][0]
        config = model.config.get_text_config()
        # MPT, whose ALiBi ends there, has another name for it
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or WINDOW
        found: dict[str, list[torch.Tensor]] = {name: [] for name in missing}
        with torch.no_grad(), _recording(missing, found), _without_head(model):
            for window in ids.split(min(WINDOW, limit))[team.rank :: team.size]:
                model(input_ids=window[None].to(input_device(model)), use_cache=False)
                if progress is not None:
                    progress(1)
        for name, parts in found.items():
            if parts:
                known[(name, *key)] = torch.cat(parts)
    return {name: known[(name, *key)] for name in ffns if (name, *key) in known}


@contextmanager
def _recording(ffns: dict[str, nn.Module], found: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    handles = []
    for name, ffn in ffns.items():

        def record(module, args, kept=found[name]):
            v = args[0]
            kept.append(v.detach().reshape(-1, v.shape[-1]))

        handles.append(ffn.register_forward_pre_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_head(model: nn.Module) -> Iterator[None]:
    """Let the LM head see one position only: its logits are not asked for."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, :1], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
