"""Parts of models: what hangs on them, and one that does nothing."""

from __future__ import annotations

import torch
from torch import nn


def hooks(model: nn.Module) -> int:
    """How many hooks the model's modules have."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def head(v: int = 50, d: int = 12, seed: int = 0) -> torch.Tensor:
    """Weights (v, d) of an LM head, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(v, d, generator=generator, dtype=torch.float64)


class Identity(nn.Module):
    """A decoder layer that hands on its input, alone or before something else."""

    attention_type = "full_attention"

    def __init__(self, returns_tuple: bool):
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return (hidden_states, None) if self.returns_tuple else hidden_states
