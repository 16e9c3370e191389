"""What a trace reads besides attributions (see test_locate.py): gradients at tokens, and plausible contexts."""

import pytest
import torch
from torch import nn

from peft_star.engine.batch import completion_offsets, make_batches
from peft_star.engine.passes import teacher_forced
from peft_star.engine.predictions import Predictions
from peft_star.failures import Row
from peft_star.method.trace import plausibility, trace
from peft_star.models import structure
from support.rows import contexts_by_hand, dense_plausibility, failures_of, is_packed, shared_rows
from support.tiny_models import MODELS, VOCAB, tiny_mixtral


def rows_for(number=4):
    """Rows that batches, by length, take out of their order."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(number):
        ids = torch.randint(3, VOCAB, (9 - 3 * index % 5,), generator=generator).tolist()
        made.append(Row(index, "", "", tuple(ids[:3]), tuple(ids[3:])))
    return made


def parts(model):
    model.requires_grad_(False)
    return structure.find_second_matrices(model), dict(structure.find_decoder_layers(model))


def traced(model, rows, max_tokens=1000, packed=False, **kwargs):
    ffns, layers = parts(model)
    batches = make_batches(rows, max_tokens, model=model if packed else None)
    return batches, trace(model, batches, ffns, layers, **kwargs)


def weights_of(model, batch):
    """Plausibility at all tokens of a batch, from the head's own inputs."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch.model_inputs(), use_cache=False)
    handle.remove()
    return plausibility(model, seen[0], batch, torch.arange(len(batch)), chunk=5)


# predictions


def test_predictions_are_those_of_dense_logits():
    rows, model = rows_for(), MODELS["llama"].build()
    now = teacher_forced(model, make_batches(rows, 30))
    for row, offset in zip(rows, completion_offsets(rows)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        for number, (position, token) in enumerate(zip(row.medium_positions, row.completion_ids)):
            slot, at = offset + number, logits[position]
            others = at.clone()
            others[token] = -torch.inf
            assert now.expected[slot] == token and now.argmax[slot] == at.argmax()
            assert now.rival[slot] == others.argmax()
            p = at.softmax(-1)
            assert now.gap[slot].item() == pytest.approx((at[token] - others.max()).item(), abs=1e-5)
            assert now.p_expected[slot].item() == pytest.approx(p[token].item(), abs=1e-6)
            assert now.margin[slot].item() == pytest.approx((p[token] - p[others.argmax()]).item(), abs=1e-6)
    assert torch.equal(now.right, now.gap > 0)


def test_the_rival_of_a_token_that_is_right_is_the_second():
    batch = make_batches([Row(0, "", "", (3, 4), (5, 6))], 100)[0]
    now = Predictions.empty(2)
    logits = torch.zeros(2, VOCAB)
    logits[0, 5], logits[0, 9], logits[1, 7], logits[1, 6] = 3.0, 2.0, 5.0, 4.0
    now.read(batch, logits)
    assert now.argmax.tolist() == [5, 7] and now.rival.tolist() == [9, 7]
    assert now.gap.tolist() == [1.0, -1.0] and now.right.tolist() == [True, False]


def test_joined_predictions_are_tensors_of_their_own():
    a, b = Predictions.empty(2), Predictions.empty(3)
    a.gap[:], b.gap[:] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    both = Predictions.join(a, b)
    assert isinstance(both, Predictions) and both.gap.tolist() == [1, 2, 3, 4, 5]
    both.gap[0] = 9
    copy = Predictions.join(a)
    copy.argmax[0] = 7
    assert a.gap[0] == 1 and a.argmax[0] == -1
    first = both.head(2)
    assert first.gap.tolist() == [9, 2] and len(first.right) == 2


# gradients and activations at the traced tokens


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_activations_and_gradients_are_those_of_each_failure_in_the_order_of_the_slots(name, max_tokens):
    model, rows = MODELS[name].build(), rows_for()
    _, found = traced(model, rows, max_tokens)
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
    model, rows = MODELS["llama"].build(), rows_for()
    before = teacher_forced(model, make_batches(rows, 1000))
    # one token is made right by expecting what the model says
    row = rows[1]
    said = int(before.argmax[len(rows[0].completion_ids)])
    rows[1] = Row(row.index, "", "", row.prompt_ids, (said, *row.completion_ids[1:]))
    slot = len(rows[0].completion_ids)
    _, plain = traced(model, rows)
    assert plain.predictions.right[slot] and slot not in plain.medium.tolist()
    _, also = traced(model, rows, also_slots=torch.tensor([slot]))
    assert also.medium.tolist() == sorted([*plain.medium.tolist(), slot])
    wrong = plain.medium[0]
    _, only = traced(model, rows, only_slots=wrong[None], also_slots=torch.tensor([slot]))
    assert only.medium.tolist() == sorted([int(wrong), slot])
    index = only.medium.tolist().index(slot)
    neurons = torch.arange(5)
    for key in also.layers:
        at = also.medium.tolist().index(slot)
        torch.testing.assert_close(only.activations(key, neurons)[index], also.activations(key, neurons)[at])
    p = only.predictions.p_expected[only.medium]
    assert only.loss == pytest.approx(-p.log().sum().item(), rel=1e-5)


def test_predictions_elsewhere_are_kept_and_not_written_to():
    model, rows = MODELS["llama"].build(), rows_for()
    elsewhere = Predictions.empty(completion_offsets(rows)[-1] + 3)
    elsewhere.gap[:] = 7.0
    _, found = traced(model, rows, elsewhere=elsewhere)
    assert (found.predictions.gap[-3:] == 7).all() and (elsewhere.gap == 7).all()
    assert (found.predictions.gap[:-3] != 7).all()


# plausible contexts


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi", "opt", "falcon", "gemma3"])
def test_plausibility_is_the_dense_softmax_over_earlier_positions_of_the_same_row(name):
    model, rows = MODELS[name].build(), rows_for()
    with torch.no_grad():  # sure of something, and not equally sure everywhere
        model.get_output_embeddings().weight.mul_(20)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    rows[0] = Row(0, "", "", (5,), (9, 8))  # its first token has nothing before it but itself
    (batch,) = make_batches(rows, 1000)
    weights = weights_of(model, batch)
    assert weights.shape == (len(batch), batch.input_ids.shape[1])
    torch.testing.assert_close(weights.sum(1), torch.ones(len(batch)))
    by_index = {row.index: row for row in rows}
    sequences = [by_index[item.index] for item in batch.items]
    for weight, number, position, token in zip(weights, batch.rows, batch.positions, batch.expected):
        assert not weight[max(int(position), 1) :].any()
        wanted = dense_plausibility(model, sequences[number], int(position), int(token))
        torch.testing.assert_close(weight[: len(wanted)].double(), wanted, rtol=1e-3, atol=1e-5)
    assert weights.max() > 0.5


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_contexts_average_the_activations_by_plausibility(name, max_tokens):
    model, rows = MODELS[name].build(), rows_for()
    neurons = torch.tensor([0, 2, 39])
    _, found = traced(model, rows, max_tokens, with_contexts=True)
    for key, wanted in contexts_by_hand(model, rows, neurons).items():
        torch.testing.assert_close(found.contexts(key, neurons), wanted, rtol=1e-3, atol=1e-5)
    # nothing else changes
    _, plain = traced(model, rows, max_tokens)
    for key in plain.layers:
        assert torch.equal(plain.gradients(key), found.gradients(key))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_contexts_behind_a_shared_prefix_are_those_of_rows_alone(name):
    model, rows = MODELS[name].build(), shared_rows()
    neurons = torch.arange(40)
    batches, found = traced(model, rows, 200, packed=True, with_contexts=True)
    assert all(is_packed(batches))
    for key, wanted in contexts_by_hand(model, rows, neurons).items():
        torch.testing.assert_close(found.contexts(key, neurons), wanted, rtol=1e-3, atol=1e-5)


def test_a_packed_row_sees_its_prefix_and_itself_only():
    model, rows = MODELS["llama"].build(), shared_rows()
    (batch,) = make_batches(rows, 200, model=model)
    weights = weights_of(model, batch)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(batch)))
    for weight, number, position in zip(weights, batch.rows, batch.positions):
        segments = batch.segments[number]
        seen = (segments == 0) | (segments == segments[position])
        assert (weight[: int(position)][seen[: int(position)]] > 0).all()
        assert not weight[int(position) :].any() and not weight[~seen].any()


def test_contexts_of_routed_experts():
    from peft import get_peft_model

    from peft_star import StarConfig

    model = get_peft_model(tiny_mixtral(), StarConfig(num_neurons=4, target_modules=["experts"])).base_model.model
    name = "model.layers.1.mlp.experts"
    second, layers = model.get_submodule(name).second, dict(structure.find_decoder_layers(model))
    rows = rows_for()
    model.requires_grad_(False)
    found = trace(model, make_batches(rows, 1000), {name: second}, layers, with_contexts=True)
    failures = failures_of(model, rows)
    kept = {}
    second.register_forward_pre_hook(lambda module, args: kept.update(v=args[0]))
    for number, (_, row, position, token) in enumerate(failures):
        weight = dense_plausibility(model, row, position, token)
        v = kept["v"].detach().reshape(len(row.input_ids), -1)
        everything = torch.arange(v.shape[1])
        torch.testing.assert_close(found.contexts(name, everything)[number], weight.float() @ v, rtol=1e-3, atol=1e-5)
