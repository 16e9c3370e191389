"""What is looked at before a patch's tensors get into a model, and the room that is made for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..models.names import plain_name
from ..models.structure import neuron_shape
from ..sharing.ledger import Ledger
from ..sharing.patch_files import (
    DELTA,
    NEURONS,
    WEIGHTS_NAME,
    Patch,
    check_delta,
    check_names,
    check_neurons,
    is_patch,
)
from .layer import StarLayer, star_layers
from .neurons import spread_neurons


def saved_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The tensors of `modules_to_save`: from their names in the model to those in a saved patch."""
    return {
        f"{name}.{ours}".removeprefix("_fsdp_wrapped_module."): f"{name}.{saved}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for saved, ours in module.adapter_state_dict_load_map(adapter_name).items()
    }


def load_checked(*args: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> Any:
    """Transformers' `PreTrainedModel._load_pretrained_model`, after a look at patches that are to be loaded.

    Raises:
        ValueError: A patch is damaged, or holds tensors that its configuration does not name.
    """
    for path in map(Path, checkpoint_files or ()):
        if is_patch(path.parent):
            if path.name != WEIGHTS_NAME:
                raise ValueError(f"{path} cannot be checked; a patch keeps its tensors in {WEIGHTS_NAME}.")
            Patch.read(path.parent)
    load: Any = PreTrainedModel._load_pretrained_model
    return load(*args, checkpoint_files=checkpoint_files, **kwargs)


def make_identity(layer: StarLayer, adapter_name: str) -> None:
    """Give an adapter of a layer a delta of zero in the place of a random one, or of none at all (meta)."""
    delta = layer.star_delta[adapter_name]
    zeros = torch.zeros_like(delta, device="cpu" if delta.is_meta else delta.device)
    layer.star_delta[adapter_name] = nn.Parameter(zeros, requires_grad=delta.requires_grad)
    if delta.is_meta:
        layer.star_neurons[adapter_name] = spread_neurons(len(delta), layer.in_features)


def check_tensors(
    tensors: Mapping[str, torch.Tensor], layers: Mapping[str, StarLayer], saved: Mapping[str, str], adapter_name: str
) -> dict[str, torch.Tensor]:
    """The neurons of the modules for which a patch holds both neurons and a delta.

    Args:
        tensors: The patch's, by their names in the model.
        layers: Those that carry the adapter, by name.
        saved: What [`saved_names`] says.
        adapter_name: The adapter.

    Raises:
        ValueError: The patch is not valid for these layers, or holds tensors that its configuration does not name.
        TypeError: It holds tensors of wrong types.
    """
    wanted = {f"{name}.{attribute}.{adapter_name}" for name in layers for attribute in (DELTA, NEURONS)}
    for key in tensors:
        module_name, _, attribute = key.rpartition(".")
        if attribute in (DELTA, NEURONS) and key not in wanted:
            raise ValueError(
                f"The patch holds `{attribute}` of the module {module_name}, which the model does not have or "
                "which `target_modules` does not select."
            )
    check_names([key for key in tensors if key not in wanted and key not in saved], None, "The patch")
    found = {}
    for name, layer in layers.items():
        delta, neurons = (tensors.get(f"{name}.{attribute}.{adapter_name}") for attribute in (DELTA, NEURONS))
        if delta is None or neurons is None:
            continue
        module = plain_name(name)
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"Adapter {adapter_name} cannot be loaded while it is merged. Unmerge it first.")
        found[name] = check_neurons(neurons, layer.in_features, f"the module {module}")
        check_delta(delta, found[name].numel(), layer.out_features, f"the module {module}")
    return found


def check_ledger(ledger: Ledger, model: nn.Module) -> None:
    """Refuse a ledger of another model: the next repair adds up what it holds.

    Raises:
        ValueError: One sentence.
    """
    shapes = {plain_name(name): neuron_shape(module) for name, module in model.named_modules()}
    shapes |= {plain_name(name): (layer.in_features, layer.out_features) for name, layer in star_layers(model).items()}
    what = "The patch's ledger"
    for entry in ledger.entries:
        for name in entry.tensors:
            if name not in shapes:
                raise ValueError(f"{what} cannot be used: entry {entry.id} is about {name}, which the model lacks.")
        for name, keys in entry.keys().items():
            shape = shapes[name]
            if shape is not None and keys.shape[1] != shape[0]:
                raise ValueError(
                    f"{what} cannot be used: entry {entry.id} holds activations of {keys.shape[1]} neurons of {name}, "
                    f"which has {shape[0]}."
                )
    ledger.check_outputs({name: shape[1] for name, shape in shapes.items() if shape is not None}, what)


def make_room(layer: StarLayer, adapter_name: str, neurons: torch.Tensor) -> bool:
    """Give an adapter of a layer tensors of the size that so many neurons need; whether they had another."""
    old_delta, old_neurons = layer.star_delta[adapter_name], layer.star_neurons[adapter_name]
    if old_neurons.numel() == neurons.numel():
        return False
    layer.star_delta[adapter_name] = nn.Parameter(
        torch.zeros((neurons.numel(), layer.out_features), dtype=old_delta.dtype, device=old_delta.device),
        requires_grad=old_delta.requires_grad,
    )
    layer.star_neurons[adapter_name] = torch.zeros_like(neurons, device=old_neurons.device)
    return True
