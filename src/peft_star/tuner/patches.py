"""Several patches as one, another patch in the place of a loaded one, and a patch as a plain LoRA.

PEFT offers the former two for LoRA, by code that asks for LoRA. For sparse deltas all are simple and exact: the sum of
patches is a patch on the union of their neurons, and a patch is two small tensors for each module.
"""

from __future__ import annotations

import copy
import math
import numbers
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import nn

from ..models.fingerprint import warn_of_other_base
from ..models.names import own_keys, plain_name, select
from ..report import RepairReport
from ..sharing.download import find_patch
from ..sharing.ledger import Ledger
from ..sharing.lora import patch_to_lora, write_lora
from ..sharing.patch_files import DELTA, LEDGER_CHECKSUM, NEURONS, Patch, checksum
from .config import StarConfig
from .config_checks import check_scope
from .layer import StarLayer, star_layers
from .loading import check_ledger
from .model import StarModel
from .recording import record_counts, widths_of
from .reports import Repaired


def combine_patches(
    model: Any, adapters: Sequence[str], new_name: str, weights: Sequence[float] | None = None
) -> None:
    """Add the adapter that does what the weighted sum of other adapters does.

    A module's neurons are the union of those of the parts, in ascending order, and the delta of a neuron is the
    weighted sum of the parts' deltas, so that the layer gives base(x) + Σ w_i x[..., neurons_i] @ delta_i (the paper
    has one patch at a time, section 3.3; this is its sum over patches). The sums are formed in float32 at least. As
    with `PeftModel.add_adapter`, the new adapter is not active yet, and the parts stay as they are.

    Args:
        model: A `PeftModel` with STAR adapters.
        adapters: The names of the parts, each once.
        new_name: The name of the new adapter.
        weights: One finite number for each part; by default 1 for each, which is all parts at once.

    Raises:
        TypeError: `model` is no PEFT model with STAR adapters, or an argument has the wrong type.
        ValueError: An adapter does not exist, is merged, is not loaded or holds `modules_to_save`, a name is taken or
            named twice, or weights do not fit. Nothing has been changed then.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, StarModel):
        raise TypeError(f"combine_patches() takes a PeftModel with STAR adapters, got a {type(model).__name__}.")
    adapters, factors = _check_parts(tuner, adapters, weights)
    _check_new_name(tuner, new_name)

    parts = [
        {plain_name(name): layer for name, layer in star_layers(tuner.model, adapter).items()} for adapter in adapters
    ]
    for adapter, layers in zip(adapters, parts):
        _check_layers(layers, adapter, "combined")
    combined = {
        name: _weighted_sum(
            [
                (layers[name].star_neurons[adapter], layers[name].star_delta[adapter].detach(), factor)
                for adapter, layers, factor in zip(adapters, parts, factors)
                if name in layers
            ],
            name,
        )
        for name in dict.fromkeys(name for layers in parts for name in layers)
    }

    config = copy.deepcopy(tuner.peft_config[adapters[0]])
    config.target_modules = tuner.exact_target_modules(config, combined)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.init_weights = True
    record_counts(config, {name: neurons.numel() for name, (neurons, _) in combined.items()})
    recorded = [tuner.peft_config[adapter].base_fingerprint for adapter in adapters]
    config.base_fingerprint = next(filter(None, recorded), None)
    config.ledger_sha256 = None

    # adding an adapter sets anew what is trainable, which is no business of this function
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.add_adapter(new_name, config)
    with torch.no_grad():
        for name, layer in star_layers(tuner.model, new_name).items():
            neurons, delta = combined[plain_name(name)]
            old = layer.star_delta[new_name]
            layer.star_delta[new_name] = nn.Parameter(delta.to(old.device), requires_grad=old.requires_grad)
            layer.star_neurons[new_name] = neurons.to(old.device)
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad_(requires_grad)
    config.ledger = _joined_ledger([tuner.peft_config[name] for name in adapters], factors)


def swap_patch(
    model: nn.Module,
    patch: str | Path,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    token: str | None = None,
) -> bool:
    """Put a saved patch in the place of a loaded one: its neurons (k,) and deltas (k, d_out), module by module.

    Nothing is injected. Where a module has as many neurons as before, its tensors live on with new values, so that a
    model compiled by `torch.compile` is not compiled anew and optimisers keep their parameters. Where the number
    differs, the tensors are replaced, and a compiled model compiles anew in its next forward pass (with a warning).
    Modules of the adapter that the new patch leaves alone keep their neurons with deltas of zero. Device, data type,
    trainability and activity stay as they are.

    Args:
        model: A model with the adapter: a `PeftModel`, a transformers model after `load_adapter`, compiled or not.
        patch: A directory or a Hub id.
        adapter_name: The adapter to replace.
        revision: Branch, tag or commit, for a Hub id.
        token: Access token, for a Hub id.

    Returns:
        Whether all tensors lived on, so that nothing has to be compiled anew.

    Raises:
        FileNotFoundError: Nothing lies at this path.
        ValueError: It is no STAR patch, it is damaged, it patches modules that the adapter does not hold, its values
            do not fit the model or the adapter's data type, or the adapter is merged, is not loaded or does not
            exist. Nothing has been changed then.
        TypeError: `model` is no model.
        OSError: The Hub has no such patch, refused it or did not answer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_patch() takes a model, got a {type(model).__name__}.")
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    layers = {plain_name(name): layer for name, layer in star_layers(inner, adapter_name).items()}
    config = (getattr(inner, "peft_config", None) or {}).get(adapter_name)
    if not layers or config is None:
        raise ValueError(
            f"The model has no STAR adapter {adapter_name!r} whose patch could be swapped; load one with "
            "load_adapter first."
        )
    _check_layers(layers, adapter_name, "swapped")
    if config.modules_to_save:
        raise ValueError(f"Adapter {adapter_name!r} holds `modules_to_save`, which cannot be swapped in place.")

    directory = find_patch(patch, revision=revision, token=token)
    new = _read_patch(patch, directory, layers, adapter_name)
    ledger, scope = Ledger.read(directory, new.config.get(LEDGER_CHECKSUM)), new.config.get("scope")
    if ledger is not None:
        check_ledger(ledger, inner)
    if scope is not None:
        check_scope(scope)

    in_place = all(
        neurons.shape == layers[name].star_neurons[adapter_name].shape for name, neurons in new.neurons.items()
    )
    if not in_place and _is_compiled(model):
        warnings.warn(
            f"{patch} holds other numbers of neurons than adapter {adapter_name!r}, so the compiled model will be "
            "compiled anew.",
            stacklevel=2,
        )
    for name, layer in layers.items():
        if name in new.neurons:
            layer.replace_tensors(adapter_name, new.neurons[name], new.deltas[name])
        else:
            with torch.no_grad():
                layer.star_delta[adapter_name].zero_()
    record_counts(config, {name: layer.star_neurons[adapter_name].numel() for name, layer in layers.items()})
    config.base_fingerprint = new.config.get("base_fingerprint")
    config.ledger, config.scope = ledger, scope
    config.repaired = None  # what was reported of the old patch says nothing of the new one
    warn_of_other_base(inner, config.to_dict())
    return in_place


def export_lora(
    model_or_path: nn.Module | str | Path,
    out_dir: str | Path,
    adapter_name: str = "default",
    *,
    overwrite: bool = False,
) -> Path:
    """Write a STAR patch as an exact LoRA adapter in PEFT's format.

    For each patched module the LoRA holds A (r, m) with the one-hot selectors of its k neurons and B (d, r) with
    deltaᵀ, in the patch's dtype. r is the largest k of all modules and lora_alpha = r; modules with fewer neurons are
    padded with zeros, because one rank for all is what every LoRA loader reads alike: vLLM and llama.cpp know no
    `rank_pattern`. Logits equal those of the patch up to float rounding.

    Args:
        model_or_path: A model with a STAR adapter (`PeftModel`, or a transformers model after `load_adapter`), or a
            patch: a directory or a Hub id. A patch is converted without its base model.
        out_dir: The directory to write. It appears complete or not at all.
        adapter_name: The adapter of the model; of no meaning for a patch on disk.
        overwrite: Whether an adapter that `out_dir` already holds may be replaced.

    Returns:
        `out_dir`.

    Raises:
        ValueError: There is no such patch, it is merged, it is not valid, it holds what a plain LoRA cannot
            (`modules_to_save`), or `out_dir` is not empty.
        FileNotFoundError: Nothing lies at the path of the patch.
        TypeError: `model_or_path` is neither a model nor a path.
    """
    if isinstance(model_or_path, (str, Path)):
        return patch_to_lora(model_or_path, out_dir, overwrite=overwrite)
    if not isinstance(model_or_path, nn.Module):
        raise TypeError(f"export_lora() takes a model or the path of a patch, got a {type(model_or_path).__name__}.")
    patch = _take_off(model_or_path, adapter_name)
    layers = star_layers(model_or_path, adapter_name).values()
    fan_in_fan_out = all(layer.fan_in_fan_out for layer in layers)
    return write_lora(patch, out_dir, overwrite=overwrite, fan_in_fan_out=fan_in_fan_out)


def _check_parts(
    tuner: StarModel, adapters: Sequence[str], weights: Sequence[float] | None
) -> tuple[list[str], list[float]]:
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise TypeError(f"`adapters` should be a list of adapter names, got {adapters!r}.")
    adapters = list(adapters)
    if not adapters:
        raise ValueError("`adapters` names no adapter; a combination needs at least one.")
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            known = ", ".join(map(repr, tuner.peft_config))
            raise ValueError(f"The model has no adapter {adapter!r}; it has {known or 'none'}.")
        if tuner.peft_config[adapter].modules_to_save:
            raise ValueError(f"Adapter {adapter!r} holds `modules_to_save`, which cannot be combined.")
    if len(set(adapters)) != len(adapters):
        raise ValueError(f"`adapters` names an adapter twice: {adapters}; give it a larger weight instead.")
    if weights is None:
        return adapters, [1.0] * len(adapters)
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"`weights` should be a list of numbers, got {weights!r}.")
    if len(weights) != len(adapters):
        raise ValueError(f"`weights` holds {len(weights)} numbers for {len(adapters)} adapters; give one for each.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"`weights` should hold numbers, got {weight!r}.")
        if not math.isfinite(weight):
            raise ValueError(f"`weights` should hold finite numbers, got {weight!r}.")
    return adapters, [float(weight) for weight in weights]


def _check_new_name(tuner: StarModel, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"`new_name` should be a string, got {name!r}.")
    # adapters are attributes of the dicts that hold them, so "half" or "to" is taken
    if not name or "." in name or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"{name!r} cannot be the name of an adapter; give another one, without dots.")
    if name in tuner.peft_config:
        raise ValueError(f"The model has an adapter {name!r} already; delete it first, or give another name.")


def _check_layers(layers: dict[str, StarLayer], adapter: str, verb: str) -> None:
    if not layers:
        raise ValueError(f"No module carries adapter {adapter!r}, so it cannot be {verb}.")
    for name, layer in layers.items():
        if adapter in layer.merged_adapters:
            raise ValueError(f"Adapter {adapter!r} is merged and cannot be {verb}; call unmerge_adapter() first.")
        if layer.star_delta[adapter].is_meta or layer.star_neurons[adapter].is_meta:
            raise ValueError(f"Adapter {adapter!r} of {name} holds no values yet; load it first.")


def _weighted_sum(
    parts: list[tuple[torch.Tensor, torch.Tensor, float]], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The union (k,) of the neurons and their weighted deltas (k, d), in the widest data type of the parts."""
    dtype = parts[0][1].dtype
    for _, delta, _ in parts:
        dtype = torch.promote_types(dtype, delta.dtype)
    union = torch.cat([neurons.to(parts[0][0].device) for neurons, _, _ in parts]).unique()
    total = torch.zeros(
        union.numel(), parts[0][1].shape[1], dtype=torch.promote_types(dtype, torch.float32), device=union.device
    )
    for neurons, delta, factor in parts:
        rows = torch.searchsorted(union, neurons.to(union.device))
        total.index_add_(0, rows, factor * delta.to(total.device, total.dtype))
    total = total.to(dtype)
    if not torch.isfinite(total).all():
        raise ValueError(f"The combined delta of {name} is not finite in {dtype}; give smaller weights.")
    return union, total


def _joined_ledger(configs: Sequence[StarConfig], factors: Sequence[float]) -> Ledger | None:
    """The ledger of a weighted sum of patches, or None where the sum is not that of its entries."""
    entries = [entry for config in configs for entry in (config.ledger or Ledger()).entries]
    if any(factor != 1 for factor in factors) or len({entry.id for entry in entries}) < len(entries) or not entries:
        return None
    return Ledger.joined([config.ledger for config in configs])


def _read_patch(patch: str | Path, directory: Path, layers: dict[str, StarLayer], adapter_name: str) -> Patch:
    """A saved patch, checked against the layers of the adapter."""
    read = Patch.read(directory)
    if read.others or read.config.get("modules_to_save"):
        raise ValueError(f"{patch} also holds whole modules (`modules_to_save`), which cannot be swapped in place.")
    for name in read.neurons:
        if name not in layers:
            raise ValueError(
                f"{patch} patches {name}, which adapter {adapter_name!r} does not hold, so it cannot be swapped in "
                "place; load it as an adapter of its own with load_adapter."
            )
    read = read.check(_shapes(layers), f"{patch} in ")
    for name, delta in read.deltas.items():
        dtype = layers[name].star_delta[adapter_name].dtype
        if not torch.isfinite(delta.to(dtype)).all():
            raise ValueError(f"The delta of {patch} in {name} is too large for the adapter's {dtype}.")
    return read


def _take_off(model: nn.Module, adapter_name: str) -> Patch:
    """The patch that a model carries, with what its export has to know in the configuration."""
    layers = {plain_name(name): layer for name, layer in star_layers(model, adapter_name).items()}
    if not layers:
        names = sorted({name for layer in star_layers(model).values() for name in layer.star_delta})
        has = f"only {', '.join(map(repr, names))}" if names else "none at all"
        raise ValueError(f"The model has no STAR adapter {adapter_name!r}; it has {has}.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the base weights; unmerge it before the export.")
    neurons = {name: layer.star_neurons[adapter_name] for name, layer in layers.items()}
    deltas = {name: layer.star_delta[adapter_name].detach() for name, layer in layers.items()}
    for name in layers:
        if neurons[name].is_meta or deltas[name].is_meta:
            raise ValueError(f"The adapter {adapter_name!r} of {name} holds no values yet; load it before the export.")
    config = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    keys = [key for key in map(plain_name, own_keys(model)) if key]
    return Patch(
        {
            **(config.to_dict() if config else {}),
            "in_features": widths_of(layers),
            "target_modules": select(layers, keys),
            "exclude_modules": None,
        },
        neurons,
        deltas,
    ).check(_shapes(layers))


def _shapes(layers: dict[str, StarLayer]) -> dict[str, tuple[int, int]]:
    return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def remember_report(model: Any, adapter_name: str, report: RepairReport) -> None:
    """Keep the report of an adapter's repair with its configuration, which PEFT saves beside the tensors.

    Args:
        model: A `PeftModel`.
        adapter_name: The adapter.
        report: What its repair reported. It is of use as long as the adapter's tensors stay as they are now.
    """
    config = model.peft_config[adapter_name]
    config.repaired = Repaired(report, adapter_name, checksum(_saved_tensors(model, adapter_name)))


def _saved_tensors(model: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors that PEFT would save of an adapter, whose state dict is of the whole model: that brings offloaded
    weights in and takes packed ones out, so it is asked for only where modules are saved along."""
    if model.peft_config[adapter_name].modules_to_save:
        return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    layers = star_layers(model, adapter_name)
    return {
        f"{name}.{attribute}": getattr(layer, attribute)[adapter_name]
        for name, layer in layers.items()
        for attribute in (DELTA, NEURONS)
    }
