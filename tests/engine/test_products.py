"""Products in front of what changes in a layer are computed once; what is replayed is equal bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_star.engine.products import recording_products, replaying_products


class Layer(nn.Module):
    """Two matrices in a row, with what comes between them."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.between = nn.Linear(4, 6), nn.Linear(6, 4), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.between(self.up(x)))


def recorded(layer: nn.Module, changing: list[nn.Module]):
    with torch.no_grad(), recording_products(layer, changing) as products:
        layer(torch.ones(3, 4))
    return products


def test_what_changes_is_computed_and_what_lies_before_it_is_not():
    layer = Layer(torch.relu)
    full, products = layer(torch.ones(3, 4)), recorded(layer, [layer.down])
    assert [module for module, _ in products] == [layer.up, layer.down]
    weight = layer.up.weight.detach().clone()
    with torch.no_grad():
        layer.up.weight.fill_(torch.nan)
        with replaying_products(products):
            assert torch.equal(layer(torch.ones(3, 4)), full)
        assert layer(torch.ones(3, 4)).isnan().all()
        layer.up.weight.copy_(weight)
    assert not any("forward" in vars(module) for module in layer.modules())


def test_what_runs_behind_the_first_change_is_not_kept():
    layer = Layer(torch.relu)
    assert [module for module, _ in recorded(layer, [layer.up, layer.down])] == [layer.up]


def test_a_gradient_passes_through_the_matrix_that_changes():
    layer = Layer(torch.relu).requires_grad_(False)
    products = recorded(layer, [layer.down])
    seen = []

    def begin(module, args):
        seen.append(args[0].detach().requires_grad_())
        return (seen[-1],)

    layer.down.register_forward_pre_hook(begin)
    gradients = []
    for kept in ([], products):
        with replaying_products(kept):
            layer(torch.ones(3, 4)).sum().backward()
        gradients.append(seen.pop().grad)
    assert gradients[0].any() and torch.equal(*gradients)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.square, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.square(self.square(x)))


def compiled() -> nn.Module:
    layer = Layer(torch.relu)
    layer.up.compile(backend="eager")
    return layer


@pytest.mark.parametrize(
    "layer", [Layer(nn.ReLU(inplace=True)), Twice(), compiled()], ids=["written to", "twice", "compiled"]
)
def test_what_cannot_be_replayed_is_not_kept(layer):
    assert recorded(layer, [layer.down]) == []


def test_without_a_run_of_what_changes_nothing_is_kept():
    layer = Layer(torch.relu)
    assert recorded(layer, [nn.Linear(4, 4)]) == []
