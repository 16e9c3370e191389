"""The tuner: puts STAR layers into a model, moves them, and reads and writes patches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.other import _get_submodules
from torch import nn
from transformers import PreTrainedModel

from ..models import structure
from ..models.fingerprint import warn_of_other_base
from ..models.names import condense, own_keys, plain_name, select
from ..models.quantized import mend_packing
from ..sharing.hub import keep_own_card
from ..sharing.patch_files import (
    DELTA,
    INDEX_DTYPE,
    NEURONS,
    check_checksum,
    check_neurons,
)
from .config import StarConfig
from .experts import Experts
from .layer import Linear, StarLayer, count_of, execution_device, star_layers
from .loading import check_ledger, check_tensors, load_checked, make_identity, make_room, saved_names
from .neurons import TOO_MANY_NEURONS
from .recording import record_counts, record_widths


def _patched_neurons(
    layers: Mapping[str, StarLayer], adapter_name: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The neurons that hold a delta other than zero, on the CPU, with copies of these deltas, by module."""
    found = {}
    for name, layer in layers.items():
        delta = layer.star_delta[adapter_name].detach()
        used = delta.abs().amax(dim=1) > 0
        if used.any():
            found[name] = layer.star_neurons[adapter_name][used].cpu(), delta[used].clone()
    return found


def _neuron_shape(target: nn.Module) -> tuple[int, int]:
    """(neurons, out_features) of a target module, or a sentence that it cannot be one."""
    shape = structure.neuron_shape(target)
    if shape is None:
        raise TypeError(
            f"Target module {target} is not supported. Currently, only the following modules are supported: "
            "`torch.nn.Linear`, `transformers.pytorch_utils.Conv1D`, quantized linear layers, and routed experts with "
            "a `down_proj` of three dimensions in floating point."
        )
    return shape


class StarModel(BaseTuner):
    """
    Creates a STAR model from a pretrained model: sparse neuron deltas on the second matrices of its FFNs.

    The method is described in "A Semantic-based Optimization Approach for Repairing LLMs: Case Study on Code
    Generation" (Gu, Chen, Aleti, Zhang).

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`StarConfig`]): The configuration of the STAR model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The STAR model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_star import StarConfig

        >>> base_model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> model = get_peft_model(base_model, StarConfig(task_type="CAUSAL_LM", num_neurons=64))
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`StarConfig`]): The configuration of the STAR model.
    """

    peft_config: dict[str, Any]  # of StarConfig
    prefix: str = "star_"
    tuner_layer_cls = StarLayer
    # target modules are found from the model's structure, see `_prepare_adapter_config`
    target_module_mapping: dict[str, list[str]] = {}

    ##############
    # Injection  #
    ##############

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> StarConfig:
        if peft_config.target_modules is not None:
            return peft_config

        targets = list(structure.find_second_matrices(self.model))
        keys = own_keys(self.model)
        condensed = condense(targets, keys)
        if condensed is not None:
            peft_config.target_modules = condensed
            return peft_config

        if peft_config.layers_to_transform is not None:
            indices = peft_config.layers_to_transform
            indices = {indices} if isinstance(indices, int) else set(indices)
            chosen = [name for index, name in enumerate(targets) if index in indices or not indices]
            if not chosen:
                raise ValueError(
                    f"`layers_to_transform`={peft_config.layers_to_transform} names none of the {len(targets)} layers "
                    "with an FFN. Please specify `target_modules` in `peft_config` or other layers."
                )
            targets = chosen
            # it has been applied, and PEFT would not apply it to full names
            peft_config.layers_to_transform = peft_config.layers_pattern = None
        peft_config.target_modules = select(targets, keys)
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        config.ledger = None
        warn_of_other_base(self.model, config.to_dict())
        mend_packing(self.model)
        if isinstance(self.model, PreTrainedModel):
            # transformers' own `load_adapter` takes over any tensor that the model has, base weights included, and
            # asks neither PEFT nor the tuner; what is set here knows no model, so it can be copied and pickled
            self.model._load_pretrained_model = load_checked  # type: ignore[method-assign]
        record_widths(config, star_layers(self.model, adapter_name))

    def _create_and_replace(
        self,
        star_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")

        name = plain_name(current_key)
        counts = star_config.neurons_per_module or {}
        num_neurons = counts.get(name, star_config.num_neurons)
        kwargs = get_quantization_kwargs(self.model)

        layer: Any
        if isinstance(target, StarLayer):
            layer = target
            num_neurons = count_of(num_neurons, layer.in_features, name, TOO_MANY_NEURONS)
            layer.update_layer(adapter_name, num_neurons, config=star_config, module_name=name, **kwargs)
        else:
            layer = self._create_new_module(star_config, adapter_name, target, num_neurons, name, **kwargs)
            if adapter_name not in self.active_adapters:
                # adding an additional adapter: it is not automatically trainable
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

        if layer.star_delta[adapter_name].is_meta:
            # with low_cpu_mem_usage an adapter is empty as a whole until it is loaded
            layer.star_neurons[adapter_name] = layer.star_neurons[adapter_name].to("meta")

    @staticmethod
    def _create_new_module(
        star_config: StarConfig,
        adapter_name: str,
        target: nn.Module,
        num_neurons: int | float,
        name: str,
        **kwargs: Any,
    ) -> StarLayer:
        if isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"Target module {name} already carries an adapter of another method ({type(target).__name__}). STAR "
                "does not support nested base layers; merge or delete the other adapter first."
            )
        num_neurons = count_of(num_neurons, _neuron_shape(target)[0], name, TOO_MANY_NEURONS)
        layer_cls = Linear if structure.routed_shape(target) is None else Experts
        return layer_cls(target, adapter_name, config=star_config, num_neurons=num_neurons, module_name=name, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, StarLayer) and new_module is child.get_base_layer():
            # unloading: the base layer is as it was, and not every quantized one has the `weight` PEFT would hand over
            setattr(parent, child_name, new_module)
            return
        if isinstance(new_module, StarLayer) and execution_device(new_module.get_base_layer()) is not None:
            # PEFT would move the adapter to where an offloaded weight waits, the meta device, and lose it
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PeftModel.forward and generate drop `adapter_names` after this hook, so without it they would be ignored
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "STAR does not support mixed batches: `adapter_names` cannot be passed to forward or generate. "
                "Activate adapters with `set_adapter`, or export them to LoRA, which supports mixed batches."
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: PEFT's signature speaks of ranks and decompositions; see [`combine_patches`].

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "STAR patches are not combined by `add_weighted_adapter`; call "
            "`peft_star.combine_patches(model, adapters, new_name, weights)`, which is exact."
        )

    ##############
    # Retarget   #
    ##############

    def retarget(self, adapter_name: str, neurons: Mapping[str, torch.Tensor], keep_deltas: bool = False) -> None:
        """Make exactly the named modules carry the adapter, with the given neurons and deltas of zero.

        The adapter is taken off all other modules; a module that is left without adapters gets its base layer back.
        The config is changed such that saving and loading the adapter gives this state again.

        Args:
            adapter_name: An adapter of this model.
            neurons: From names of modules in the base model to integer indices (k,) of neurons in that module, unique
                and in any order. k may differ between modules.
            keep_deltas: Whether neurons that already hold a delta other than zero stay, with that delta. A module
                that holds some has the union of both, in ascending order.

        Raises:
            ValueError: The adapter does not exist or is merged, a module does not exist or carries an adapter of
                another method, or indices are not valid. Nothing has been changed then.
            TypeError: A module is not a linear layer, or indices are not integers.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        config = self.peft_config[adapter_name]
        current = star_layers(self.model, adapter_name)
        if any(adapter_name in layer.merged_adapters for layer in current.values()):
            raise ValueError(f"Adapter {adapter_name} cannot be retargeted while it is merged. Unmerge it first.")

        modules = dict(self.model.named_modules())
        checked: dict[str, torch.Tensor] = {}
        for name, indices in neurons.items():
            target = modules.get(name)
            if target is None:
                raise ValueError(f"The model has no module named {name!r}.")
            if isinstance(target, BaseTunerLayer) and not isinstance(target, StarLayer):
                raise ValueError(f"Module {name!r} already carries an adapter of another method.")
            checked[name] = check_neurons(indices, _neuron_shape(target)[0], name)
        kept = _patched_neurons(current, adapter_name) if keep_deltas else {}
        for name, (indices, _) in kept.items():
            checked[name] = torch.cat([checked[name].cpu(), indices]).unique() if name in checked else indices.unique()
        if not checked:
            raise ValueError("`neurons` names no module; a patch needs at least one.")
        target_modules = self.exact_target_modules(config, checked)

        # a new layer takes over how the adapter is kept elsewhere: its dtype, trainability and the switched-off state
        any_layer = next(iter(current.values()), None)
        any_delta = None if any_layer is None else any_layer.star_delta[adapter_name]
        requires_grad = (
            any_delta.requires_grad
            if any_delta is not None
            else adapter_name in self.active_adapters and not config.inference_mode
        )
        disabled = any(layer.disable_adapters for layer in star_layers(self.model).values())

        for name, layer in current.items():
            if name not in checked:
                self._remove_from_layer(name, layer, adapter_name)

        for name, indices in checked.items():
            layer = self.model.get_submodule(name)
            if not (isinstance(layer, StarLayer) and adapter_name in layer.star_delta):
                layer = self._add_to_layer(name, layer, adapter_name, config, indices.numel())
                layer._disable_adapters = disabled
                delta = layer.star_delta[adapter_name]
                dtype = delta.dtype if any_delta is None else any_delta.dtype
                layer.star_delta[adapter_name] = nn.Parameter(delta.detach().to(dtype), requires_grad=requires_grad)
            layer.set_neurons(adapter_name, indices)
            if name in kept:
                old_indices, old_delta = kept[name]
                rows = torch.searchsorted(indices, old_indices).to(old_delta.device)
                with torch.no_grad():
                    layer.star_delta[adapter_name][rows] = old_delta

        # PEFT condenses many exact names into suffixes on loading, which is the same selection
        config.target_modules = target_modules
        config.layers_to_transform = None
        config.layers_pattern = None
        config.exclude_modules = None
        record_counts(config, {plain_name(name): indices.numel() for name, indices in checked.items()})
        record_widths(config, {name: self.model.get_submodule(name) for name in checked})
        self.targeted_module_names = list(star_layers(self.model))

    def exact_target_modules(self, config: StarConfig, names: Iterable[str]) -> set[str] | str:
        """Return a `target_modules` that selects just `names`, as PEFT will match it on loading."""
        plain_names = [plain_name(name) for name in names]
        for module_name in config.modules_to_save or []:
            for name in plain_names:
                if re.match(rf"(^|.*\.){module_name}($|\..*)", name):
                    raise ValueError(f"Module {name!r} cannot be patched, as it is one of `modules_to_save`.")
        return select(plain_names, [plain_name(key) for key in own_keys(self.model)])

    def _remove_from_layer(self, name: str, layer: StarLayer, adapter_name: str) -> None:
        # not layer.delete_adapter: the adapter goes on to exist in other layers, so it stays active in this one
        for attribute in layer.adapter_layer_names + layer.other_param_names:
            if adapter_name in getattr(layer, attribute):
                del getattr(layer, attribute)[adapter_name]
        if len(layer.star_delta) == 0:
            parent, target, target_name = _get_submodules(self.model, name)
            setattr(parent, target_name, layer.get_base_layer())

    def _add_to_layer(
        self, name: str, target: nn.Module, adapter_name: str, config: StarConfig, num_neurons: int
    ) -> StarLayer:
        layer: Any
        requires_grad = {}
        active_adapters = list(self.active_adapters)
        if isinstance(target, StarLayer):
            requires_grad = {key: delta.requires_grad for key, delta in target.star_delta.items()}
            active_adapters = target.active_adapters
            target.update_layer(adapter_name, num_neurons, config=config, module_name=name)
            layer = target
        else:
            parent, target, target_name = _get_submodules(self.model, name)
            kwargs = get_quantization_kwargs(self.model)
            layer = self._create_new_module(config, adapter_name, target, num_neurons, name, **kwargs)
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)
        # update_layer activates and unfreezes as if the adapter were new
        layer._active_adapter = active_adapters
        for key, value in requires_grad.items():
            layer.star_delta[key].requires_grad_(value)
        return layer

    ############################
    # State dict serialization #
    ############################

    @staticmethod
    def _before_save(model: nn.Module) -> None:
        """What has to happen before a model is saved. PEFT has no hook for it, but asks for the tensors then."""
        keep_own_card(model)  # before a push, PEFT saves

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        cls._before_save(model)
        to_return = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # a state dict that was gathered from parameters only lacks the indices, without which the deltas mean nothing
        for name, layer in star_layers(model, adapter_name).items():
            name = name.removeprefix("_fsdp_wrapped_module.")
            if f"{name}.{DELTA}.{adapter_name}" in to_return:
                to_return.setdefault(f"{name}.{NEURONS}.{adapter_name}", layer.star_neurons[adapter_name])
        return to_return

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Map the keys of a patch to those of the model, check the patch, and make room for its tensors.

        A module of which the patch lacks its neurons, its delta or both is left as without the patch; PEFT reports
        what is missing.

        Raises:
            ValueError: The patch is not valid for this model, its checksum does not fit, or it holds tensors that its
                configuration does not name; the message says which. No tensor of the model has been changed then.
            TypeError: The patch holds tensors of wrong types.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = {
            name.removeprefix("_fsdp_wrapped_module."): layer
            for name, layer in star_layers(model, adapter_name).items()
        }
        saved = saved_names(model, adapter_name)
        # everything is checked before anything is changed
        loaded = check_tensors(remapped, layers, saved, adapter_name)
        if config.loaded_ledger is not None:
            check_ledger(config.loaded_ledger, model)
        if len(loaded) == len(layers):  # else PEFT has something to report anyway
            as_saved = {saved.get(key, key): tensor for key, tensor in state_dict.items()}
            check_checksum(as_saved, config.tensors_sha256, "The patch")
        # the adapter may get other tensors later on, such as a checkpoint's
        config.tensors_sha256 = None
        if config.loaded_ledger is not None:
            config.ledger, config.loaded_ledger = config.loaded_ledger, None
        for name in layers.keys() - loaded.keys():
            # PEFT reports missing keys; one without the other means nothing
            for attribute in (DELTA, NEURONS):
                remapped.pop(f"{name}.{attribute}.{adapter_name}", None)
            if not config.init_weights or layers[name].star_delta[adapter_name].is_meta:
                make_identity(layers[name], adapter_name)
        resized = [make_room(layers[name], adapter_name, neurons) for name, neurons in loaded.items()]
        for name, neurons in loaded.items():
            # with low_cpu_mem_usage the loaded tensor itself becomes the buffer, so it needs the right dtype
            remapped[f"{name}.{NEURONS}.{adapter_name}"] = neurons.to(INDEX_DTYPE)
        if any(resized):
            counts = {name: layer.star_neurons[adapter_name].numel() for name, layer in layers.items()}
            record_counts(config, {plain_name(name): count for name, count in counts.items()})
        return remapped
