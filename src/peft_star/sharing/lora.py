"""Writes a patch as a plain LoRA, which loads wherever LoRA loads and needs no peft_star.

Adding delta (k, d) to k columns of W (d, m) is a low-rank update that needs no decomposition: W + B A, where the rows
of A (k, m) are one-hot selectors of the neurons and B = deltaᵀ (d, k). With lora_alpha = r LoRA's scaling is 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import check_output, new_directory
from ..loading import CONFIG_NAME, WEIGHTS_NAME, find_patch, read_patch_config, read_patch_modules
from ..tuner.experts import Experts
from ..tuner.layer import StarLayer, check_delta, check_neurons
from ..tuner.model import _own_key_list, _plain_name, _select

_PEFT_PREFIX = "base_model.model."
# the ranks that vLLM reserves memory for; an adapter of any rank up to that loads
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class _Patch:
    """A patch by plain module names, from a model or from disk."""

    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]  # neurons (k,), delta (k, d)
    widths: dict[str, int]
    selection: dict[str, Any]  # how the modules are chosen: fields that a StarConfig shares with a LoraConfig
    base: str | None
    revision: str | None
    task_type: str | None
    fan_in_fan_out: bool = False


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
    path = Path(out_dir).expanduser()
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} is not empty; pass overwrite=True to replace the adapter it holds.")

    source = None
    if isinstance(model_or_path, nn.Module):
        patch = _from_model(model_or_path, adapter_name)
    elif isinstance(model_or_path, (str, Path)):
        source = find_patch(model_or_path)
        patch = _from_directory(source)
    else:
        raise TypeError(f"export_lora() takes a model or the path of a patch, got a {type(model_or_path).__name__}.")
    check_output(path, overwrite, CONFIG_NAME, inputs=(source,))

    config = _lora_config(patch)
    with new_directory(path) as temporary:
        _write(temporary, config, _lora_tensors(patch, config["r"]), patch)
    return path


def _from_model(model: nn.Module, adapter_name: str) -> _Patch:
    configs = getattr(model, "peft_config", None) or {}
    layers = {
        _plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, StarLayer) and adapter_name in module.star_delta
    }
    if not layers:
        names = sorted(
            {name for module in model.modules() if isinstance(module, StarLayer) for name in module.star_delta}
        )
        has = f"only {', '.join(map(repr, names))}" if names else "none at all"
        raise ValueError(f"The model has no STAR adapter {adapter_name!r}; it has {has}.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the base weights; unmerge it before the export.")
    config = configs.get(adapter_name)
    _check_modules_to_save(getattr(config, "modules_to_save", None))
    _check_routed(name for name, layer in layers.items() if isinstance(layer, Experts))

    tensors, widths = {}, {}
    for name, layer in layers.items():
        neurons, delta = layer.star_neurons[adapter_name], layer.star_delta[adapter_name]
        if neurons.is_meta or delta.is_meta:
            raise ValueError(f"The adapter {adapter_name!r} of {name} holds no values yet; load it before the export.")
        neurons = check_neurons(neurons, layer.in_features, name)
        check_delta(delta, neurons.numel(), layer.out_features, name)
        tensors[name] = neurons, delta.detach()
        widths[name] = layer.in_features
    key_list = [_plain_name(name) for name in _own_key_list(model)]
    return _Patch(
        tensors,
        widths,
        {"target_modules": _select(layers, [key for key in key_list if key])},
        getattr(config, "base_model_name_or_path", None),
        getattr(config, "revision", None),
        getattr(config, "task_type", None),
        all(layer.fan_in_fan_out for layer in layers.values()),
    )


def _from_directory(directory: Path) -> _Patch:
    from safetensors.torch import load_file

    config = read_patch_config(directory)
    modules, others = read_patch_modules(directory)
    _check_modules_to_save(config.get("modules_to_save") or others)
    names = [module["name"] for module in modules]
    widths = _widths(directory, config, names)

    loaded = load_file(directory / WEIGHTS_NAME)
    tensors = {}
    for module in modules:
        name = module["name"]
        neurons, delta = (loaded[f"{_PEFT_PREFIX}{name}.{attribute}"] for attribute in ("star_neurons", "star_delta"))
        neurons = check_neurons(neurons, widths[name], name)
        check_delta(delta, neurons.numel(), module["outputs"], name)
        tensors[name] = neurons, delta

    # a regex stays one: it may be there because a full name is the end of another full name
    target = config.get("target_modules")
    if isinstance(target, str) and target != "all-linear":
        selection = {"target_modules": target, "exclude_modules": config.get("exclude_modules")}
    else:
        selection = {"target_modules": set(names)}
    base, revision, task_type = (config.get(key) for key in ("base_model_name_or_path", "revision", "task_type"))
    return _Patch(tensors, widths, selection, base, revision, task_type)


def _check_modules_to_save(names: Any) -> None:
    if names:
        raise ValueError(
            f"The patch also holds whole modules ({', '.join(sorted(names))}), which a plain LoRA cannot: an export "
            "needs a patch without `modules_to_save`."
        )


def _check_routed(names: Iterable[str]) -> None:
    name = next(iter(names), None)
    if name is not None:
        raise ValueError(
            f"The patch holds neurons of routed experts ({name}), for which LoRA has no form that its loaders share; "
            "merge the patch into its base model instead."
        )


def _widths(directory: Path, config: dict[str, Any], names: list[str]) -> dict[str, int]:
    """The number of neurons of each module: as the patch records it, or else from the base model's configuration."""
    recorded = config.get("in_features")
    widths = recorded if isinstance(recorded, dict) else dict.fromkeys(names, recorded)
    _check_routed(name for name in names if isinstance(widths.get(name), list))
    if not all(isinstance(widths.get(name), int) for name in names):
        widths = _widths_of_base(config.get("base_model_name_or_path"), names)
    if widths is None:
        raise ValueError(
            f"{directory} does not record how wide the patched modules are, and the configuration of its base model "
            "is not at hand; load it onto the base model and pass that model to export_lora instead."
        )
    return {name: widths[name] for name in names}


def _widths_of_base(base: str | None, names: list[str]) -> dict[str, int] | None:
    """Build the base model without weights to see how wide its modules are; None when it is not on this machine."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..models.structure import linear_shape

    if not base:
        return None
    path = Path(base)
    try:
        if path.suffix.lower() == ".gguf":
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shapes = {name: linear_shape(model.get_submodule(name)) for name in names}
    except Exception:  # whatever a configuration of unknown origin raises, the base model is of no help
        return None
    return {name: shape[0] for name, shape in shapes.items() if shape} if all(shapes.values()) else None


def _lora_tensors(patch: _Patch, rank: int) -> dict[str, torch.Tensor]:
    """A (r, m) and B (d, r) of each module, under PEFT's names."""
    tensors = {}
    for name, (neurons, delta) in patch.tensors.items():
        count = neurons.numel()
        delta = delta.cpu()
        down = torch.zeros(rank, patch.widths[name], dtype=delta.dtype)
        down[torch.arange(count), neurons.cpu().long()] = 1
        up = torch.zeros(delta.shape[1], rank, dtype=delta.dtype)
        up[:, :count] = delta.T
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = down
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = up
    return tensors


def _lora_config(patch: _Patch) -> dict[str, Any]:
    from peft import LoraConfig

    rank = max(neurons.numel() for neurons, _ in patch.tensors.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=patch.fan_in_fan_out,
        base_model_name_or_path=patch.base,
        revision=patch.revision,
        task_type=patch.task_type,
        inference_mode=True,
        **patch.selection,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], patch: _Patch) -> None:
    from safetensors.torch import save_file

    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_card(config, patch), encoding="utf-8")


def _card(config: dict[str, Any], patch: _Patch) -> str:
    rank = config["r"]
    # a path on the machine of the export means nothing to readers, and the Hub refuses it as a `base_model`
    hub_id = patch.base if patch.base and patch.base.count("/") == 1 and not Path(patch.base).exists() else None
    header = ["---", *([f"base_model: {hub_id}"] if hub_id else []), "library_name: peft"]
    header += ["tags:", "- lora", "- peft-star", "---"]
    vllm = next((f"--max-lora-rank {choice}" for choice in _VLLM_RANKS if rank <= choice), None)
    vllm = f"start the server with `--enable-lora {vllm}`" if vllm else f"rank {rank} is more than it can load"
    counts = [neurons.numel() for neurons, _ in patch.tensors.values()]
    padding = " Modules with fewer neurons are padded with zeros to that rank." if len(set(counts)) > 1 else ""
    return f"""{chr(10).join(header)}

# A model patch as LoRA

This is a STAR patch of {sum(counts)} neurons in {len(counts)} modules, written by `peft_star` as a plain LoRA adapter
of rank {rank}. It is exact, not an approximation: a neuron is a column of an FFN's second matrix, `lora_A` holds the
one-hot selectors of the patched neurons and `lora_B` what is added to them. With `lora_alpha` = `r` the scaling is 1,
and logits equal those of the original patch up to float rounding.{padding}

It needs PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{hub_id or "path/to/the/base-model"}")
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```

- vLLM: {vllm}.
- llama.cpp: `python convert_lora_to_gguf.py --base path/to/the/base-model path/to/this/directory`.

Where a scale can be given, give 1. The original patch is smaller, and it is what `peft_star` can repair further.
"""
