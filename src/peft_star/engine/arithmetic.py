"""A model's forward in the arithmetic of what will serve it: another data type, or llama.cpp's integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .batch import Batch
from .engine import Engine
from .passes import completion_logits
from .predictions import Predictions

# llama.cpp's 8-bit blocks: one scale, a float16, for so many entries
BLOCK = 32


@dataclass(frozen=True)
class Arithmetic:
    """How something computes.

    Attributes:
        name: What a user calls it.
        dtype: All weights and activations are of this type; None: of the model's.
        blocks: By the number of a product's inputs, how many of them llama.cpp rounds with one scale to 8 bits before
            it multiplies; None stands for all numbers that are not named; a product that has no entry is left alone.
        weights: Whether matrices are rounded in the same way.
    """

    name: str
    dtype: torch.dtype | None = None
    blocks: tuple[tuple[int | None, int], ...] = ()
    weights: bool = False

    def block(self, features: int) -> int | None:
        """How many of a product's inputs share a scale, or None: they are left as they are."""
        blocks = dict(self.blocks)
        size = blocks.get(features, blocks.get(None))
        return size if size and features % size == 0 else None


FP32 = Arithmetic("fp32", torch.float32)
BF16 = Arithmetic("bf16", torch.bfloat16)
FP16 = Arithmetic("fp16", torch.float16)
Q8_0 = Arithmetic("q8_0", blocks=((None, BLOCK),), weights=True)
ARITHMETICS = {arithmetic.name: arithmetic for arithmetic in (FP32, BF16, FP16, Q8_0)}


@contextmanager
def computing(model: nn.Module, arithmetic: Arithmetic) -> Iterator[None]:
    """Let the model compute so for the time being. Its parameters stay as they are: each module is handed a rounded
    copy of its own when it runs, and hands it back. What adapters hold is not rounded.

    Args:
        model: A causal LM in evaluation mode, with or without adapters.
        arithmetic: How it is to compute.
    """
    adapters, last = _adapters(model), _Rounded()
    with ExitStack() as stack:
        for module in model.modules():
            held_by = {} if module in adapters else module._parameters
            own = {name: p for name, p in held_by.items() if p is not None and _is_plain(p)}
            if own and (arithmetic.dtype is not None or arithmetic.weights):
                held: list[dict[str, nn.Parameter]] = []
                stack.callback(module.register_forward_pre_hook(partial(_lend, arithmetic, own, held)).remove)
                stack.callback(
                    module.register_forward_hook(partial(_take_back, held), always_call=True, prepend=True).remove
                )
            features = _features(module)
            size = None if features is None else arithmetic.block(features)
            if size is not None:
                stack.callback(module.register_forward_pre_hook(partial(_round_input, size, last)).remove)
        yield


def computes_in_other_types(model: nn.Module) -> bool:
    """Whether all that the model holds can be lent in another type: nothing is quantised, offloaded or sharded."""
    adapters = _adapters(model)
    held = (p for module in model.modules() if module not in adapters for p in module._parameters.values())
    return not getattr(model, "is_quantized", False) and all(_is_plain(p) for p in held if p is not None)


def in_arithmetic(batch: Batch, arithmetic: Arithmetic) -> Batch:
    """The batch as a model that computes so takes it: a mask of packed sequences is of the type of hidden states."""
    if batch.segments is None or arithmetic.dtype is None:
        return batch
    return replace(batch, dtype=arithmetic.dtype)


@torch.no_grad()
def predict_in(engine: Engine, arithmetic: Arithmetic, batches: Sequence[Batch], into: Predictions) -> Predictions:
    """[`predict`] in another arithmetic; what the engine replays must have been recorded in it, too.

    Raises:
        ValueError: The model cannot compute so.
    """
    for batch in engine.team.share(batches):
        try:
            with computing(engine.model, arithmetic), engine.replay(batch):
                logits = completion_logits(engine.model, in_arithmetic(batch, arithmetic))
            if not logits.isfinite().all():
                raise RuntimeError("its numbers are too large for that type")
        except RuntimeError as error:
            raise ValueError(
                f"This model cannot compute as {arithmetic.name} ({str(error).splitlines()[0]}); leave it out of "
                "what the repair is to be served in."
            ) from error
        into.read(batch, logits)
    engine.team.join(into, batches)
    return into


def round_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Values (..., n) as llama.cpp's 8-bit blocks hold them: integers of up to 127, one scale for each `size` of them;
    the scale of blocks of `BLOCK` is a float16, that of longer ones a float32."""
    blocks = values.float().unflatten(-1, (-1, size))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    kept = scale.half().float() if size == BLOCK else scale
    whole = torch.div(blocks, scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    return whole.mul_(kept).flatten(-2).to(values.dtype)


def _adapters(model: nn.Module) -> set[nn.Module]:
    """The modules that hold what adapters add."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parts = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    return {module for part in parts if isinstance(part, nn.Module) for module in part.modules()}


def _is_plain(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter is an ordinary tensor of real numbers, not a quantised or an offloaded one."""
    if parameter is None or parameter.is_meta or not parameter.is_floating_point():
        return False
    return type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor


def _features(module: nn.Module) -> int | None:
    """The number of inputs of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.nx if isinstance(module, Conv1D) else None


def _rounded(module: nn.Module, parameter: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    values = parameter.detach()
    if arithmetic.dtype is not None:
        return values.to(arithmetic.dtype)
    if values.dim() != 2 or not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
        return values
    turned = isinstance(module, Conv1D)
    values = values.T if turned else values
    size = arithmetic.block(values.shape[-1])
    values = values if size is None else round_blocks(values, size)
    return values.T if turned else values


def _lend(
    arithmetic: Arithmetic, own: dict[str, nn.Parameter], held: list[dict[str, nn.Parameter]], module: nn.Module, args
) -> None:
    held.append(own)
    for name, parameter in own.items():
        module._parameters[name] = nn.Parameter(_rounded(module, parameter, arithmetic), requires_grad=False)


def _take_back(held: list[dict[str, nn.Parameter]], module: nn.Module, args, output) -> None:
    if held:
        module._parameters.update(held.pop())


@dataclass
class _Rounded:
    """The last product's input and what it was rounded to: the matrices of attention read one input, and so do those
    of a gated FFN."""

    given: torch.Tensor | None = None
    state: tuple[int, int] = (0, 0)
    values: torch.Tensor | None = None

    def of(self, given: torch.Tensor, size: int) -> torch.Tensor:
        if given.is_inference():  # whether it was changed in place cannot be told
            return round_blocks(given, size)
        state = given._version, size
        if self.values is None or self.given is not given or self.state != state:
            self.given, self.state, self.values = given, state, round_blocks(given, size)
        return self.values


def _round_input(size: int, last: _Rounded, module: nn.Module, args: tuple) -> tuple:
    return (last.of(args[0], size), *args[1:])
