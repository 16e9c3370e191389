"""Attribution: how much neurons and layers have to do with failures (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.passes import completion_logits, loss_at
from ..engine.recording import skipped


def input_x_gradient(v: torch.Tensor, v_gradient: torch.Tensor) -> torch.Tensor:
    """Input x Gradient: `score_j = ‖v_j · ∂L/∂v_j‖₂` over the medium tokens, squared, so that batches add up.

    Args:
        v, v_gradient: The neurons' activations at medium tokens and the loss' gradient with respect to them, (n, m).

    Returns:
        `torch.Tensor`: Σ (v_j · ∂L/∂v_j)², float32, shape (m).
    """
    return (v.float() * v_gradient.float()).square().sum(dim=0)


def first_order_occlusion(h_in: torch.Tensor, h_out: torch.Tensor, h_gradient: torch.Tensor) -> float:
    """An estimate of how much the loss changes when a layer is skipped, without skipping it.

    The bound Σ_p ‖∂L/∂h_p‖ ‖h_p − h'_p‖ of the linear term, over positions p with the layer's output h and input h'.
    (The linear term itself cancels between positions and ranks layers worse.)

    Args:
        h_in, h_out, h_gradient: h', h and ∂L/∂h, shape (..., d).
    """
    change = h_in.to(h_gradient.device) - h_out
    return (h_gradient.float().norm(dim=-1) * change.float().norm(dim=-1)).sum().item()


@torch.no_grad()
def exact_occlusion(
    engine: Engine,
    decoder_layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    medium: torch.Tensor,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Loss at the medium tokens when one decoder layer is skipped, one forward pass for each.

    Args:
        engine: Runs the passes.
        decoder_layers: Decoder layers by name.
        batches: The traced batches.
        medium: Slots of the failures, shape (n).
        progress: Called with 1 after each layer.

    Returns:
        `dict[str, float]`: The loss by layer.
    """
    losses = {}
    for name, layer in decoder_layers.items():
        with skipped(layer):
            own = sum(_medium_loss(engine.model, batch, medium) for batch in engine.team.share(batches))
        losses[name] = engine.team.total(own)
        if progress is not None:
            progress(1)
    return losses


def _medium_loss(model: nn.Module, batch: Batch, medium: torch.Tensor) -> float:
    chosen = torch.isin(batch.slots.cpu(), medium)
    if not chosen.any():
        return 0.0
    return loss_at(completion_logits(model, batch), batch, chosen).item()


def rank_agreement(first: dict[str, float], second: dict[str, float], count: int) -> dict[str, float]:
    """How well two occlusion measures agree: Spearman's rank correlation of the magnitudes, and the share of the top
    `count` layers that both name."""
    names = list(first)
    a = torch.tensor([abs(first[name]) for name in names], dtype=torch.float64)
    b = torch.tensor([abs(second[name]) for name in names], dtype=torch.float64)
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    top = [set(values.topk(count).indices.tolist()) for values in (a, b)]
    return {"spearman": torch.corrcoef(ranks)[0, 1].item(), "top_overlap": len(top[0] & top[1]) / count}
