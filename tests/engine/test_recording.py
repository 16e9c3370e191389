"""Hooks around one forward: what they keep is what the model computed, and none of them stays."""

from contextlib import contextmanager

import pytest
import torch

from peft_star.engine.batch import make_batches
from peft_star.engine.passes import completion_logits
from peft_star.engine.recording import head_reads, recording, recording_inputs, skipped
from peft_star.models.structure import find_decoder_layers, find_second_matrices
from support.modules import Identity, hooks
from support.rows import unordered_rows
from support.tiny_models import MODELS, tiny_llama, tokens


def parts(model):
    return find_second_matrices(model), dict(find_decoder_layers(model))


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "opt"])
def test_what_is_recorded_is_what_went_in_and_came_out(name):
    model, ids = MODELS[name].build(), tokens()
    model.requires_grad_(False)
    ffns, layers = parts(model)
    inputs, outputs, head = {}, {}, []
    for key, module in (*ffns.items(), *layers.items()):
        module.register_forward_pre_hook(
            lambda m, args, kwargs, key=key: inputs.update({key: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        module.register_forward_hook(lambda m, args, output, key=key: outputs.update({key: first(output)}))
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: head.append(args[0]))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    wanted = dict(inputs), dict(outputs), head[0]
    with recording(ffns, layers, model.get_output_embeddings()) as found:
        logits = model(input_ids=ids).logits
    assert torch.equal(logits.detach(), plain)
    for key in ffns:
        assert torch.equal(found.v[key], wanted[0][key]) and torch.equal(found.o[key], wanted[1][key])
    for key in layers:
        assert torch.equal(found.h_in[key], wanted[0][key]) and torch.equal(found.h_out[key], wanted[1][key])
    assert torch.equal(found.head, wanted[2]) and not found.head.requires_grad


def test_the_graph_begins_at_the_lowest_ffn():
    model = tiny_llama()
    model.requires_grad_(False)
    ffns, layers = parts(model)
    above = dict(list(ffns.items())[1:])
    with recording(above, layers) as found:
        logits = model(input_ids=tokens()).logits
    assert list(found.v) == list(above) and found.head is None
    below, *rest = found.h_out.values()
    assert not below.requires_grad and all(h.requires_grad for h in rest)
    # v of the lowest is where the graph begins, those above it are parts of the graph
    lowest, upper = found.v.values()
    assert lowest.is_leaf and not upper.is_leaf
    gradients = torch.autograd.grad(logits.sum(), [*found.v.values(), *found.o.values()])
    assert all(gradient.any() for gradient in gradients)
    # ∂L/∂v = ∂L/∂o W
    weight = list(above.values())[-1].weight
    torch.testing.assert_close(gradients[1], gradients[3] @ weight)


def test_the_head_that_reads_a_few_positions_is_recorded_whole():
    model = tiny_llama()
    (batch,) = make_batches(unordered_rows(), 1000)
    with torch.no_grad(), recording({}, {}, model.get_output_embeddings()) as found:
        logits = completion_logits(model, batch)
    assert found.head.shape == (*batch.input_ids.shape, 16)
    read = found.head[batch.rows, batch.positions]
    torch.testing.assert_close(logits, read @ model.lm_head.weight.T)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi", "cohere"])
def test_a_head_that_reads_a_few_positions_says_there_what_it_says_anyway(name):
    model = MODELS[name].build()
    (batch,) = make_batches(unordered_rows(), 1000)
    with torch.no_grad():
        whole = model(**batch.model_inputs()).logits
        some = completion_logits(model, batch)
        with head_reads(model, None):
            one = model(**batch.model_inputs()).logits
    torch.testing.assert_close(some, whole[batch.rows, batch.positions])
    assert some.shape[0] == len(batch) and one.shape[:2] == (len(whole), 1)


def test_inputs_are_kept_forward_by_forward():
    model = tiny_llama()
    name, module = list(find_second_matrices(model).items())[1]
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with recording_inputs({name: module}) as found:
        for ids in (tokens(2, 8), tokens(1, 5)):
            model(input_ids=ids)
        assert [part.shape for part in found[name]] == [(16, 40), (5, 40)]
    for part, v in zip(found[name], seen):
        assert torch.equal(part, v.flatten(0, 1)) and not part.requires_grad


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2", "opt"])
def test_a_skipped_layer_might_as_well_not_be_there(name, index):
    model, ids = MODELS[name].build(), tokens()
    key, layer = list(parts(model)[1].items())[index]
    with torch.no_grad():
        full = model(input_ids=ids).logits
        with skipped(layer):
            found = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
        model.get_submodule(key.rpartition(".")[0])[index] = Identity(returns_tuple=name == "falcon")
        without = model(input_ids=ids).logits
    assert torch.equal(found, without)
    assert torch.equal(again, full) and not torch.equal(found, full)


@contextmanager
def whole_recording(model):
    ffns, layers = parts(model)
    with recording(ffns, layers, model.get_output_embeddings()) as found:
        yield found


CONTEXTS = {
    "recording": whole_recording,
    "inputs": lambda model: recording_inputs(parts(model)[0]),
    "skipped": lambda model: skipped(model.model.layers[1]),
    "head reads": lambda model: head_reads(model, make_batches(unordered_rows(), 1000)[0]),
    "head reads nothing": lambda model: head_reads(model, None),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_no_hook_stays_after_an_exception(name):
    model = tiny_llama()
    full = model(input_ids=tokens()).logits
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), CONTEXTS[name](model):
        assert hooks(model) > before
        model(input_ids=tokens())
    assert hooks(model) == before
    handle.remove()
    assert torch.equal(model(input_ids=tokens()).logits, full)
