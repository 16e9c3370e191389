"""The trace: one forward-backward that yields failures, activations, gradients and logits (paper section 3, figure 1).

Everything later operations need comes from here: Input x Gradient reads v and ∂L/∂v, the least squares read v at the
medium tokens, the first step's gradient is vᵀ ∂L/∂o over all positions, and the first-order occlusion reads the hidden
states and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .batch import Batch, head_reads, loss_at

# v and ∂L/∂o of whole sequences are kept for the first step's gradient while they fit in this many bytes
KEEP_BYTES = 1 << 30


@dataclass
class Predictions:
    """What the model says at S completion tokens: ids and probabilities, each of shape (S), on the CPU."""

    expected: torch.Tensor
    argmax: torch.Tensor
    margin: torch.Tensor
    p_expected: torch.Tensor

    @property
    def right(self) -> torch.Tensor:
        return self.argmax == self.expected

    def solved(self, margin: float) -> torch.Tensor:
        """Right, by more than `margin` in probability."""
        return self.right & (self.margin > margin)


def empty_predictions(size: int) -> Predictions:
    ids = torch.full((size,), -1, dtype=torch.long)
    return Predictions(ids.clone(), ids.clone(), torch.zeros(size), torch.zeros(size))


@torch.no_grad()
def fill_predictions(predictions: Predictions, batch: Batch, logits: torch.Tensor) -> None:
    """Read a batch's logits (N, V) into its slots. The margin is p(expected) − the largest other probability."""
    slots = batch.slots.cpu()
    logits = logits.float()
    log_norm = logits.logsumexp(dim=-1)
    top = logits.topk(2, dim=-1)
    expected = batch.expected.to(logits.device)
    of_expected = logits.gather(-1, expected[:, None])[:, 0]
    argmax = top.indices[:, 0]
    rival = torch.where(argmax == expected, top.values[:, 1], top.values[:, 0])
    p_expected = (of_expected - log_norm).exp()
    predictions.expected[slots] = expected.cpu()
    predictions.argmax[slots] = argmax.cpu()
    predictions.p_expected[slots] = p_expected.cpu()
    predictions.margin[slots] = (p_expected - (rival - log_norm).exp()).cpu()


@dataclass
class LayerTrace:
    """One FFN's part of the trace, over the n medium tokens.

    `activations` is V (n, m); `scores` (m) sums (v ⊙ ∂L/∂v)² over the medium tokens; `inputs` and `output_gradients`
    hold v (·, m) and ∂L/∂o (·, d) of whole sequences, or None when they were too large to keep.
    """

    activations: list[torch.Tensor] = field(default_factory=list)
    scores: torch.Tensor | None = None
    inputs: list[torch.Tensor] | None = field(default_factory=list)
    output_gradients: list[torch.Tensor] | None = field(default_factory=list)

    def gradient(self, neurons: torch.Tensor) -> torch.Tensor | None:
        """∂L/∂delta (k, d) of these neurons, or None when the sequences were not kept."""
        if self.inputs is None:
            return None
        pairs = zip(self.inputs, self.output_gradients)
        return sum(v[:, neurons.to(v.device)].float().T @ g.float() for v, g in pairs)


@dataclass
class Trace:
    """What one forward-backward over the rows yields.

    Attributes:
        predictions: The model's word at all completion tokens.
        medium: Slots (n) of the failures, in the order of every (n, ·) tensor below.
        layers: Per FFN (by module name) its [`LayerTrace`].
        occlusion: Per decoder layer the first-order estimate of how much the loss changes when it is skipped: the
            bound Σ_p ‖∂L/∂h_p‖ ‖h_p − h'_p‖ of the linear term, over positions p with the layer's output h and input
            h'. (The linear term itself cancels between positions and ranks layers worse.)
        hidden_rms: Per decoder layer the root mean square (n) of the hidden state that leaves it.
        loss: Sum of the cross entropy over the medium tokens.
    """

    predictions: Predictions
    medium: torch.Tensor
    layers: dict[str, LayerTrace]
    occlusion: dict[str, float]
    hidden_rms: dict[str, torch.Tensor]
    loss: float


def _hidden(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class _Recorder:
    """Hooks that hold v, o of every FFN and the input and output of every decoder layer during one forward."""

    def __init__(self, ffns: dict[str, nn.Module], decoder_layers: dict[str, nn.Module]):
        self.v: dict[str, torch.Tensor] = {}
        self.o: dict[str, torch.Tensor] = {}
        self.h_in: dict[str, torch.Tensor] = {}
        self.h_out: dict[str, torch.Tensor] = {}
        self._handles = []
        for name, module in ffns.items():
            self._handles.append(module.register_forward_pre_hook(self._record_v(name)))
            self._handles.append(module.register_forward_hook(self._record_o(name)))
        for name, module in decoder_layers.items():
            self._handles.append(module.register_forward_pre_hook(self._record_in(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._record_out(name)))

    def _record_v(self, name: str) -> Callable:
        def hook(module, args):
            v = args[0]
            # nothing below the lowest FFN needs a graph: start it here
            if not v.requires_grad:
                v = v.detach().requires_grad_(True)
            self.v[name] = v
            return (v, *args[1:])

        return hook

    def _record_o(self, name: str) -> Callable:
        def hook(module, args, output):
            self.o[name] = output

        return hook

    def _record_in(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            self.h_in[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _record_out(self, name: str) -> Callable:
        def hook(module, args, output):
            self.h_out[name] = _hidden(output)

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def trace(
    model: nn.Module,
    batches: Sequence[Batch],
    ffns: dict[str, nn.Module],
    decoder_layers: dict[str, nn.Module],
    *,
    only_slots: torch.Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run one forward-backward over the batches, with the loss at the medium tokens alone.

    Args:
        model: A causal LM whose parameters need no gradient.
        batches: The rows, from `make_batches`.
        ffns: The FFNs' second matrices by name.
        decoder_layers: The decoder layers by name.
        only_slots: Trace these failures alone (the `"single"` mode).
        progress: Called with the number of rows done.

    Returns:
        [`Trace`]
    """
    total = sum(len(batch) for batch in batches)
    result = Trace(empty_predictions(total), torch.empty(0, dtype=torch.long), {}, {}, {}, 0.0)
    result.layers = {name: LayerTrace() for name in ffns}
    result.occlusion = dict.fromkeys(decoder_layers, 0.0)
    hidden_rms: dict[str, list[torch.Tensor]] = {name: [] for name in decoder_layers}
    medium_slots: list[torch.Tensor] = []
    kept = 0
    for batch in batches:
        recorder = _Recorder(ffns, decoder_layers)
        try:
            with torch.enable_grad(), head_reads(model, batch):
                output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            recorder.close()
        logits = output.logits[0].float()
        fill_predictions(result.predictions, batch, logits)
        slots = batch.slots.cpu()
        failing = ~result.predictions.right[slots]
        if only_slots is not None:
            failing &= torch.isin(slots, only_slots)
        if failing.any():
            chosen = failing.nonzero()[:, 0].to(logits.device)
            loss = loss_at(logits, batch, chosen)
            result.loss += loss.item()
            medium_slots.append(slots[failing])
            kept = _backward(loss, batch, chosen, recorder, result, hidden_rms, kept)
        if progress is not None:
            progress(len(batch.items))
    if medium_slots:
        result.medium = torch.cat(medium_slots)
        result.hidden_rms = {name: torch.cat(parts) for name, parts in hidden_rms.items()}
    return result


def _backward(loss, batch: Batch, chosen, recorder: _Recorder, result: Trace, hidden_rms, kept: int) -> int:
    """Differentiate one batch's loss and file what the operations need; returns the bytes of sequences kept."""
    names = list(result.layers)
    v, o = [recorder.v[name] for name in names], [recorder.o[name] for name in names]
    # the lowest decoder layers can lie below the graph; their hidden states then have no gradient
    deep = [name for name in result.occlusion if recorder.h_out[name].requires_grad]
    hidden = [recorder.h_out[name] for name in deep]
    gradients = torch.autograd.grad(loss, [*v, *o, *hidden], allow_unused=True)
    v_gradients, o_gradients = gradients[: len(v)], gradients[len(v) : 2 * len(v)]
    rows, positions = batch.rows[chosen.to(batch.rows.device)], batch.positions[chosen.to(batch.rows.device)]
    for name, v_all, v_gradient, o_gradient in zip(names, v, v_gradients, o_gradients):
        layer = result.layers[name]
        # some models hand their FFN all positions of all rows in one dimension
        v_all, v_gradient, o_gradient = (
            tensor.detach().reshape(*batch.input_ids.shape, -1) for tensor in (v_all, v_gradient, o_gradient)
        )
        index = rows.to(v_all.device), positions.to(v_all.device)
        medium = v_all[index]
        layer.activations.append(medium)
        score = (medium.float() * v_gradient[index].float()).square().sum(dim=0)
        layer.scores = score if layer.scores is None else layer.scores + score
        if layer.inputs is not None:
            mask = batch.attention_mask.to(v_all.device).bool()
            layer.inputs.append(v_all[mask])
            layer.output_gradients.append(o_gradient[mask])
            kept += layer.inputs[-1].nbytes + layer.output_gradients[-1].nbytes
    if kept > KEEP_BYTES:
        for layer in result.layers.values():
            layer.inputs = layer.output_gradients = None
    for name, gradient in zip(deep, gradients[2 * len(v) :]):
        if gradient is not None:
            skipped = recorder.h_in[name].detach().to(gradient.device) - recorder.h_out[name].detach()
            result.occlusion[name] += (gradient.float().norm(dim=-1) * skipped.float().norm(dim=-1)).sum().item()
    for name in result.occlusion:
        h = recorder.h_out[name].detach()
        medium = h[rows.to(h.device), positions.to(h.device)]
        hidden_rms[name].append(medium.float().square().mean(dim=-1).sqrt().cpu())
    return kept
