"""Locating "buggy neurons": layers by occlusion, neurons by Input x Gradient (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..engine.batch import Batch
from ..engine.distributed import ALONE, Team
from ..engine.passes import completion_logits, loss_at
from .trace import Trace


def input_x_gradient(trace: Trace) -> dict[str, torch.Tensor]:
    """Attribution of every neuron, `score_j = ‖v_j · ∂L/∂v_j‖₂` over the medium tokens (paper section 3.1).

    Returns:
        `dict[str, torch.Tensor]`: Per FFN its scores, float32, shape (m).
    """
    return {name: layer.scores.sqrt() for name, layer in trace.layers.items() if layer.scores is not None}


@torch.no_grad()
def exact_occlusion(
    model: nn.Module,
    batches: Sequence[Batch],
    decoder_layers: dict[str, nn.Module],
    medium: torch.Tensor,
    loss: float,
    progress: Callable[[int], None] | None = None,
    team: Team = ALONE,
) -> dict[str, float]:
    """Change in loss when one decoder layer is skipped, one forward pass for each (paper section 3.1).

    Args:
        model: The causal LM.
        batches: The traced batches.
        decoder_layers: Decoder layers by name.
        medium: Slots of the failures, shape (n).
        loss: The trace's loss.
        progress: Called with 1 after each layer.
        team: The processes that the batches are dealt out to.

    Returns:
        `dict[str, float]`: Loss with the layer skipped minus `loss`.
    """
    changes = {}
    for name, module in decoder_layers.items():
        with _skipped(module):
            changes[name] = team.total(sum(_medium_loss(model, batch, medium) for batch in team.share(batches))) - loss
        if progress is not None:
            progress(1)
    return changes


def _medium_loss(model: nn.Module, batch: Batch, medium: torch.Tensor) -> float:
    chosen = torch.isin(batch.slots.cpu(), medium)
    if not chosen.any():
        return 0.0
    return loss_at(completion_logits(model, batch), batch, chosen).item()


class _skipped:
    """The decoder layer hands its input on as its output."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        self.input = None
        self.handles = [
            self.module.register_forward_pre_hook(self._keep, with_kwargs=True),
            self.module.register_forward_hook(self._replace),
        ]

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()

    def _keep(self, module, args, kwargs):
        self.input = args[0] if args else kwargs["hidden_states"]

    def _replace(self, module, args, output):
        return (self.input, *output[1:]) if isinstance(output, tuple) else self.input


def rank_agreement(first: dict[str, float], second: dict[str, float], count: int) -> dict[str, float]:
    """How well two occlusion measures agree: Spearman's rank correlation of the magnitudes, and the share of the top
    `count` layers that both name."""
    names = list(first)
    a = torch.tensor([abs(first[name]) for name in names], dtype=torch.float64)
    b = torch.tensor([abs(second[name]) for name in names], dtype=torch.float64)
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    top = [set(values.topk(count).indices.tolist()) for values in (a, b)]
    return {"spearman": torch.corrcoef(ranks)[0, 1].item(), "top_overlap": len(top[0] & top[1]) / count}


def count_of(amount: int | float, total: int, what: str) -> int:
    """Turn a count (int) or a share (float in (0, 1]) of `total` into a count.

    Raises:
        ValueError: More than there are.
    """
    if isinstance(amount, int):
        if amount > total:
            raise ValueError(f"{amount} {what} were asked for, but there are {total}; ask for at most {total}.")
        return amount
    return max(1, round(amount * total))


def candidate_layers(
    names: Sequence[str], selection: str | Sequence[int], num_layers: int | float | None
) -> list[str]:
    """The decoder layers among which a repair may choose; nothing below the lowest of them needs a gradient.

    Args:
        names: The decoder layers that carry the adapter, in order of depth.
        selection: `"last"`: the last `num_layers` of them; `"occlusion"`, `"all"`: every one; or the layers' indices.
        num_layers: Count or share; None: all.

    Raises:
        ValueError: There are fewer layers, or none of the given index.
    """
    if isinstance(selection, str):
        count = len(names) if num_layers is None or selection == "all" else count_of(num_layers, len(names), "layers")
        return list(names[-count:] if selection == "last" else names)
    by_index = {int(name.rpartition(".")[2]): name for name in names}
    wrong = [index for index in selection if index not in by_index]
    if wrong:
        have = ", ".join(map(str, by_index))
        raise ValueError(f"layer_selection names layer {wrong[0]}, but the adapter can patch layers {have}.")
    return [name for index, name in by_index.items() if index in set(selection)]


def select_layers(
    importance: dict[str, float], selection: str | Sequence[int], num_layers: int | float | None
) -> list[str]:
    """The decoder layers to patch, in order of depth.

    Args:
        importance: Change in loss per candidate layer, in order of depth.
        selection: With `"occlusion"` those of the largest change in magnitude; otherwise all candidates.
        num_layers: With `"occlusion"`: count or share.
    """
    names = list(importance)
    if selection != "occlusion" or num_layers is None:
        return names
    count = count_of(num_layers, len(names), "layers")
    chosen = set(sorted(names, key=lambda name: abs(importance[name]), reverse=True)[:count])
    return [name for name in names if name in chosen]


def select_neurons(
    scores: dict[str, torch.Tensor], num_neurons: int | float, pattern: str = "layer-wise"
) -> dict[str, torch.Tensor]:
    """The buggy neurons: those with the highest attribution.

    `"layer-wise"` takes `num_neurons` in each layer; `"model-wise"` spends the same budget where the scores are
    highest over all layers, so some layers may get none (paper section 3.1).

    Args:
        scores: Attribution per layer, each of shape (m).
        num_neurons: Count for each layer, or share.
        pattern: `"layer-wise"` or `"model-wise"`.

    Returns:
        `dict[str, torch.Tensor]`: Per patched layer its neurons, ascending int64, shape (k).
    """
    counts = {name: count_of(num_neurons, values.numel(), f"neurons of {name}") for name, values in scores.items()}
    if pattern == "layer-wise":
        return {name: values.topk(counts[name]).indices.sort().values for name, values in scores.items()}
    sizes = [values.numel() for values in scores.values()]
    top = torch.cat([values.cpu() for values in scores.values()]).topk(sum(counts.values())).indices.sort().values
    chosen, start = {}, 0
    for (name, values), size in zip(scores.items(), sizes):
        inside = top[(top >= start) & (top < start + size)] - start
        if inside.numel():
            chosen[name] = inside.to(values.device)
        start += size
    return chosen
