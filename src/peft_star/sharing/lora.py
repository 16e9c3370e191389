"""Writes a patch as a plain LoRA, which loads wherever LoRA loads and needs no peft_star: files into files.

Adding delta (k, d) to k columns of W (d, m) is a low-rank update that needs no decomposition: W + B A, where the rows
of A (k, m) are one-hot selectors of the neurons and B = deltaᵀ (d, k). With lora_alpha = r LoRA's scaling is 1.

A patch of many failures has more neurons than vLLM takes ranks, but hardly more directions than failures were pushed:
then the delta's singular vectors, up to float32's rounding, make a LoRA that is as exact and shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from ..files import new_directory
from ..models.structure import linear_shape
from .card import lora_card
from .changes import MOST_NUMBERS
from .download import find_patch
from .patch_files import CARD_NAME, Patch, check_patch_output, write_adapter

# the highest rank that vLLM loads
LARGEST = 512
# what is left out of a delta (Frobenius norm, relative): as much as rounding it to float32 changes
ROUNDING = 1e-7


def patch_to_lora(patch: str | Path, out_dir: str | Path, *, overwrite: bool = False) -> Path:
    """Write a saved patch as an exact LoRA; see [`export_lora`], which also takes models.

    Args:
        patch: A directory or a Hub id. It is converted without its base model.
        out_dir: The directory to write. It appears complete or not at all.
        overwrite: Whether an adapter that `out_dir` already holds may be replaced.

    Returns:
        `out_dir`.

    Raises:
        ValueError: It is no patch or a damaged one, it holds what a plain LoRA cannot, it does not say how wide its
            modules are, or `out_dir` cannot be written.
        FileNotFoundError: Nothing lies at the path of the patch.
    """
    directory = find_patch(patch)
    return write_lora(Patch.read(directory), out_dir, overwrite=overwrite, source=directory)


def write_lora(
    patch: Patch,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    fan_in_fan_out: bool = False,
    source: Path | None = None,
) -> Path:
    """Write `patch` as an exact LoRA adapter in PEFT's format.

    Its rank is the most neurons that a module has or, where these are more than `LARGEST`, the most directions that
    float32 tells apart in a module's delta.

    Args:
        patch: The patch.
        out_dir: The directory to write. It appears complete or not at all.
        overwrite: Whether an adapter that `out_dir` already holds may be replaced.
        fan_in_fan_out: Whether the modules store their weights as (in_features, out_features).
        source: The directory that the patch was read from, which `out_dir` must not hold.

    Returns:
        `out_dir`.

    Raises:
        ValueError: The patch holds what a plain LoRA cannot, it does not say how wide its modules are, its values are
            not valid, or `out_dir` cannot be written.
        OSError: `out_dir` was written to in the meantime; the message says where the adapter is kept.
    """
    path = Path(out_dir).expanduser()
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} is not empty; pass overwrite=True to replace the adapter it holds.")
    check_plain(patch)
    widths = _widths(patch, source)
    patch = patch.check({name: (widths[name], delta.shape[1]) for name, delta in patch.deltas.items()})
    check_patch_output(path, overwrite, inputs=(source,))

    counts = [neurons.numel() for neurons in patch.neurons.values()]
    pairs = lora_pairs(patch, widths, max(counts))
    if max(counts) > LARGEST:
        pairs = _shortened(pairs)
    rank = len(next(iter(pairs.values()))[0])
    config = _lora_config(patch, rank, fan_in_fan_out)
    with new_directory(path, overwrite) as temporary:
        write_adapter(temporary, config, _named(pairs))
        card = lora_card(rank, counts, patch.config.get("base_model_name_or_path"))
        (temporary / CARD_NAME).write_text(card, encoding="utf-8")
    return path


def check_plain(patch: Patch) -> None:
    """Raise ValueError when a patch holds what a plain LoRA cannot: whole modules, or neurons of routed experts."""
    names = patch.config.get("modules_to_save") or patch.others
    if names:
        raise ValueError(
            f"The patch also holds whole modules ({', '.join(sorted(names))}), which a plain LoRA cannot: an export "
            "needs a patch without `modules_to_save`."
        )
    widths = recorded_widths(patch)
    routed = next((name for name in patch.neurons if isinstance(widths.get(name), list)), None)
    if routed is not None:
        raise ValueError(
            f"The patch holds neurons of routed experts ({routed}), for which LoRA has no form that its loaders "
            "share; merge the patch into its base model instead."
        )


def recorded_widths(patch: Patch) -> dict[str, Any]:
    """What a patch's configuration says of the number of neurons of each module: None in old patches, and a list of
    two numbers for routed experts."""
    recorded = patch.config.get("in_features")
    return recorded if isinstance(recorded, dict) else dict.fromkeys(patch.neurons, recorded)


def _widths(patch: Patch, source: Path | None) -> dict[str, int]:
    """The number of neurons of each module: as the patch records it, or else from the base model's configuration."""
    widths: dict[str, Any] | None = recorded_widths(patch)
    names = list(patch.neurons)
    if not all(type(recorded_widths(patch).get(name)) is int for name in names):
        widths = _widths_of_base(patch.config.get("base_model_name_or_path"), names)
    if widths is None:
        raise ValueError(
            f"{source or 'The patch'} does not record how wide the patched modules are, and the configuration of its "
            "base model is not at hand; load it onto the base model and pass that model to export_lora instead."
        )
    found, rank = {name: widths[name] for name in names}, max(map(len, patch.neurons.values()))
    if min(found.values()) < 1 or max(found.values()) * rank > MOST_NUMBERS:
        raise ValueError(f"{source or 'The patch'} is damaged: no module is as wide as it says of its own.")
    return found


def _widths_of_base(base: str | None, names: list[str]) -> dict[str, int] | None:
    """Build the base model without weights to see how wide its modules are; None when it is not on this machine."""
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


def lora_pairs(patch: Patch, widths: Mapping[str, int], rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (rank, m) and B (d, rank) of each module, so that B A is what the patch adds to its weight (d, m).

    Args:
        patch: The patch.
        widths: The number of neurons m of each module.
        rank: Modules with fewer patched neurons are padded with zeros to it.
    """
    pairs = {}
    for name, neurons in patch.neurons.items():
        count = neurons.numel()
        delta = patch.deltas[name].cpu()
        down = torch.zeros(rank, widths[name], dtype=delta.dtype)
        down[torch.arange(count), neurons.cpu().long()] = 1
        up = torch.zeros(delta.shape[1], rank, dtype=delta.dtype)
        up[:, :count] = delta.T
        pairs[name] = (down, up)
    return pairs


def _shortened(
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (r, m), (d, r) of the lowest rank that is one for all modules and gives the same products up to float32's
    rounding; the pairs themselves where that is not lower."""
    short = {}
    for name, (down, up) in pairs.items():
        neurons = down.any(dim=0).nonzero()[:, 0]
        u, sizes, v = torch.linalg.svd((up.double() @ down[:, neurons].double()), full_matrices=False)
        left_out = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
        kept = max(1, int((left_out > ROUNDING * sizes.norm()).sum()))
        short[name] = neurons, v[:kept], u[:, :kept] * sizes[:kept]
    rank = max(len(v) for _, v, _ in short.values())
    if rank >= len(next(iter(pairs.values()))[0]):
        return pairs
    found = {}
    for name, (neurons, v, u) in short.items():
        down, up = torch.zeros(rank, pairs[name][0].shape[1]), torch.zeros(len(u), rank)
        down[: len(v), neurons] = v.float()
        up[:, : len(v)] = u.float()
        found[name] = down, up
    return found


def _named(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    tensors = {f"{name}.lora_A.weight": down for name, (down, _) in pairs.items()}
    return tensors | {f"{name}.lora_B.weight": up for name, (_, up) in pairs.items()}


def _lora_config(patch: Patch, rank: int, fan_in_fan_out: bool) -> dict[str, Any]:
    # a regex stays one: it may be there because a full name is the end of another full name
    target = patch.config.get("target_modules")
    if isinstance(target, str) and target != "all-linear":
        selection: dict[str, Any] = {"target_modules": target, "exclude_modules": patch.config.get("exclude_modules")}
    else:
        selection = {"target_modules": set(patch.neurons)}
    named: dict[str, Any] = {
        key: patch.config.get(key) for key in ("base_model_name_or_path", "revision", "task_type")
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
        **named,
        **selection,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
