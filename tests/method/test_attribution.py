"""Attribution and occlusion (paper section 3.1); Input x Gradient of whole traces is in test_trace.py."""

import pytest
import torch

from peft_star.engine.engine import Engine
from peft_star.engine.passes import completion_logits
from peft_star.failures import Row
from peft_star.method.attribution import exact_occlusion, first_order_occlusion, input_x_gradient, rank_agreement
from peft_star.models import structure
from support.modules import Identity
from support.rows import random_rows, traced
from support.tiny_models import MODELS


def decoder_layers(model):
    return dict(structure.find_decoder_layers(model))


def test_input_x_gradient_is_summed_in_squares_over_the_tokens():
    v, gradient = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[2.0, 1.0], [-1.0, 0.0]])
    assert input_x_gradient(v, gradient).tolist() == [13, 4]
    assert input_x_gradient(v.bfloat16(), gradient.bfloat16()).dtype == torch.float32
    # so that batches add up
    parts = sum(input_x_gradient(v[i : i + 1], gradient[i : i + 1]) for i in range(2))
    assert torch.equal(parts, input_x_gradient(v, gradient))


def test_first_order_occlusion_adds_up_positions_that_would_cancel():
    h_out, h_in = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2)
    gradient = torch.tensor([[[1.0, 0.0], [0.0, -3.0]]])
    assert first_order_occlusion(h_in, h_out, gradient) == pytest.approx(5 * 1 + 1 * 3)
    assert (gradient * (h_in - h_out)).sum() == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2", "opt"])
def test_exact_occlusion_is_the_loss_of_the_model_without_the_layer(name):
    model = MODELS[name].build()
    layers, found, done = decoder_layers(model), traced(model, random_rows()), []
    losses = exact_occlusion(Engine(model), layers, found.batches, found.medium, done.append)
    assert done == [1] * len(layers)
    # reference: take the layer out of the model
    prefix = next(iter(layers)).rpartition(".")[0]
    stack = model.get_submodule(prefix)
    for index, key in enumerate(layers):
        removed = stack[index]
        stack[index] = Identity(returns_tuple=name == "falcon")
        loss = 0.0
        with torch.no_grad():
            for batch in found.batches:
                logits = completion_logits(model, batch)
                chosen = torch.isin(batch.slots, found.medium)
                loss += torch.nn.functional.cross_entropy(
                    logits[chosen], batch.expected[chosen], reduction="sum"
                ).item()
        stack[index] = removed
        assert losses[key] - found.loss == pytest.approx(loss - found.loss, rel=1e-4, abs=1e-5)


def test_first_order_occlusion_bounds_the_change_of_small_layers():
    """Where layers do little, the loss is linear in what they do: the bound holds, and is not loose by much."""
    model = MODELS["llama"].build()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "o_proj" in key or "down_proj" in key:
                parameter.mul_(1e-2)
    found = traced(model.double(), random_rows())
    losses = exact_occlusion(Engine(model), decoder_layers(model), found.batches, found.medium)
    exact = {key: loss - found.loss for key, loss in losses.items()}
    for key, estimate in found.occlusion.items():
        assert abs(exact[key]) <= 1.01 * estimate
    assert sum(abs(exact[key]) for key in exact) > 0.02 * sum(found.occlusion.values())


def test_first_order_occlusion_is_the_linear_term_of_one_position():
    """With one position and a change along the gradient the bound is the linear term itself."""
    model = MODELS["llama"].build()
    rows = [Row(0, "", "", (5,), (9,))]
    layers, found = decoder_layers(model), traced(model.double(), rows)
    recorded = {}
    for key, module in layers.items():
        module.register_forward_hook(lambda m, a, o, key=key: recorded.__setitem__(key, (a[0], o)))
    model.requires_grad_(True)
    logits = model(input_ids=torch.tensor([[5]])).logits[0, 0]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(9))
    for key, (before, after) in recorded.items():
        (gradient,) = torch.autograd.grad(loss, after, retain_graph=True)
        expected = gradient.norm() * (before - after).norm()
        assert found.occlusion[key] == pytest.approx(expected.item(), rel=1e-5)


def test_rank_agreement():
    one = {"a": 1.0, "b": -2.0, "c": 3.0}
    assert rank_agreement(one, one, 2) == {"spearman": pytest.approx(1.0), "top_overlap": 1.0}
    assert rank_agreement(one, {"a": 3.0, "b": 2.0, "c": -1.0}, 1)["spearman"] == pytest.approx(-1.0)
