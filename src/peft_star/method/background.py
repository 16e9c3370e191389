"""What the neurons do on text that has nothing to do with a repair."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..engine.distributed import ALONE, Team
from ..engine.engine import Engine
from ..engine.recording import head_reads, recording_inputs
from ..models.inputs import context_length, input_device

# tokens that are read at once
WINDOW = 256
# ε of the second moment, relative to its mean diagonal: neurons that the background never shows are not free
FLOOR = 0.1

_CACHE: WeakKeyDictionary[nn.Module, dict[tuple, torch.Tensor]] = WeakKeyDictionary()


@cache
def background_text() -> str:
    """A few pages of prose, code and configuration files that come with the package."""
    return (files("peft_star") / "data" / "background.txt").read_text(encoding="utf-8")


def background_activations(
    engine: Engine,
    tokenizer,
    ffns: dict[str, nn.Module],
    tokens: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Activations of the FFNs' second matrices on the package's background text, computed once for each model.

    Args:
        engine: Its model reads the text, its processes share the windows.
        tokenizer: The model's tokenizer.
        ffns: The second matrices by name.
        tokens: How many tokens of the text are read, in windows of 256.
        progress: Called with 1 after each window.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of each second matrix in this process's windows, in the model's precision,
        shape (N, m); a process without a window has no entries.
    """
    model, team = engine.model, engine.team
    known = _CACHE.setdefault(model, {})
    part = (tokens,) if team.size == 1 else (tokens, team.rank, team.size)
    keys = {name: (name, *part) for name in ffns}
    missing = {name: ffn for name, ffn in ffns.items() if keys[name] not in known}
    if missing:
        # `truncation` only keeps a tokenizer from warning of a text that no model call will see whole
        ids = tokenizer(
            background_text(), add_special_tokens=False, truncation=True, max_length=tokens, return_tensors="pt"
        )["input_ids"][0]
        limit = context_length(model) or WINDOW
        with torch.no_grad(), recording_inputs(missing) as found, head_reads(model, None):
            for window in ids.split(min(WINDOW, limit))[team.rank :: team.size]:
                model(input_ids=window[None].to(input_device(model)), use_cache=False)
                if progress is not None:
                    progress(1)
        for name, parts in found.items():
            if parts:
                known[keys[name]] = torch.cat(parts)
    return {name: known[key] for name, key in keys.items() if key in known}


def moment_factor(*groups: torch.Tensor, team: Team = ALONE) -> torch.Tensor:
    """Lower Cholesky factor L (k, k), float64, of C + ε I = L Lᵀ, with C the sum of the second moments of some groups
    of activations (N, k), of each of which this process holds its part; N may be 0."""
    moment = torch.zeros(())
    for group in groups:
        b = group.double()
        moment = moment + team.sum(b.T @ b) / max(1, team.total(len(b)))
    moment.diagonal().add_(floor_of(moment.diagonal().mean()))
    return torch.linalg.cholesky(moment)


def floor_of(mean: torch.Tensor) -> torch.Tensor:
    """ε for a second moment whose diagonal has this mean; above 0 also where nothing was ever shown."""
    return mean.clamp(min=torch.finfo(torch.float32).tiny) * FLOOR
