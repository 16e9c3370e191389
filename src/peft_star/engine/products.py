"""Products with a layer's matrices in front of what changes in it: computed once, and replayed after that.

In the lowest layer that a repair patches, all but what the patch adds stays as it is: attention and the FFN's first
matrices read nothing that changes. Norms and activation functions are computed anew, since they cost little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .recording import forwarding

Products = list[tuple[nn.Module, torch.Tensor]]


@contextmanager
def recording_products(layer: nn.Module, changing: Sequence[nn.Module]) -> Iterator[Products]:
    """Keep what the linear layers inside of `layer` return, detached, until the first of the modules that are
    `changing` has run.

    Nothing is kept where something else writes into what they return, where one of them runs twice, or where modules
    are compiled, which would be done again for every other forward.
    """
    products: Products = []
    versions: list[int] = []
    over: list[bool] = []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not over:
            products.append((module, output.detach()))
            versions.append(output._version)

    def end(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        over.append(True)

    modules = list(layer.modules())
    with ExitStack() as stack:
        if changing and not any(module._compiled_call_impl for module in modules):
            for module in modules:
                if isinstance(module, (nn.Linear, Conv1D)):
                    # before other hooks, which may change the output and will do so again when it is replayed
                    stack.callback(module.register_forward_hook(keep, prepend=True).remove)
            for module in changing:
                stack.callback(module.register_forward_hook(end).remove)
        yield products
    changed = any(output._version != version for (_, output), version in zip(products, versions))
    if not over or changed or len({module for module, _ in products}) < len(products):
        products.clear()


@contextmanager
def replaying_products(products: Products) -> Iterator[None]:
    """Let the modules return what was kept of them; where a gradient is to reach their input, they compute."""
    with ExitStack() as stack:
        for module, output in products:
            stack.enter_context(forwarding(module, _kept(module, output)))
        yield


def _kept(module: nn.Module, output: torch.Tensor) -> Callable[..., torch.Tensor]:
    own = module.forward

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return own(x, *args, **kwargs)
        return output

    return forward
