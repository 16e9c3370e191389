"""The trace: activations, gradients, scores and contexts at failures, against plain autograd of each row alone."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_star import StarConfig
from peft_star.engine.batch import completion_offsets, make_batches
from peft_star.engine.engine import Engine
from peft_star.engine.passes import teacher_forced
from peft_star.engine.predictions import Predictions
from peft_star.failures import Row
from peft_star.method.trace import LayerTrace, Probe, trace
from peft_star.models import structure
from support.rows import (
    contexts_by_hand,
    dense_plausibility,
    failures_of,
    is_packed,
    random_rows,
    shared_rows,
    traced,
    unordered_rows,
)
from support.tiny_models import MODELS, tiny_mixtral


@pytest.mark.parametrize("name", MODELS)
def test_the_trace_matches_plain_autograd(name):
    model = MODELS[name].build()
    rows, ffns = random_rows(), structure.find_second_matrices(model)
    found = traced(model, rows)
    assert found.medium.numel() > 2
    scores = found.scores()

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
    rows = random_rows(5)
    whole, small = traced(model, rows), traced(model, rows, max_tokens=1)
    assert whole.loss == pytest.approx(small.loss, rel=1e-5)
    order = whole.medium.argsort(), small.medium.argsort()
    assert torch.equal(whole.medium[order[0]], small.medium[order[1]])
    for key in whole.layers:
        activations = [torch.cat(t.layers[key].activations)[o] for t, o in zip((whole, small), order)]
        torch.testing.assert_close(*activations)
        torch.testing.assert_close(whole.layers[key].squares, small.layers[key].squares)


def test_sequences_that_would_take_too_much_memory_are_not_kept(monkeypatch):
    monkeypatch.setattr("peft_star.method.trace.KEEP_BYTES", 10)
    model = MODELS["llama"].build()
    found = traced(model, random_rows())
    layer = next(iter(found.layers.values()))
    assert layer.inputs is None and layer.gradient(torch.tensor([0])) is None
    assert layer.squares is not None


def test_the_gradient_of_a_process_without_a_batch_is_zero():
    assert torch.equal(LayerTrace().gradient(torch.tensor([0, 2])).expand(2, 3), torch.zeros(2, 3))


def test_a_tie_that_goes_the_right_way_is_no_failure():
    """Its semantic delta would be that of a token with itself."""
    model = MODELS["llama"].build()
    with torch.no_grad():
        model.lm_head.weight[9] = model.lm_head.weight[5]
        model.lm_head.weight[[*range(5), *range(6, 9), *range(10, 64)]] = 0
        model.lm_head.weight[:, :] *= torch.sign(model(input_ids=torch.tensor([[7]])).logits[0, 0, 5])
    argmax = model(input_ids=torch.tensor([[7]])).logits[0, 0].argmax().item()
    assert argmax in (5, 9)
    found = traced(model, [Row(0, "", "", (7,), (argmax,))])
    assert found.predictions.margin.item() == 0 and not found.medium.numel()


def test_only_the_slots_asked_for_are_traced():
    model = MODELS["llama"].build()
    rows = random_rows()
    everything = traced(model, rows)
    one = traced(model, rows, only=everything.medium[:1])
    assert one.medium.tolist() == everything.medium[:1].tolist()
    assert 0 < one.loss < everything.loss


# gradients and activations at the traced tokens


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_activations_and_gradients_are_those_of_each_failure_in_the_order_of_the_slots(name, max_tokens):
    model, rows = MODELS[name].build(), unordered_rows()
    found = traced(model, rows, max_tokens)
    ffns = structure.find_second_matrices(model)
    failures = failures_of(model, rows)
    assert found.medium.tolist() == [slot for slot, *_ in failures] and len(failures) > 4
    model.requires_grad_(True)
    kept = {}
    for key, module in ffns.items():
        module.register_forward_hook(lambda m, args, output, key=key: kept.update({key: (args[0], output)}))
    wanted = {key: ([], []) for key in ffns}
    for row in rows:
        of_row = [(position, token) for _, owner, position, token in failures if owner is row]
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        loss = sum(nn.functional.cross_entropy(logits[position], torch.tensor(token)) for position, token in of_row)
        gradients = torch.autograd.grad(loss, [kept[key][1] for key in ffns])
        for key, gradient in zip(ffns, gradients):
            positions = torch.tensor([position for position, _ in of_row])
            for values, whole in zip(wanted[key], (kept[key][0], gradient)):
                values.append(whole.detach().reshape(len(row.input_ids), -1)[positions])
    neurons = torch.tensor([1, 4, 30])
    for key, (v, gradient) in wanted.items():
        torch.testing.assert_close(found.activations(key, neurons), torch.cat(v)[:, neurons], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.gradients(key), torch.cat(gradient), rtol=1e-3, atol=1e-6)
        assert found.contexts(key, neurons) is None


def test_slots_that_are_right_are_traced_when_asked_for():
    model, rows = MODELS["llama"].build(), unordered_rows()
    before = teacher_forced(Engine(model), make_batches(rows, 1000))
    # one token is made right by expecting what the model says
    row = rows[1]
    said = int(before.argmax[len(rows[0].completion_ids)])
    rows[1] = Row(row.index, "", "", row.prompt_ids, (said, *row.completion_ids[1:]))
    slot = len(rows[0].completion_ids)
    plain = traced(model, rows)
    assert plain.predictions.right[slot] and slot not in plain.medium.tolist()
    also = traced(model, rows, at=torch.tensor([slot, *plain.medium.tolist()]))
    assert also.medium.tolist() == sorted([*plain.medium.tolist(), slot])
    wrong = plain.medium[0]
    only = traced(model, rows, at=torch.tensor([slot, int(wrong)]))
    assert only.medium.tolist() == sorted([int(wrong), slot])
    index = only.medium.tolist().index(slot)
    neurons = torch.arange(5)
    for key in also.layers:
        at = also.medium.tolist().index(slot)
        torch.testing.assert_close(only.activations(key, neurons)[index], also.activations(key, neurons)[at])
    p = only.predictions.p_expected[only.medium]
    assert only.loss == pytest.approx(-p.log().sum().item(), rel=1e-5)


def test_predictions_elsewhere_are_kept_and_not_written_to():
    model, rows = MODELS["llama"].build(), unordered_rows()
    elsewhere = Predictions.empty(completion_offsets(rows)[-1] + 3)
    elsewhere.gap[:] = 7.0
    found = traced(model, rows, start=elsewhere)
    assert (found.predictions.gap[-3:] == 7).all() and (elsewhere.gap == 7).all()
    assert (found.predictions.gap[:-3] != 7).all()


# plausible contexts


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_contexts_average_the_activations_by_plausibility(name, max_tokens):
    model, rows = MODELS[name].build(), unordered_rows()
    neurons = torch.tensor([0, 2, 39])
    found = traced(model, rows, max_tokens, contexts=True)
    for key, wanted in contexts_by_hand(model, rows, neurons).items():
        torch.testing.assert_close(found.contexts(key, neurons), wanted, rtol=1e-3, atol=1e-5)
    # nothing else changes
    plain = traced(model, rows, max_tokens)
    for key in plain.layers:
        assert torch.equal(plain.gradients(key), found.gradients(key))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_contexts_behind_a_shared_prefix_are_those_of_rows_alone(name):
    model, rows = MODELS[name].build(), shared_rows()
    neurons = torch.arange(40)
    found = traced(model, rows, 200, packed=True, contexts=True)
    assert all(is_packed(found.batches))
    for key, wanted in contexts_by_hand(model, rows, neurons).items():
        torch.testing.assert_close(found.contexts(key, neurons), wanted, rtol=1e-3, atol=1e-5)


def test_contexts_of_routed_experts():
    model = get_peft_model(tiny_mixtral(), StarConfig(num_neurons=4, target_modules=["experts"])).base_model.model
    name = "model.layers.1.mlp.experts"
    second, layers = model.get_submodule(name).second, dict(structure.find_decoder_layers(model))
    rows = unordered_rows()
    model.requires_grad_(False)
    found = trace(Engine(model), make_batches(rows, 1000), Probe({name: second}, layers, contexts=True))
    failures = failures_of(model, rows)
    kept = {}
    second.register_forward_pre_hook(lambda module, args: kept.update(v=args[0]))
    for number, (_, row, position, token) in enumerate(failures):
        weight = dense_plausibility(model, row, position, token)
        v = kept["v"].detach().reshape(len(row.input_ids), -1)
        everything = torch.arange(v.shape[1])
        torch.testing.assert_close(found.contexts(name, everything)[number], weight.float() @ v, rtol=1e-3, atol=1e-5)
