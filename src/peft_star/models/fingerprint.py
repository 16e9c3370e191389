"""A fingerprint of base weights, to tell whether a patch meets the model that it was solved for.

A patch is a set of neurons and deltas of one model; on other weights it loads without complaint and does damage. A
hash of the weights would tell them apart but also change with every cast, so a fingerprint is a short vector of
sketches instead, and two of them match when they differ by no more than rounding to bfloat16 does.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

UNKNOWN = "unknown"

_VERSION = "star1:"
_SAMPLES = 32  # entries of each tensor
_SHAPE_SLOTS, _SCALE_SLOTS = 32, 16
_QUANTUM = 1024
# Measured on real and random models: rounding to bfloat16 moves the sketches of entries by about 0.001 (root mean
# square), noise of 1% of the weights' size by 0.01.
_SHAPE_TOLERANCE, _SCALE_TOLERANCE = 0.004, 0.01
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Opaque(Exception):
    """The weights cannot be read."""


def fingerprint(model: nn.Module) -> str:
    """A short text by which the base weights of `model` can be recognised.

    From each parameter 32 entries at fixed positions are read, scaled by their root mean square, and added with signs
    into 32 sums; the logarithms of the scales are added into 16 more. Names choose signs and sums. So it takes a
    fraction of a second for any model, and is the same for any files, devices and data types; adapters, heads tied to
    the embeddings and wrappers do not count. What changes only a few columns, as a merged patch does, may go unseen.

    Args:
        model: A model, with or without adapters around it.

    Returns:
        A text for `StarConfig.base_fingerprint` and [`matches`]; "unknown" when the weights cannot be read: quantized,
        sharded over processes, offloaded, or with an adapter merged into them.
    """
    try:
        sketches = _sketch(model)
    except _Opaque:
        return UNKNOWN
    values = [max(-32767, min(32767, round(value * _QUANTUM))) for value in sketches]
    packed = b"".join(value.to_bytes(2, "little", signed=True) for value in values)
    return _VERSION + base64.b64encode(packed).decode("ascii")


def matches(a: str, b: str) -> bool:
    """Whether two fingerprints are of the same weights, up to rounding to a shorter data type.

    A fingerprint that says nothing ("unknown", or one of another version) matches any other, with a warning.
    """
    same = _compare(a, b)
    if same is None:
        warnings.warn(
            "Whether these are the weights that the patch was solved for cannot be told: they, or the patch, have no "
            "fingerprint that can be compared (quantized or sharded weights have none).",
            stacklevel=2,
        )
    return same is not False


def check_base(model: nn.Module, patch_config: Mapping[str, Any], *, allow_mismatch: bool = False) -> None:
    """Refuse a patch that was solved for other weights than those of `model`.

    Args:
        model: A model, with or without adapters around it.
        patch_config: The patch's configuration, as in its `adapter_config.json`. One without a fingerprint passes.
        allow_mismatch: Warn instead.

    Raises:
        ValueError: The weights are not those that the patch was solved for.
    """
    recorded = patch_config.get("base_fingerprint")
    if not recorded or matches(recorded, fingerprint(model)):
        return
    message = _mismatch(patch_config.get("base_model_name_or_path"))
    if not allow_mismatch:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def warn_of_other_base(model: nn.Module, patch_config: Mapping[str, Any]) -> None:
    """Warn when `model` is surely not the one that a patch of this configuration was solved for; else say nothing."""
    recorded = patch_config.get("base_fingerprint")
    if not recorded:
        return
    try:
        same = _compare(recorded, fingerprint(model))
    except Exception:  # a model that this cannot walk through may carry a patch all the same
        return
    if same is False:
        warnings.warn(_mismatch(patch_config.get("base_model_name_or_path")), stacklevel=2)


def _mismatch(base: str | None) -> str:
    return (
        f"The patch was solved for other weights{f', those of {base},' if base else ''} than this model holds, where "
        "its neurons mean something else; put it on the model that it was made for, or repair this one anew."
    )


def _compare(a: str, b: str) -> bool | None:
    """Whether two fingerprints match; None when one of them says nothing."""
    first, second = _parse(a), _parse(b)
    if first is None or second is None:
        return None
    differences = [x - y for x, y in zip(first, second, strict=True)]
    shape = math.sqrt(sum(value * value for value in differences[:_SHAPE_SLOTS]) / _SHAPE_SLOTS)
    return shape <= _SHAPE_TOLERANCE and max(map(abs, differences[_SHAPE_SLOTS:])) <= _SCALE_TOLERANCE


def _parse(text: str) -> list[float] | None:
    if not isinstance(text, str) or not text.startswith(_VERSION):
        return None
    try:
        packed = base64.b64decode(text.removeprefix(_VERSION), validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(packed) != 2 * (_SHAPE_SLOTS + _SCALE_SLOTS):
        return None
    values = [int.from_bytes(packed[i : i + 2], "little", signed=True) for i in range(0, len(packed), 2)]
    return [value / _QUANTUM for value in values]


def _sketch(model: nn.Module) -> list[float]:
    samples = _samples(model)
    if not samples:
        raise _Opaque
    shape, scale = [0.0] * _SHAPE_SLOTS, [0.0] * _SCALE_SLOTS
    for name, values in samples.items():
        rms = math.sqrt(sum(value * value for value in values) / len(values))
        if not math.isfinite(rms):
            raise _Opaque
        if rms == 0:
            continue
        # of each byte five bits choose the sum and one the sign
        digest = hashlib.sha256(name.encode()).digest()
        for byte, value in zip(digest, values):
            shape[byte % _SHAPE_SLOTS] += (value if byte & 128 else -value) / rms
        byte = hashlib.sha256(f"{name} scale".encode()).digest()[0]
        scale[byte % _SCALE_SLOTS] += math.log(rms) if byte & 128 else -math.log(rms)
    # as many values as there are, a sum has about the size of one
    shape_unit = math.sqrt(len(samples) * _SAMPLES / _SHAPE_SLOTS)
    scale_unit = math.sqrt(max(1.0, len(samples) / _SCALE_SLOTS))
    return [value / shape_unit for value in shape] + [value / scale_unit for value in scale]


def _samples(model: nn.Module) -> dict[str, list[float]]:
    """Entries of each base parameter, by a name that does not depend on what wraps the model."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    elif isinstance(model, BaseTuner):
        model = model.model
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise _Opaque
    backbone, head = model, None
    if isinstance(model, PreTrainedModel):
        # the backbone alone: its names are the same in a causal language model, a classifier and on its own
        backbone, head = model.base_model, model.get_output_embeddings()
    parameters = dict(_base_parameters(backbone))
    samples = {name: _read(parameter) for name, parameter in parameters.items()}
    if head is not None:
        # a head that is tied adds nothing, also when it was saved as a tensor of its own
        known = list(samples.values())
        new = {name: _read(parameter) for name, parameter in _base_parameters(head, "head")}
        samples |= {name: values for name, values in new.items() if values not in known}
    return samples


def _base_parameters(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of `module` by their names in the bare base model, in order; those of adapters are left out."""
    if isinstance(module, BaseTunerLayer):
        if module.merged:
            raise _Opaque
        yield from _base_parameters(module.get_base_layer(), name)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_parameters(module.original_module, name)
        return
    for key, parameter in module.named_parameters(recurse=False):
        yield f"{name}.{key}" if name else key, parameter
    for key, child in module.named_children():
        if key == "_fsdp_wrapped_module":
            raise _Opaque
        if key in ("_orig_mod", "_checkpoint_wrapped_module"):
            key = ""
        yield from _base_parameters(child, ".".join(part for part in (name, key) if part))


def _read(parameter: torch.Tensor) -> list[float]:
    data = parameter.detach()
    # quantized and sharded weights are integers, subclasses of tensors, or empty on this process
    plain = type(data) is torch.Tensor and data.layout == torch.strided
    if not plain or data.is_meta or data.dtype not in _FLOATS or data.numel() == 0:
        raise _Opaque
    golden = (math.sqrt(5) - 1) / 2
    positions = [int(((i + 1) * golden) % 1 * data.numel()) for i in range(_SAMPLES)]
    index = torch.unravel_index(torch.tensor(positions, device=data.device), data.shape)
    return data[index].double().cpu().tolist()
