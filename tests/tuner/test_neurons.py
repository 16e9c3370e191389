"""How many neurons an adapter has in a module, which before any repair, and what their indices may become."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_star.tuner.neurons import TOO_MANY_NEURONS, NeuronDict, count_of, spread_neurons

WIDTH = 12


@given(width=st.integers(1, 300), data=st.data())
def test_spread_neurons_are_valid(width, data):
    count = data.draw(st.integers(1, width))
    neurons = spread_neurons(count, width)
    assert neurons.dtype == torch.int32
    assert neurons.unique().numel() == count
    assert 0 <= neurons.min() and neurons.max() < width
    gaps = neurons.diff()
    assert count < 2 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("amount, expected", [(1, 1), (12, 12), (1.0, 12), (0.5, 6), (0.001, 1), (0.99, 12)])
def test_count_of(amount, expected):
    assert count_of(amount, WIDTH, "neurons") == expected


def test_more_neurons_than_the_module_has():
    with pytest.raises(ValueError, match="13 neurons were requested for the module mlp.down, which has only 12"):
        count_of(13, WIDTH, "mlp.down", TOO_MANY_NEURONS)
    with pytest.raises(ValueError, match="13 layers were asked for, but there are 12; ask for at most 12"):
        count_of(13, WIDTH, "layers")


def test_indices_out_of_range_are_refused_when_a_loader_puts_them_in_place():
    neurons = NeuronDict(WIDTH)
    neurons["a"] = spread_neurons(2, WIDTH)
    with pytest.raises(ValueError, match="adapter 'a'"):
        neurons.a = torch.tensor([1, WIDTH])
    assert neurons["a"].tolist() == spread_neurons(2, WIDTH).tolist()
