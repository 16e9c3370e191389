"""The adapter layer: a linear layer whose neurons (columns of its weight) get a sparse delta."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..models.quantized import readable
from ..sharing.patch_files import INDEX_DTYPE, check_delta, check_neurons
from .config import StarConfig
from .neurons import TOO_MANY_NEURONS, NeuronDict, count_of, spread_neurons

__all__ = ["Linear", "StarLayer", "count_of", "execution_device", "star_layers"]


def execution_device(base_layer: nn.Module) -> torch.device | None:
    """Where a layer computes that accelerate offloads, on the meta device between calls; None for every other one.

    An adapter is small, so it is not offloaded along: it stays there.
    """
    if not any(parameter.is_meta for parameter in base_layer.parameters(recurse=False)):
        return None
    device = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


class StarLayer(BaseTunerLayer):
    """The state and the bookkeeping of STAR adapters on one layer; see [`Linear`] for the computation.

    Attributes:
        star_delta: `nn.ParameterDict` from adapter names to deltas (k, d_out).
        star_neurons: `BufferDict` from adapter names to int32 indices (k,) of neurons, in the order of the delta's
            rows. It is persistent: the indices are part of the patch.
    """

    # All names of layers that may contain trainable adapter weights
    adapter_layer_names: tuple[str, ...] = ("star_delta",)
    # All names of other adapter-related parameters
    other_param_names: tuple[str, ...] = ("star_neurons", "_merged_columns")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.star_delta = nn.ParameterDict({})
        self.in_features, self.out_features = self._base_shape()
        self.star_neurons = NeuronDict(self.in_features)
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )

        # flag to enable/disable casting of input to weight dtype during forward call
        self.cast_input_dtype_enabled: bool = True
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters = []
        # adapter name -> (neurons (k,), the base weight's columns before the merge): what unmerge writes back
        self._merged_columns: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # the quantized base layer before the merge, in a tuple so that it does not become a submodule
        self._unmerged_base: tuple[nn.Module, ...] = ()

        # Conv1D stores its weight as (in_features, out_features)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.kwargs = kwargs

    def _base_shape(self) -> tuple[int, int]:
        """The number of neurons and of outputs of the base layer."""
        neurons, outputs = _get_in_out_features(self.get_base_layer())
        assert neurons is not None and outputs is not None  # no other layer is made a target
        return neurons, outputs

    @property
    def _neuron_dim(self) -> int:
        """The dimension of the base weight that the neurons index."""
        return 0 if self.fan_in_fan_out else 1

    def update_layer(
        self,
        adapter_name: str,
        num_neurons: int,
        config: StarConfig,
        inference_mode: bool = False,
        module_name: str = "",
        **kwargs: Any,
    ) -> None:
        """Add the adapter `adapter_name` with `num_neurons` evenly spread neurons to this layer.

        Args:
            adapter_name: The name of the adapter; it has no influence on the values.
            num_neurons: The number k of neurons.
            config: The adapter's configuration; `config.init_weights` chooses between zeros and randn deltas.
            inference_mode: Whether the delta should be frozen.
            module_name: The name of this module, for messages.

        Raises:
            ValueError: `num_neurons` is not in [1, in_features].
        """
        if num_neurons <= 0:
            raise ValueError(f"`num_neurons` should be a positive integer value but the value passed is {num_neurons}")
        num_neurons = count_of(int(num_neurons), self.in_features, module_name or "to adapt", TOO_MANY_NEURONS)

        init = torch.zeros if config.init_weights else torch.randn
        self.star_delta[adapter_name] = nn.Parameter(init(num_neurons, self.out_features))
        self.star_neurons[adapter_name] = spread_neurons(num_neurons, self.in_features)

        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT leaves parameters on the meta device alone, but does not expect buffers there
        if adapter_name in self.star_neurons and self.star_neurons[adapter_name].is_meta:
            return
        if device is None:
            device = execution_device(self.get_base_layer())
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def get_base_weight(self) -> torch.Tensor:
        with readable(self.get_base_layer()):
            return super().get_base_weight()

    def _check_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.star_delta:
            raise ValueError(
                f"This layer has no adapter {adapter_name!r}; it has {sorted(self.star_delta.keys()) or 'none'}."
            )

    @torch.no_grad()
    def replace_tensors(self, adapter_name: str, neurons: torch.Tensor, delta: torch.Tensor | None) -> None:
        """Put checked values in the place of an adapter's tensors, with the old device, dtype and requires_grad."""
        old_delta, old_neurons = self.star_delta[adapter_name], self.star_neurons[adapter_name]
        shape = (neurons.numel(), self.out_features)
        if old_delta.shape == shape and old_neurons.shape == neurons.shape and old_delta.device.type != "meta":
            # the same tensors go on to live, so that optimizers which hold the parameter keep working
            old_neurons.copy_(neurons)
            if delta is None:
                old_delta.zero_()
            else:
                old_delta.copy_(delta)
            return

        new_delta = torch.zeros(shape, dtype=old_delta.dtype, device=old_delta.device)
        if delta is not None:
            new_delta.copy_(delta)
        self.star_delta[adapter_name] = nn.Parameter(new_delta, requires_grad=old_delta.requires_grad)
        self.star_neurons[adapter_name] = neurons.to(device=old_neurons.device, dtype=INDEX_DTYPE)

    def set_neurons(
        self,
        adapter_name: str,
        neurons: torch.Tensor | Sequence[int],
        delta: torch.Tensor | None = None,
    ) -> None:
        """Replace an adapter's neurons, and its delta along with them.

        Args:
            adapter_name: An adapter of this layer.
            neurons: Integer indices (k,) in [0, in_features), unique, in any order.
            delta: The delta (k, out_features) in the order of `neurons`; zeros if not given.

        Raises:
            ValueError: The layer lacks the adapter, the adapter is merged, or a value is not valid. Nothing has been
                changed then.
            TypeError: The neurons are not integers or the delta is not a floating point tensor.
        """
        self._check_adapter(adapter_name)
        if adapter_name in self.merged_adapters:
            raise ValueError(f"The neurons of adapter {adapter_name!r} cannot be set while it is merged; unmerge it.")
        name = f"adapter {adapter_name!r}"
        checked = check_neurons(neurons, self.in_features, name)
        if delta is not None:
            check_delta(delta, checked.numel(), self.out_features, name)
        self.replace_tensors(adapter_name, checked, delta)

    def _merged(self, columns: torch.Tensor, delta: torch.Tensor, adapter_name: str, safe_merge: bool) -> torch.Tensor:
        """`columns + delta` in the dtype of `columns`; raises ValueError when `safe_merge` finds it is not finite."""
        # the sum is rounded once, from at least float32
        dtype = torch.promote_types(torch.promote_types(columns.dtype, delta.dtype), torch.float32)
        merged = (columns.to(dtype) + delta.to(columns.device, dtype)).to(columns.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        return merged

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT's conversion is an SVD, which is lossy; the exact LoRA twin of a patch is made by `export_lora`
        return False


def star_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, StarLayer]:
    """The STAR layers in `model`, or just those with the adapter, by the names that `named_modules` gives them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StarLayer) and (adapter_name is None or adapter_name in module.star_delta)
    }


class Linear(nn.Module, StarLayer):
    """STAR implemented in a dense layer (`nn.Linear`, transformers' `Conv1D`, quantized linear layers).

    For an input x (..., m), the forward pass is `y = base(x) + x[..., neurons] @ delta`, which is the base layer with
    `delta` added to the columns `neurons` of its weight W (d, m). It does not read W, so a quantized W works too.
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
        if self.base_layer is not self.get_base_layer():
            raise ValueError("STAR does not support nested base layers")

        self._active_adapter = adapter_name
        self.update_layer(adapter_name, num_neurons, config=config, module_name=module_name)

    def _check_merge_supported(self) -> None:
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"Merging is not supported for {backend.backend_name} layers; keep the adapter unmerged, or load the "
                "base model without quantization to merge."
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights

        Only the columns of the adapters' neurons are touched, and they are kept, so that [`~Linear.unmerge`] restores
        the weight bit for bit. A quantized weight has to be quantized anew, which changes what shares a scale with
        these columns, so there the quantized layer as a whole is kept until it is unmerged.

        Args:
            safe_merge (`bool`, *optional*):
                If True, nothing is written unless the merged columns are finite. Defaults to `False`.
            adapter_names (`List[str]`, *optional*):
                The list of adapter names that should be merged. If None, all active adapters will be merged. Defaults
                to `None`.

        Raises:
            ValueError: The base layer's quantization cannot merge, or `safe_merge` found NaN or infinite values.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            # no adapter to merge
            return

        for active_adapter in adapter_names:
            if active_adapter not in self.star_delta.keys():
                continue
            self._check_merge_supported()
            weight = self.get_base_weight()
            # index_copy_ does not take int32 indices on every device
            neurons = self.star_neurons[active_adapter].to(weight.device, torch.int64)
            columns = weight.index_select(self._neuron_dim, neurons)

            delta = self.star_delta[active_adapter]
            merged = self._merged(columns, delta if self.fan_in_fan_out else delta.T, active_adapter, safe_merge)

            weight.index_copy_(self._neuron_dim, neurons, merged)
            if self.quantization_backend is None:
                self._merged_columns[active_adapter] = (neurons, columns)
            else:
                if not self._unmerged_base:
                    warnings.warn(
                        f"Merging into a {self.quantization_backend.backend_name} layer quantizes it anew, so outputs "
                        "may differ due to rounding errors; in few bits these can undo a repair, so check it, or keep "
                        "the patch unmerged.",
                        stacklevel=2,
                    )
                    self._unmerged_base = (self.base_layer,)
                    self.base_layer = copy.deepcopy(self.base_layer)
                self.set_base_weight(weight)
            self.merged_adapters.append(active_adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights, the last merged first.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return

        if self._unmerged_base:
            (self.base_layer,) = self._unmerged_base
            self._unmerged_base = ()
            self.merged_adapters.clear()
        while len(self.merged_adapters) > 0:
            active_adapter = self.merged_adapters.pop()
            neurons, columns = self._merged_columns.pop(active_adapter)
            weight = self.get_base_weight()
            columns = columns.to(weight.device, weight.dtype)
            weight.index_copy_(self._neuron_dim, neurons.to(weight.device), columns)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute the delta weight for the given adapter.

        Args:
            adapter (str):
                The name of the adapter for which the delta weight should be computed.

        Returns:
            A dense tensor (out_features, in_features) in the delta's dtype; for `Conv1D` (in_features, out_features).
        """
        delta = self.star_delta[adapter]
        neurons = self.star_neurons[adapter].to(device=delta.device, dtype=torch.int64)
        weight = torch.zeros((self.in_features, self.out_features), dtype=delta.dtype, device=delta.device)
        weight = weight.index_copy(0, neurons, delta)
        return weight if self.fan_in_fan_out else weight.T

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs and kwargs.pop("adapter_names", None) is not None:
            raise ValueError("STAR does not support mixed batches: `adapter_names` cannot be passed to forward.")

        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)

        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        result_dtype = result.dtype
        # when one token is decoded, looking things up in modules takes longer than computing with them
        deltas = self.star_delta
        neurons: dict[str, Any] = self.star_neurons._buffers
        for active_adapter in self.active_adapters:
            delta = deltas._parameters.get(active_adapter)
            if delta is None:
                if active_adapter not in deltas:
                    continue
                delta = deltas[active_adapter]  # wrappers such as FSDP may hold it as a plain attribute
            # only the k columns that are patched are gathered: (..., m) -> (..., k)
            activations = x.index_select(-1, neurons[active_adapter])
            if activations.dtype != delta.dtype:
                activations = self._cast_input_dtype(activations, delta.dtype)
            result = result + activations @ delta
        return result if result.dtype == result_dtype else result.to(result_dtype)

    def __repr__(self) -> str:
        rep = super().__repr__()
        return "star." + rep

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
