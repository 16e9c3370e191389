"""Attribution, occlusion and the sparsity patterns (paper section 3.1)."""

import pytest
import torch

from peft_star.engine.batch import make_batches
from peft_star.engine.passes import completion_logits, teacher_forced
from peft_star.failures import Row
from peft_star.method.locate import (
    candidate_layers,
    count_of,
    exact_occlusion,
    input_x_gradient,
    rank_agreement,
    select_layers,
    select_neurons,
)
from peft_star.method.trace import trace
from peft_star.models import structure
from support.tiny_models import MODELS


def rows_for(model, number=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    made = []
    for index in range(number):
        ids = torch.randint(3, vocabulary, (6 + index,), generator=generator).tolist()
        made.append(Row(index, "", "", tuple(ids[:4]), tuple(ids[4:])))
    return made


def traced(model, rows, max_tokens=1000, **kwargs):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batches = make_batches(rows, max_tokens)
    ffns = structure.find_second_matrices(model)
    layers = dict(structure.find_decoder_layers(model))
    return batches, ffns, layers, trace(model, batches, ffns, layers, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_the_trace_matches_plain_autograd(name):
    model = MODELS[name].build()
    rows = rows_for(model)
    batches, ffns, layers, found = traced(model, rows)
    assert found.medium.numel() > 2
    scores = input_x_gradient(found)

    # reference: the full weight gradient, row by row, without padding, batching or hooks on the head
    model.requires_grad_(True)
    weights = {key: module.weight for key, module in ffns.items()}
    kept = {}
    handles = [
        module.register_forward_hook(lambda m, a, o, key=key: kept.__setitem__(key, a[0]))
        for key, module in ffns.items()
    ]
    reference = {key: 0.0 for key in ffns}
    squares = {key: 0.0 for key in ffns}
    loss = 0.0
    medium = 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        positions = torch.tensor(list(row.medium_positions))
        expected = torch.tensor(row.completion_ids)
        failing = logits[positions].argmax(-1) != expected
        if not failing.any():
            continue
        medium += int(failing.sum())
        part = torch.nn.functional.cross_entropy(logits[positions[failing]], expected[failing], reduction="sum")
        loss += part.item()
        inputs = [kept[key] for key in ffns]
        gradients = torch.autograd.grad(part, [*weights.values(), *inputs])
        for key, by_weight, by_input, v in zip(ffns, gradients, gradients[len(ffns) :], inputs):
            conv = model.get_submodule(key).__class__.__name__ == "Conv1D"
            reference[key] = reference[key] + (by_weight if conv else by_weight.T)
            v, by_input = v.reshape(-1, v.shape[-1]), by_input.reshape(-1, by_input.shape[-1])
            squares[key] = squares[key] + (v[positions[failing]] * by_input[positions[failing]]).square().sum(0)
    for handle in handles:
        handle.remove()
    assert found.medium.numel() == medium
    assert found.loss == pytest.approx(loss, rel=1e-4)
    neurons = torch.tensor([0, 3, 7])
    for key in ffns:
        torch.testing.assert_close(found.layers[key].gradient(neurons), reference[key][neurons], rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(scores[key], squares[key].detach().sqrt(), rtol=2e-3, atol=1e-6)


def test_batches_do_not_change_the_trace():
    model = MODELS["llama"].build()
    rows = rows_for(model, 5)
    whole, small = traced(model, rows)[-1], traced(model, rows, max_tokens=1)[-1]
    assert whole.loss == pytest.approx(small.loss, rel=1e-5)
    order = whole.medium.argsort(), small.medium.argsort()
    assert torch.equal(whole.medium[order[0]], small.medium[order[1]])
    for key in whole.layers:
        activations = [torch.cat(t.layers[key].activations)[o] for t, o in zip((whole, small), order)]
        torch.testing.assert_close(*activations)
        torch.testing.assert_close(whole.layers[key].scores, small.layers[key].scores)


def test_sequences_that_would_take_too_much_memory_are_not_kept(monkeypatch):
    monkeypatch.setattr("peft_star.method.trace.KEEP_BYTES", 10)
    model = MODELS["llama"].build()
    found = traced(model, rows_for(model))[-1]
    layer = next(iter(found.layers.values()))
    assert layer.inputs is None and layer.gradient(torch.tensor([0])) is None
    assert layer.scores is not None


def test_a_tie_that_goes_the_right_way_is_no_failure():
    """Its semantic delta would be that of a token with itself."""
    model = MODELS["llama"].build()
    with torch.no_grad():
        model.lm_head.weight[9] = model.lm_head.weight[5]
        model.lm_head.weight[[*range(5), *range(6, 9), *range(10, 64)]] = 0
        model.lm_head.weight[:, :] *= torch.sign(model(input_ids=torch.tensor([[7]])).logits[0, 0, 5])
    argmax = model(input_ids=torch.tensor([[7]])).logits[0, 0].argmax().item()
    assert argmax in (5, 9)
    found = traced(model, [Row(0, "", "", (7,), (argmax,))])[-1]
    assert found.predictions.margin.item() == 0 and not found.medium.numel()


def test_only_the_slots_asked_for_are_traced():
    model = MODELS["llama"].build()
    rows = rows_for(model)
    everything = traced(model, rows)[-1]
    one = traced(model, rows, only_slots=everything.medium[:1])[-1]
    assert one.medium.tolist() == everything.medium[:1].tolist()
    assert 0 < one.loss < everything.loss


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2", "opt"])
def test_exact_occlusion_is_the_loss_of_the_model_without_the_layer(name):
    model = MODELS[name].build()
    batches, _, layers, found = traced(model, rows_for(model))
    changes = exact_occlusion(model, batches, layers, found.medium, found.loss)
    # reference: take the layer out of the model
    prefix = next(iter(layers)).rpartition(".")[0]
    stack = model.get_submodule(prefix)
    for index, key in enumerate(layers):
        removed = stack[index]
        stack[index] = Identity(returns_tuple=name == "falcon")
        loss = 0.0
        with torch.no_grad():
            for batch in batches:
                logits = completion_logits(model, batch)
                chosen = torch.isin(batch.slots, found.medium)
                loss += torch.nn.functional.cross_entropy(
                    logits[chosen], batch.expected[chosen], reduction="sum"
                ).item()
        stack[index] = removed
        assert changes[key] == pytest.approx(loss - found.loss, rel=1e-4, abs=1e-5)


class Identity(torch.nn.Module):
    attention_type = "full_attention"

    def __init__(self, returns_tuple):
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states, None) if self.returns_tuple else hidden_states


def test_first_order_occlusion_bounds_the_change_of_small_layers():
    """Where layers do little, the loss is linear in what they do: the bound holds, and is not loose by much."""
    model = MODELS["llama"].build()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "o_proj" in key or "down_proj" in key:
                parameter.mul_(1e-2)
    batches, _, layers, found = traced(model.double(), rows_for(model))
    exact = exact_occlusion(model, batches, layers, found.medium, found.loss)
    for key, estimate in found.occlusion.items():
        assert abs(exact[key]) <= 1.01 * estimate
    assert sum(abs(exact[key]) for key in exact) > 0.02 * sum(found.occlusion.values())


def test_first_order_occlusion_is_the_linear_term_of_one_position():
    """With one position and a change along the gradient the bound is the linear term itself."""
    model = MODELS["llama"].build()
    rows = [Row(0, "", "", (5,), (9,))]
    batches, _, layers, found = traced(model.double(), rows)
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


def test_predictions_and_margins():
    model = MODELS["llama"].build()
    rows = rows_for(model)
    predictions = teacher_forced(model, make_batches(rows, 1000))
    slot = 0
    for row in rows:
        with torch.no_grad():
            probabilities = model(input_ids=torch.tensor([row.input_ids])).logits[0].softmax(-1)
        for position, expected in zip(row.medium_positions, row.completion_ids):
            p = probabilities[position]
            others = p.clone()
            others[expected] = 0
            assert predictions.argmax[slot] == p.argmax()
            assert predictions.margin[slot].item() == pytest.approx((p[expected] - others.max()).item(), abs=1e-6)
            assert predictions.p_expected[slot].item() == pytest.approx(p[expected].item(), abs=1e-6)
            slot += 1


def test_patterns():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0, 0.0]), "b": torch.tensor([9.0, 8.0, 7.0, 0.5])}
    layer_wise = select_neurons(scores, 2, "layer-wise")
    assert {key: value.tolist() for key, value in layer_wise.items()} == {"a": [0, 2], "b": [0, 1]}
    model_wise = select_neurons(scores, 2, "model-wise")
    assert {key: value.tolist() for key, value in model_wise.items()} == {"a": [0], "b": [0, 1, 2]}
    shares = select_neurons(scores, 0.25, "model-wise")
    assert {key: value.tolist() for key, value in shares.items()} == {"b": [0, 1]}
    with pytest.raises(ValueError, match="at most 4"):
        select_neurons(scores, 5)


def test_layer_selection():
    importance = {"m.2": 0.1, "m.3": -5.0, "m.4": 2.0, "m.5": 0.0}
    assert select_layers(importance, "occlusion", 2) == ["m.3", "m.4"]
    assert select_layers(importance, "occlusion", 0.75) == ["m.2", "m.3", "m.4"]
    assert select_layers(importance, "all", 1) == list(importance)
    assert select_layers(importance, [5, 2], None) == list(importance)
    with pytest.raises(ValueError, match="at most 4"):
        select_layers(importance, "occlusion", 5)


def test_candidate_layers():
    names = ["m.2", "m.3", "m.4", "m.5"]
    assert candidate_layers(names, "occlusion", 0.5) == names
    assert candidate_layers(names, "all", 1) == names
    assert candidate_layers(names, "last", 0.5) == ["m.4", "m.5"]
    assert candidate_layers(names, "last", 1) == ["m.5"]
    assert candidate_layers(names, [5, 2], 1) == ["m.2", "m.5"]
    with pytest.raises(ValueError, match="names layer 1, but the adapter can patch layers 2, 3, 4, 5"):
        candidate_layers(names, [1], 0.5)
    for selection in ("last", "occlusion"):
        with pytest.raises(ValueError, match="at most 4"):
            candidate_layers(names, selection, 5)


def test_counts_and_shares():
    assert [count_of(x, 30, "layers") for x in (3, 0.5, 1.0, 0.001)] == [3, 15, 30, 1]


def test_rank_agreement():
    one = {"a": 1.0, "b": -2.0, "c": 3.0}
    assert rank_agreement(one, one, 2) == {"spearman": pytest.approx(1.0), "top_overlap": 1.0}
    assert rank_agreement(one, {"a": 3.0, "b": 2.0, "c": -1.0}, 1)["spearman"] == pytest.approx(-1.0)
