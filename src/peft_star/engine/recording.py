"""Hooks around one forward: what goes into and comes out of a model's parts, and a head that reads a few positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..models.inputs import head_of
from .batch import Batch


@dataclass
class Recording:
    """What one forward held, by module name.

    Attributes:
        v, o: Inputs and outputs of the FFNs' second matrices.
        h_in, h_out: Hidden states that enter and leave decoder layers.
        head: What the LM head was given, shape (B, T, d); None: not asked for.
    """

    v: dict[str, torch.Tensor] = field(default_factory=dict)
    o: dict[str, torch.Tensor] = field(default_factory=dict)
    h_in: dict[str, torch.Tensor] = field(default_factory=dict)
    h_out: dict[str, torch.Tensor] = field(default_factory=dict)
    head: torch.Tensor | None = None


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def recording(
    ffns: dict[str, nn.Module], decoder_layers: dict[str, nn.Module], head: nn.Module | None = None
) -> Iterator[Recording]:
    """Record v and o of FFNs and the hidden states around decoder layers, as parts of the graph that starts at the
    lowest FFN; of the `head`, if one is given, all that it reads, detached."""
    found = Recording()

    def v_of(name: str) -> Callable:
        def hook(module, args):
            v = args[0]
            # nothing below the lowest FFN needs a graph: start it here
            if not v.requires_grad:
                v = v.detach().requires_grad_(True)
            found.v[name] = v
            return (v, *args[1:])

        return hook

    def o_of(name: str) -> Callable:
        return lambda module, args, output: found.o.update({name: output})

    def input_of(name: str) -> Callable:
        return lambda module, args, kwargs: found.h_in.update({name: _hidden(args, kwargs)})

    def output_of(name: str) -> Callable:
        def hook(module, args, output):
            found.h_out[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def head_input(module, args) -> None:
        found.head = args[0].detach()

    with ExitStack() as stack:
        for name, module in ffns.items():
            stack.callback(module.register_forward_pre_hook(v_of(name)).remove)
            stack.callback(module.register_forward_hook(o_of(name)).remove)
        for name, module in decoder_layers.items():
            stack.callback(module.register_forward_pre_hook(input_of(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(output_of(name)).remove)
        if head is not None:
            stack.callback(head.register_forward_pre_hook(head_input).remove)
        yield found


@contextmanager
def recording_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep the inputs (N, m) of modules, detached, forward by forward."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Callable:
        def hook(module, args) -> None:
            found[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(keep(name)).remove)
        yield found


@contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """Let a decoder layer hand its input on as its output."""
    seen: list[torch.Tensor] = []

    def keep(module, args, kwargs) -> None:
        seen[:] = [_hidden(args, kwargs)]

    def replace(module, args, output):
        return (seen[0], *output[1:]) if isinstance(output, tuple) else seen[0]

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(replace).remove)
        yield


@contextmanager
def forwarding(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let a module compute `forward` in place of its own, between its hooks."""
    # what accelerate dispatches or offloads has a `forward` of its own already
    own = {key: value for key, value in vars(module).items() if key == "forward"}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        vars(module).update(own)


class Places(Protocol):
    """Where logits are asked for: N positions, and the sequences that they are in."""

    rows: torch.Tensor
    positions: torch.Tensor


@contextmanager
def head_reads(model: nn.Module, batch: Places | None) -> Iterator[None]:
    """Let the LM head see only the batch's N representations, (1, N, d) instead of (B, T, d); without a batch, when
    no logits are asked for, one position.

    What the model does behind its head (scaling, soft-capping, bias) still happens, on N rows of logits.
    """

    def gather(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        if batch is None:
            return (hidden[:, :1], *args[1:])
        rows, positions = batch.rows.to(hidden.device), batch.positions.to(hidden.device)
        return (hidden[rows, positions].unsqueeze(0), *args[1:])

    handle = head_of(model).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


class _Left(Exception):
    """A forward has come as far as it should."""


@contextmanager
def leaving(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keep the states (B, T, d) that leave a decoder layer, and end the forward there; see [`run_until_left`]."""
    seen: list[torch.Tensor] = []

    def stop(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).detach())
        raise _Left

    handle = layer.register_forward_hook(stop)
    try:
        yield seen
    finally:
        handle.remove()


def run_until_left(model: nn.Module, batch: Batch) -> None:
    """A forward of the batch that ends where [`leaving`] says."""
    try:
        model(**batch.model_inputs(), use_cache=False)
    except _Left:
        pass
