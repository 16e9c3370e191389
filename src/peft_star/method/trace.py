"""The trace: one forward-backward that yields failures, activations, gradients and logits (paper section 3, figure 1).

Everything later operations need comes from here: Input x Gradient reads v and ∂L/∂v, the least squares read v at the
medium tokens, the first step's gradient is vᵀ ∂L/∂o over all positions, and the first-order occlusion reads the hidden
states and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn import functional as F

from ..engine.batch import Batch
from ..engine.distributed import ALONE, Team
from ..engine.passes import loss_at
from ..engine.predictions import Predictions
from ..engine.recording import head_reads

# v and ∂L/∂o of whole sequences are kept for the first step's gradient while they fit in this many bytes
KEEP_BYTES = 1 << 30


@dataclass
class LayerTrace:
    """One FFN's part of the trace, over the n medium tokens of this process's batches.

    `activations` is V (n, m) and `medium_gradients` ∂L/∂o (n, d), in parts; `contexts` (n, m), if wanted, averages v
    over the contexts in which the expected token is plausible; `scores` (m) sums (v ⊙ ∂L/∂v)² over the medium tokens
    of all batches; `inputs` and `output_gradients` hold v (·, m) and ∂L/∂o (·, d) of whole sequences, or None when
    they were not wanted or too large to keep.
    """

    activations: list[torch.Tensor] = field(default_factory=list)
    medium_gradients: list[torch.Tensor] = field(default_factory=list)
    contexts: list[torch.Tensor] = field(default_factory=list)
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
        medium: Slots (n) of the failures, ascending: the order of every (n, ·) tensor.
        layers: Per FFN (by module name) its [`LayerTrace`].
        occlusion: Per decoder layer the first-order estimate of how much the loss changes when it is skipped: the
            bound Σ_p ‖∂L/∂h_p‖ ‖h_p − h'_p‖ of the linear term, over positions p with the layer's output h and input
            h'. (The linear term itself cancels between positions and ranks layers worse.)
        hidden_rms: Per decoder layer the root mean square (n) of the hidden state that leaves it.
        loss: Sum of the cross entropy over the medium tokens.
        own: Those of `medium` that lie in this process's batches.
        team: The processes that the batches are dealt out to.
        averaged: Whether the activations were also averaged over plausible contexts.
    """

    predictions: Predictions
    medium: torch.Tensor
    layers: dict[str, LayerTrace]
    occlusion: dict[str, float]
    hidden_rms: dict[str, torch.Tensor]
    loss: float
    own: torch.Tensor
    team: Team
    averaged: bool = False

    def activations(self, name: str, neurons: torch.Tensor) -> torch.Tensor:
        """V (n, k) of these neurons (k) of the FFN `name`."""
        parts = self.layers[name].activations
        return self._of_all([part.index_select(1, neurons.to(part.device)) for part in parts])

    def contexts(self, name: str, neurons: torch.Tensor) -> torch.Tensor | None:
        """U (n, k): V averaged over the contexts in which the expected tokens are plausible; None: not asked for."""
        parts = self.layers[name].contexts
        return (
            self._of_all([part.index_select(1, neurons.to(part.device)) for part in parts]) if self.averaged else None
        )

    def gradients(self, name: str) -> torch.Tensor:
        """∂L/∂o (n, d) of the FFN `name`."""
        return self._of_all(self.layers[name].medium_gradients)

    def _of_all(self, parts: list[torch.Tensor]) -> torch.Tensor:
        own = torch.cat(parts) if parts else None
        return self.team.place(own, torch.searchsorted(self.medium, self.own), len(self.medium))


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

    def record_head(self, model: nn.Module) -> None:
        """Also keep the representations of all tokens; to be called before the head is told to read only a few."""

        def hook(module, args):
            self.representations = args[0].detach()

        self._handles.append(model.get_output_embeddings().register_forward_pre_hook(hook))

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
    also_slots: torch.Tensor | None = None,
    elsewhere: Predictions | None = None,
    keep_sequences: bool = True,
    with_contexts: bool = False,
    replay: Callable[[Batch], AbstractContextManager] = nullcontext,
    team: Team = ALONE,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run one forward-backward over the batches, with the loss at the medium tokens alone.

    Args:
        model: A causal LM whose parameters need no gradient.
        batches: The rows, from `make_batches`.
        ffns: The FFNs' second matrices by name.
        decoder_layers: The decoder layers by name.
        only_slots: Trace these failures alone (the `"single"` mode).
        also_slots: Trace these tokens, too, whether they fail or not.
        elsewhere: Predictions at all slots, of which the trace replaces those of its batches; None: no others.
        keep_sequences: Keep what [`LayerTrace.gradient`] needs.
        with_contexts: Also average the activations over plausible contexts, see [`plausibility`].
        replay: Context around the forward of a batch, see [`Replay`]; it replays nothing that is traced.
        team: The processes that the batches are dealt out to.
        progress: Called with the number of rows done.

    Returns:
        [`Trace`]
    """
    start = Predictions.empty(sum(len(batch) for batch in batches)) if elsewhere is None else elsewhere
    none = torch.empty(0, dtype=torch.long)
    result = Trace(Predictions.join(start), none, {}, {}, {}, 0.0, none, team, averaged=with_contexts)
    result.layers = {name: LayerTrace() for name in ffns}
    if not keep_sequences:
        for layer in result.layers.values():
            layer.inputs = layer.output_gradients = None
    result.occlusion = dict.fromkeys(decoder_layers, 0.0)
    hidden_rms: dict[str, list[torch.Tensor]] = {name: [] for name in decoder_layers}
    medium_slots = [none]
    kept = 0
    for batch in team.share(batches):
        recorder = _Recorder(ffns, decoder_layers)
        if with_contexts:
            recorder.record_head(model)
        try:
            with torch.enable_grad(), head_reads(model, batch), replay(batch):
                output = model(**batch.model_inputs(), use_cache=False)
        finally:
            recorder.close()
        logits = output.logits[0].float()
        result.predictions.read(batch, logits)
        slots = batch.slots.cpu()
        failing = ~result.predictions.right[slots]
        if only_slots is not None:
            failing &= torch.isin(slots, only_slots)
        if also_slots is not None:
            failing |= torch.isin(slots, also_slots)
        if failing.any():
            chosen = failing.nonzero()[:, 0].to(logits.device)
            loss = loss_at(logits, batch, chosen)
            result.loss += loss.item()
            medium_slots.append(slots[failing])
            if with_contexts:
                weights = plausibility(model, recorder.representations, batch, chosen)
            kept = _backward(loss, batch, chosen, recorder, result, hidden_rms, kept)
            if with_contexts:
                for name, layer in result.layers.items():
                    v = recorder.v[name].detach().reshape(*batch.input_ids.shape, -1)
                    rows = batch.rows.to(v.device)[chosen.to(v.device)]
                    averages = [w.to(v) @ v[row] for w, row in zip(weights, rows)]
                    layer.contexts.append(torch.stack(averages))
        if progress is not None:
            progress(len(batch.items))
    _sort(result, torch.cat(medium_slots), hidden_rms)
    if team.size > 1:
        team.join(result.predictions, batches)
        _join(result)
    return result


def _sort(result: Trace, own: torch.Tensor, hidden_rms: dict[str, list[torch.Tensor]]) -> None:
    """Bring what was found batch by batch, at the slots `own` (n), into the order of the slots."""
    order = own.argsort()
    result.own = result.medium = own[order]
    result.hidden_rms = {name: torch.cat(parts)[order] for name, parts in hidden_rms.items() if parts}
    if len(order) and not torch.equal(order, torch.arange(len(order))):
        for layer in result.layers.values():
            # one tensor at a time, so that no two copies of all of them are held
            layer.activations = [torch.cat(layer.activations)[order.to(layer.activations[0].device)]]
            layer.medium_gradients = [torch.cat(layer.medium_gradients)[order.to(layer.medium_gradients[0].device)]]
            if result.averaged:
                layer.contexts = [torch.cat(layer.contexts)[order.to(layer.contexts[0].device)]]


def _join(result: Trace) -> None:
    """Add what the other processes found; their activations and gradients stay where they are until asked for."""
    scores = {name: None if layer.scores is None else layer.scores.cpu() for name, layer in result.layers.items()}
    found = result.team.gather((result.own, result.loss, result.occlusion, scores, result.hidden_rms))
    slots = torch.cat([part[0] for part in found])
    result.medium, order = slots.sort()
    result.loss = sum(part[1] for part in found)
    result.occlusion = {name: sum(part[2][name] for part in found) for name in result.occlusion}
    for name, layer in result.layers.items():
        parts = [part[3][name] for part in found if part[3][name] is not None]
        layer.scores = sum(parts) if parts else None
    names = {name: None for part in found for name in part[4]}
    result.hidden_rms = {name: torch.cat([p[4][name] for p in found if name in p[4]])[order] for name in names}


@torch.no_grad()
def plausibility(
    model: nn.Module, representations: torch.Tensor, batch: Batch, chosen: torch.Tensor, chunk: int = 256
) -> torch.Tensor:
    """How the contexts before each failure share the plausibility of its expected token.

    Args:
        model: The causal LM.
        representations: What the LM head reads, shape (B, T, d).
        batch: The batch.
        chosen: Indices (n) of the failures among the batch's completion tokens.
        chunk: Positions whose V logits are held at once.

    Returns:
        `torch.Tensor`: Weights (n, T) of each failure's sequence: the model's probability of the expected token at the
        positions before the failure, scaled to the sum 1.
    """
    head = model.get_output_embeddings()
    with align_module_device(head):
        weight, bias = head.weight, getattr(head, "bias", None)
        flat = representations.flatten(0, 1).to(weight.device)
        norms = torch.cat([F.linear(part, weight, bias).float().logsumexp(-1) for part in flat.split(chunk)])
        norms = norms.view(representations.shape[:2])
        index = chosen.to(batch.rows.device)
        rows, expected = batch.rows[index].to(weight.device), batch.expected[index].to(weight.device)
        logits = torch.einsum(
            "ntd,nd->nt", representations[rows.to(representations.device)].to(weight), weight[expected]
        )
        if bias is not None:
            logits = logits + bias[expected][:, None]
    logits = logits.float() - norms[rows]
    positions = batch.positions[index].to(logits.device)[:, None]
    before = torch.arange(logits.shape[1], device=logits.device)[None] < positions
    if batch.segments is not None:
        # behind a shared prefix, a row sees itself only
        segments = batch.segments.to(logits.device)[rows]
        before &= (segments == 0) | (segments == segments.gather(1, positions))
    # the first token has nothing before it
    before[:, 0] |= ~before.any(dim=1)
    return logits.masked_fill(~before, -torch.inf).softmax(dim=1)


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
        layer.medium_gradients.append(o_gradient[index])
        score = (medium.float() * v_gradient[index].float()).square().sum(dim=0)
        layer.scores = score if layer.scores is None else layer.scores + score
        if layer.inputs is not None:
            mask = batch.tokens.to(v_all.device)
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
