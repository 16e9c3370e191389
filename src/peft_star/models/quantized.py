"""What quantised bases need beyond PEFT: 4-bit layers of bitsandbytes on processors with AVX512-BF16.

There, bitsandbytes (seen in 0.50) packs the weights anew in the first inference, for a kernel without a backward
pass. What runs later with gradients gets none through these layers, without an error; what PEFT reads as the
dequantised weight of a packed layer is not that weight; and `state_dict`, which every save of an adapter calls,
unpacks the weights in place but leaves their scales in the kernel's order, so that the model is broken afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn


def _packed_state(module: nn.Module) -> Any:
    """The quantisation state of a 4-bit layer that is packed for the processor, or None."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return state if getattr(state, "packing_format_for_cpu", False) else None


def _unpacked(module: Any, packed_state: Any) -> tuple[torch.Tensor, Any]:
    """The 4-bit weight and its state as they were before packing, but for scales that were rounded to bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(packed_state)
    state.original_nested = False  # or the scales would be quantised again
    data, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    if state.absmax.dim() == 2:  # still in the kernel's order: blocks by rows
        state.absmax = state.absmax.T.reshape(-1).float()
    return data, state


@contextmanager
def readable(module: nn.Module) -> Iterator[None]:
    """Show a packed 4-bit weight in the form that can be dequantised; the packed one is back afterwards, untouched."""
    packed_state = _packed_state(module)
    if packed_state is None:
        yield
        return
    weight: Any = module.weight
    packed = weight.data
    weight.data, weight.quant_state = _unpacked(module, packed_state)
    try:
        yield
    finally:
        weight.data, weight.quant_state = packed, packed_state


def read_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer in floating point, dequantised where it is quantised; None if it cannot be read."""
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)
    if backend is None:
        return getattr(module, "weight", None)
    try:
        with readable(module):
            return backend.get_base_weight(module)
    except (NotImplementedError, TypeError):
        return None


class _Packed(torch.autograd.Function):
    """The output of a packed 4-bit layer with the backward pass that its kernel lacks: dL/dx = dL/dy W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, output: torch.Tensor, module: nn.Module) -> torch.Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # as bitsandbytes does in its own backward passes: one layer at a time
        weight = read_weight(ctx.module)
        assert weight is not None  # it is a layer that can be read
        return (gradient.to(weight.dtype) @ weight).to(ctx.dtype), None, None


def _with_backward(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    if torch.is_grad_enabled() and args and args[0].requires_grad and _packed_state(module) is not None:
        return _Packed.apply(args[0], output.detach(), module)
    return None


def _unpack_to_save(module: Any, prefix: str, keep_vars: bool) -> None:
    # the next inference packs the weight again, to the same bits
    packed_state = _packed_state(module)
    if packed_state is not None:
        module.weight.data, module.weight.quant_state = _unpacked(module, packed_state)


def mend_packing(model: nn.Module) -> None:
    """Make the 4-bit layers of a model trainable and saveable also after bitsandbytes packed them for the processor.

    Hooks on these layers add the backward pass and unpack the weights before `state_dict` would. What the model
    computes stays as it is, and nothing is dequantised in the forward pass. Other layers are left alone.

    Args:
        model: The model; it may be given several times.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if _with_backward not in module._forward_hooks.values():
            module.register_forward_hook(_with_backward)
            module.register_state_dict_pre_hook(_unpack_to_save)
