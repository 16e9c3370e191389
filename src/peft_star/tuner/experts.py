"""The adapter layer for routed experts: neurons of all experts of one mixture, as transformers 5 stores them.

The experts of a layer are one module with parameters of three dimensions: `down_proj` (E, d, m) holds the second
matrices W_e of the E experts. With the routing weight r_e(x), zero for experts that x is not sent to, its output is
o = Σ_e r_e(x) W_e v_e(x), which is one linear map of all experts' scaled activations u = (r_e v_e)_e of size E·m. So
the mixture has E·m neurons, neuron e·m + j is column j of W_e, and all that STAR does with a second matrix applies.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..models import structure
from .config import StarConfig
from .layer import StarLayer


class SecondMatrix(nn.Module):
    """The experts' second matrices as one linear map, run through only while something hooks it.

    `forward(u, layer, mixed_bias)` takes u (T, E·m), as a linear layer takes its input, and returns o (T, d) with the
    active deltas; so a trace that records a linear layer's input and output records routed experts through this.
    """

    def forward(self, u: torch.Tensor, layer: Experts, mixed_bias: torch.Tensor | None = None) -> torch.Tensor:
        experts = layer.get_base_layer()
        equation = "tem,emd->td" if experts.is_transposed else "tem,edm->td"
        result = torch.einsum(equation, u.unflatten(-1, (layer.num_experts, -1)), experts.down_proj)
        if mixed_bias is not None:
            result = result + mixed_bias
        return layer.add_deltas(result, lambda neurons: u.index_select(-1, neurons))


class Experts(nn.Module, StarLayer):
    """STAR implemented in the routed experts of a mixture.

    For hidden states x (T, d) with their experts and routing weights (T, K), the forward pass is `y = base(x) +
    u[:, neurons] @ delta`. Only the activations of the patched neurons are computed anew: two rows of the up
    projection for each, whatever implementation the base uses. `star_neurons` are indices e·m + j in [0, E·m).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: StarConfig,
        num_neurons: int,
        module_name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        StarLayer.__init__(self, base_layer, **kwargs)
        shape = structure.routed_shape(self.get_base_layer())
        assert shape is not None  # or it would be no target
        self.num_experts, self.neurons_per_expert, _ = shape
        self.second = SecondMatrix()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, num_neurons, config=config, module_name=module_name)

    def _base_shape(self) -> tuple[int, int]:
        shape = structure.neuron_shape(self.get_base_layer())
        assert shape is not None  # or it would be no target
        return shape

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.down_proj.device, base_layer.down_proj.dtype

    @property
    def _experts(self) -> Any:
        """The base layer, whose attributes are those of a mixture of experts."""
        return self.get_base_layer()

    @property
    def weight(self) -> torch.Tensor:
        return self._experts.down_proj

    @property
    def bias(self) -> Any:
        """b (E, d), or None."""
        return getattr(self.get_base_layer(), "down_proj_bias", None)

    # forward

    def _routing(self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Routing weights (T, E), zero for experts that a token is not sent to."""
        # some routers mark an unused slot by the index E
        routing = top_k_weights.new_zeros(top_k_index.shape[0], self.num_experts + 1)
        return routing.scatter_add(1, top_k_index.long(), top_k_weights)[:, : self.num_experts]

    def activations(self, x: torch.Tensor, routing: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """u[:, neurons]: the activations (T, k) of `neurons` times the routing weights of their experts.

        Args:
            x: Hidden states (T, d).
            routing: Routing weights (T, E).
            neurons: Indices (k) in [0, E·m).
        """
        experts = self._experts
        neurons = neurons.long()
        expert, neuron = neurons // self.neurons_per_expert, neurons % self.neurons_per_expert
        if not experts.has_gate:
            v = experts.act_fn(self._up(x, "up_proj", expert, neuron))
        else:
            width = self.neurons_per_expert
            columns = (neuron, neuron + width) if experts.is_concatenated else (2 * neuron, 2 * neuron + 1)
            halves = [self._up(x, "gate_up_proj", expert, column) for column in columns]
            # the experts' own gate expects the layout that their projection gives
            joined = torch.cat(halves, -1) if experts.is_concatenated else torch.stack(halves, -1).flatten(-2)
            v = experts._apply_gate(joined)
        weight = routing.index_select(1, expert)
        # what no expert was asked for must not matter, even where it overflows
        return v.masked_fill(weight == 0, 0.0) * weight.to(v.dtype)

    def _up(self, x: torch.Tensor, name: str, expert: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Rows of an up projection, chosen by expert and row, applied to x (T, d): (T, k)."""
        experts = self._experts
        parameter = getattr(experts, name)
        weight = parameter[expert, :, row] if experts.is_transposed else parameter[expert, row]
        bias = getattr(experts, f"{name}_bias")[expert, row] if experts.has_bias else None
        return nn.functional.linear(x, weight, bias)

    def add_deltas(self, result: torch.Tensor, activations_of: Any) -> torch.Tensor:
        """Add the active adapters' parts to `result` (T, d); `activations_of` maps neurons (k) to u (T, k)."""
        dtype = result.dtype
        for active_adapter in self.active_adapters:
            if active_adapter not in self.star_delta.keys():
                continue
            delta = self.star_delta[active_adapter]
            activations = activations_of(self.star_neurons[active_adapter])
            result = result + self._cast_input_dtype(activations, delta.dtype) @ delta
        return result.to(dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("STAR does not support mixed batches: `adapter_names` cannot be passed to forward.")
        inputs = (hidden_states, top_k_index, top_k_weights, *args)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*inputs, **kwargs)

        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self._routing(top_k_index, top_k_weights)
        if self.second._forward_hooks or self.second._forward_pre_hooks:
            every = torch.arange(self.in_features, device=x.device)
            bias = routing.to(self.bias.dtype) @ self.bias if self._experts.has_bias else None
            return self.second(self.activations(x, routing, every), self, bias).view_as(hidden_states)
        result = self.base_layer(*inputs, **kwargs)
        flat = result.reshape(-1, self.out_features)
        return self.add_deltas(flat, lambda neurons: self.activations(x, routing, neurons)).view_as(result)

    # merge

    def _columns(self, neurons: torch.Tensor) -> tuple[Any, ...]:
        """The index of these neurons' columns in `down_proj`, which then read (k, d) whatever the layout is."""
        expert, neuron = neurons // self.neurons_per_expert, neurons % self.neurons_per_expert
        return (expert, neuron) if self.get_base_layer().is_transposed else (expert, slice(None), neuron)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the experts' second matrices

        Args:
            safe_merge (`bool`, *optional*):
                If True, nothing is written unless the merged columns are finite. Defaults to `False`.
            adapter_names (`List[str]`, *optional*):
                The list of adapter names that should be merged. If None, all active adapters will be merged. Defaults
                to `None`.

        Raises:
            ValueError: `safe_merge` found NaN or infinite values.
        """
        for active_adapter in check_adapters_to_merge(self, adapter_names) or []:
            if active_adapter not in self.star_delta.keys():
                continue
            weight = self.weight.data
            neurons = self.star_neurons[active_adapter].to(weight.device, torch.int64)
            columns = weight[self._columns(neurons)]
            weight[self._columns(neurons)] = self._merged(
                columns, self.star_delta[active_adapter], active_adapter, safe_merge
            )
            self._merged_columns[active_adapter] = (neurons, columns)
            self.merged_adapters.append(active_adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights, the last merged first.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while len(self.merged_adapters) > 0:
            neurons, columns = self._merged_columns.pop(self.merged_adapters.pop())
            weight = self.weight.data
            weight[self._columns(neurons.to(weight.device))] = columns.to(weight.device, weight.dtype)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute the delta weight for the given adapter.

        Args:
            adapter (str):
                The name of the adapter for which the delta weight should be computed.

        Returns:
            A dense tensor of the shape of `down_proj`, (E, d, m) or (E, m, d), in the delta's dtype.
        """
        delta = self.star_delta[adapter]
        neurons = self.star_neurons[adapter].to(device=delta.device, dtype=torch.int64)
        weight = torch.zeros((self.in_features, self.out_features), dtype=delta.dtype, device=delta.device)
        weight = weight.index_copy(0, neurons, delta).unflatten(0, (self.num_experts, -1))
        return weight if self.get_base_layer().is_transposed else weight.transpose(1, 2)

    def __repr__(self) -> str:
        rep = super().__repr__()
        return "star." + rep
