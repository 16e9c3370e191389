"""The trace: one forward-backward that yields failures, activations, gradients and logits (paper section 3, figure 1).

Everything later operations need comes from here: Input x Gradient reads v and ∂L/∂v, the least squares read v at the
medium tokens, the first step's gradient is vᵀ ∂L/∂o over all positions, and the first-order occlusion reads the hidden
states and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..engine.batch import Batch
from ..engine.distributed import Team
from ..engine.engine import Engine
from ..engine.passes import loss_at
from ..engine.predictions import Predictions
from ..engine.recording import Recording, head_reads, recording
from ..failures import Row
from ..models.inputs import head_of
from .attribution import first_order_occlusion, input_x_gradient
from .plausibility import plausibility

# v and ∂L/∂o of whole sequences are kept for the first step's gradient while they fit in this many bytes
KEEP_BYTES = 1 << 30


@dataclass(frozen=True)
class Probe:
    """What a trace reads.

    Attributes:
        ffns: The FFNs' second matrices by name.
        decoder_layers: The decoder layers by name.
        sequences: Whether to keep what [`LayerTrace.gradient`] needs.
        contexts: Whether to average the activations over plausible contexts, too, see [`plausibility`].
    """

    ffns: dict[str, nn.Module]
    decoder_layers: dict[str, nn.Module]
    sequences: bool = True
    contexts: bool = False


@dataclass
class LayerTrace:
    """One FFN's part of the trace, over the n medium tokens of this process's batches, batch by batch.

    `activations` is V (n, m) and `gradients` ∂L/∂o (n, d); `contexts` (n, m), if wanted, averages v over the contexts
    in which the expected token is plausible; `squares` (m) sums the squares of Input x Gradient over the medium tokens
    of all batches; `inputs` and `output_gradients` hold v (·, m) and ∂L/∂o (·, d) of whole sequences, or None when
    they were not wanted or too large to keep.
    """

    activations: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    contexts: list[torch.Tensor] = field(default_factory=list)
    squares: torch.Tensor | None = None
    inputs: list[torch.Tensor] | None = field(default_factory=list)
    output_gradients: list[torch.Tensor] | None = field(default_factory=list)

    def gradient(self, neurons: torch.Tensor) -> torch.Tensor | None:
        """∂L/∂delta (k, d) of these neurons, or None when the sequences were not kept."""
        if self.inputs is None or self.output_gradients is None:
            return None
        pairs = zip(self.inputs, self.output_gradients)
        # a process without a batch adds nothing
        return sum((v[:, neurons.to(v.device)].float().T @ g.float() for v, g in pairs), start=torch.zeros(()))


@dataclass
class Trace:
    """What one forward-backward over the rows yields.

    Attributes:
        batches: The rows.
        predictions: The model's word at all completion tokens (S).
        medium: Slots (n) of the failures, ascending: the order of every (n, ·) tensor.
        layers: Per FFN (by module name) its [`LayerTrace`].
        occlusion: Per decoder layer the [`first_order_occlusion`].
        hidden_rms: Per decoder layer the root mean square (n) of the hidden state that leaves it.
        loss: Sum of the cross entropy over the medium tokens.
        own: Those of `medium` that lie in this process's batches, in the order of the layers' parts.
        team: The processes that the batches are dealt out to.
    """

    batches: Sequence[Batch]
    predictions: Predictions
    medium: torch.Tensor
    layers: dict[str, LayerTrace]
    occlusion: dict[str, float]
    hidden_rms: dict[str, torch.Tensor]
    loss: float
    own: torch.Tensor
    team: Team

    def rows(self) -> list[Row]:
        """Of each failure (n) its row."""
        found: dict[int, Row] = {}
        for batch in self.batches:
            rows = (row for row in batch.items for _ in row.completion_ids)
            found |= zip(batch.slots.tolist(), rows)
        return [found[slot] for slot in self.medium.tolist()]

    def scores(self) -> dict[str, torch.Tensor]:
        """Per FFN the neurons' Input x Gradient, float32, shape (m)."""
        return {name: layer.squares.sqrt() for name, layer in self.layers.items() if layer.squares is not None}

    def activations(self, name: str, neurons: torch.Tensor) -> torch.Tensor:
        """V (n, k) of these neurons (k) of the FFN `name`."""
        return self._of_all(self.layers[name].activations, neurons)

    def contexts(self, name: str, neurons: torch.Tensor) -> torch.Tensor:
        """U (n, k): V averaged over the contexts in which the expected tokens are plausible, if that was asked for."""
        return self._of_all(self.layers[name].contexts, neurons)

    def gradients(self, name: str) -> torch.Tensor:
        """∂L/∂o (n, d) of the FFN `name`."""
        return self._of_all(self.layers[name].gradients)

    def _of_all(self, parts: list[torch.Tensor], columns: torch.Tensor | None = None) -> Any:
        """The parts of all processes in the order of the slots; None where none was asked for."""
        if columns is not None:
            parts = [part.index_select(1, columns.to(part.device)) for part in parts]
        own = torch.cat(parts) if parts else None
        return self.team.place(own, torch.searchsorted(self.medium, self.own), len(self.medium))


def trace(
    engine: Engine,
    batches: Sequence[Batch],
    probe: Probe,
    *,
    only: torch.Tensor | None = None,
    at: torch.Tensor | None = None,
    thin: Callable[[Predictions, torch.Tensor], torch.Tensor] | None = None,
    start: Predictions | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run one forward-backward over the batches, with the loss at the medium tokens alone.

    Args:
        engine: Runs the pass; its model's parameters need no gradient, and it replays nothing that is traced.
        batches: The rows.
        probe: What is read on the way.
        only: Trace the failures among these slots alone (the `"single"` mode).
        at: Trace just these slots, whether they fail or not.
        thin: Says of some slots (n), given what the model says at them, which count as failures although they are
            right.
        start: Predictions (S) at all slots, of which the trace replaces those of its batches; None: no others.
        progress: Called with the number of rows done.

    Returns:
        [`Trace`]
    """
    predictions = Predictions.empty(sum(map(len, batches))) if start is None else start.copy()
    layers = {name: LayerTrace() for name in probe.ffns}
    if not probe.sequences:
        for layer in layers.values():
            layer.inputs = layer.output_gradients = None
    none = torch.empty(0, dtype=torch.long)
    result = Trace(
        batches, predictions, none, layers, dict.fromkeys(probe.decoder_layers, 0.0), {}, 0.0, none, engine.team
    )
    hidden_rms: dict[str, list[torch.Tensor]] = {name: [] for name in probe.decoder_layers}
    slots_traced = [none]
    head = head_of(engine.model) if probe.contexts else None
    for batch in engine.team.share(batches):
        # the recording's hook on the head comes first: it sees all positions
        with recording(probe.ffns, probe.decoder_layers, head) as seen, torch.enable_grad():
            with head_reads(engine.model, batch), engine.replay(batch):
                logits = engine.model(**batch.model_inputs(), use_cache=False).logits[0].float()
        predictions.read(batch, logits)
        chosen = _chosen(predictions, batch.slots.cpu(), only, at, thin)
        if chosen.any():
            slots_traced.append(batch.slots.cpu()[chosen])
            index = chosen.nonzero()[:, 0].to(logits.device)
            loss = loss_at(logits, batch, index)
            result.loss += loss.item()
            _differentiate(loss, batch, index, seen, result)
            for name, values in _hidden_rms(batch, index, seen).items():
                hidden_rms[name].append(values)
            if seen.head is not None:
                weights = plausibility(engine.model, seen.head, batch, index)
                _average_contexts(weights, batch, index, seen, layers)
        if progress is not None:
            progress(len(batch.items))
    _sort(result, torch.cat(slots_traced), hidden_rms)
    if engine.team.size > 1:
        engine.team.join(predictions, batches)
        _join(result)
    return result


def _chosen(
    predictions: Predictions,
    slots: torch.Tensor,
    only: torch.Tensor | None,
    at: torch.Tensor | None,
    thin: Callable[[Predictions, torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Which of a batch's slots are traced."""
    if at is not None:
        return torch.isin(slots, at)
    failing = ~predictions.right[slots]
    if thin is not None:
        failing = failing | thin(predictions[slots], slots)
    return failing if only is None else failing & torch.isin(slots, only)


def _places(batch: Batch, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence and position of some of a batch's completion tokens' medium tokens."""
    index = index.to(batch.rows.device)
    return batch.rows[index], batch.positions[index]


def _differentiate(loss: torch.Tensor, batch: Batch, index: torch.Tensor, seen: Recording, result: Trace) -> None:
    """Differentiate one batch's loss and file what the operations need."""
    v, o = [seen.v[name] for name in result.layers], [seen.o[name] for name in result.layers]
    # the lowest decoder layers can lie below the graph; their hidden states then have no gradient
    deep = [name for name in result.occlusion if seen.h_out[name].requires_grad]
    gradients = torch.autograd.grad(loss, [*v, *o, *(seen.h_out[name] for name in deep)], allow_unused=True)
    v_gradients, o_gradients = gradients[: len(v)], gradients[len(v) : 2 * len(v)]
    rows, positions = _places(batch, index)
    kept = 0
    for layer, v_all, v_gradient, o_gradient in zip(result.layers.values(), v, v_gradients, o_gradients):
        # some models hand their FFN all positions of all rows in one dimension
        v_all, v_gradient, o_gradient = (
            tensor.detach().reshape(*batch.input_ids.shape, -1) for tensor in (v_all, v_gradient, o_gradient)
        )
        place = rows.to(v_all.device), positions.to(v_all.device)
        layer.activations.append(v_all[place])
        layer.gradients.append(o_gradient[place])
        squares = input_x_gradient(v_all[place], v_gradient[place])
        layer.squares = squares if layer.squares is None else layer.squares + squares
        if layer.inputs is not None and layer.output_gradients is not None:
            mask = batch.tokens.to(v_all.device)
            layer.inputs.append(v_all[mask])
            layer.output_gradients.append(o_gradient[mask])
            kept += sum(part.nbytes for part in (*layer.inputs, *layer.output_gradients))
    if kept > KEEP_BYTES:
        for layer in result.layers.values():
            layer.inputs = layer.output_gradients = None
    for name, gradient in zip(deep, gradients[2 * len(v) :]):
        if gradient is not None:
            h_in, h_out = seen.h_in[name].detach(), seen.h_out[name].detach()
            result.occlusion[name] += first_order_occlusion(h_in, h_out, gradient)


def _hidden_rms(batch: Batch, index: torch.Tensor, seen: Recording) -> dict[str, torch.Tensor]:
    found = {}
    rows, positions = _places(batch, index)
    for name, h in seen.h_out.items():
        medium = h.detach()[rows.to(h.device), positions.to(h.device)]
        found[name] = medium.float().square().mean(dim=-1).sqrt().cpu()
    return found


def _average_contexts(
    weights: torch.Tensor, batch: Batch, index: torch.Tensor, seen: Recording, layers: dict[str, LayerTrace]
) -> None:
    rows, _ = _places(batch, index)
    for name, layer in layers.items():
        v = seen.v[name].detach().reshape(*batch.input_ids.shape, -1)
        layer.contexts.append(torch.stack([w.to(v) @ v[row] for w, row in zip(weights, rows.to(v.device))]))


def _sort(result: Trace, own: torch.Tensor, hidden_rms: dict[str, list[torch.Tensor]]) -> None:
    """Bring what was found batch by batch, at the slots `own` (n), into the order of the slots."""
    order = own.argsort()
    result.own = result.medium = own[order]
    result.hidden_rms = {name: torch.cat(parts)[order] for name, parts in hidden_rms.items() if parts}
    if len(order) and not torch.equal(order, torch.arange(len(order))):
        for layer in result.layers.values():
            for parts in (layer.activations, layer.gradients, layer.contexts):
                if parts:
                    # one tensor at a time, so that no two copies of all of them are held
                    parts[:] = [torch.cat(parts)[order.to(parts[0].device)]]


def _join(result: Trace) -> None:
    """Add what the other processes found; their activations and gradients stay where they are until asked for."""
    squares = {name: None if layer.squares is None else layer.squares.cpu() for name, layer in result.layers.items()}
    found = result.team.gather((result.own, result.loss, result.occlusion, squares, result.hidden_rms))
    slots = torch.cat([part[0] for part in found])
    result.medium, order = slots.sort()
    result.loss = sum(part[1] for part in found)
    result.occlusion = {name: sum(part[2][name] for part in found) for name in result.occlusion}
    for name, layer in result.layers.items():
        parts = [part[3][name] for part in found if part[3][name] is not None]
        layer.squares = sum(parts) if parts else None
    names = {name: None for part in found for name in part[4]}
    result.hidden_rms = {name: torch.cat([p[4][name] for p in found if name in p[4]])[order] for name in names}
