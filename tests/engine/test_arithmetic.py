"""A model's forward in the arithmetic of what serves it."""

import copy

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_star.engine.arithmetic as arithmetic_module
from peft_star.engine.arithmetic import (
    BF16,
    FP16,
    FP32,
    Q8_0,
    Arithmetic,
    computing,
    predict_in,
    round_blocks,
)
from peft_star.engine.batch import make_batches
from peft_star.engine.engine import Engine
from peft_star.engine.predictions import Predictions
from peft_star.engine.replay import Replay
from peft_star.failures import encode_rows
from support.tiny_models import MODELS, tiny_gpt2, tiny_llama, tokens
from support.words import MANY, star, word_tokenizer

INPUTS = Arithmetic("inputs", blocks=((None, 8),))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=tokens(), **kwargs).logits


def test_blocks_are_those_of_llama_cpp():
    values = (
        torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 1, 0])[:, None]
    )
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind)
    np.testing.assert_array_equal(round_blocks(values, 32).numpy(), expected)
    # a longer block has one scale for all of it
    assert round_blocks(values, 96)[1].unique().numel() <= 255 and not torch.equal(
        round_blocks(values, 96), round_blocks(values, 32)
    )


def test_what_several_products_read_is_rounded_once(monkeypatch):
    """Attention's three and a gated FFN's two, and not what was changed in place since."""
    model, rounded = tiny_llama(), []

    def counted(values, size):
        rounded.append(values.shape[-1])
        return round_blocks(values, size)

    monkeypatch.setattr(arithmetic_module, "round_blocks", counted)
    with computing(model, INPUTS):
        found = logits(model)
    assert len(rounded) == 4 * model.config.num_hidden_layers + 1
    with computing(model, INPUTS), torch.inference_mode():
        assert torch.equal(found, model(input_ids=tokens()).logits)
    layer, values = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(8)
    with torch.no_grad(), computing(layer, INPUTS):
        before = layer[0](values)
        after = layer[0](values.mul_(2))
    assert torch.allclose(after - layer[0].bias, 2 * (before - layer[0].bias))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon", "llama-tied"])
@pytest.mark.parametrize("arithmetic", [BF16, FP16])
def test_another_type_is_what_a_model_of_that_type_computes(name, arithmetic):
    model = MODELS[name].build()
    expected = logits(copy.deepcopy(model).to(arithmetic.dtype))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = logits(model)
    with computing(model, arithmetic):
        found = logits(model)
    assert found.dtype == arithmetic.dtype and not torch.equal(found.float(), plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # the parameters are those that they were, also the very objects
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.dtype == torch.float32 for p in model.parameters()) and torch.equal(logits(model), plain)


def test_a_model_of_a_shorter_type_computes_in_float32():
    model = tiny_llama(dtype=torch.bfloat16)
    with computing(model, FP32):
        found = logits(model)
    torch.testing.assert_close(found, logits(copy.deepcopy(model).float()))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_inputs_of_products_are_rounded_and_nothing_else(build):
    model = build()
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(lambda module, args: (round_blocks(args[0], 8),))
    with computing(model, INPUTS):
        found = logits(model)
    torch.testing.assert_close(found, logits(expected), rtol=0, atol=0)
    # products that are not named, or whose inputs make no whole blocks, are left alone
    with computing(model, Arithmetic("none", blocks=((17, 32), (16, 32)))):
        torch.testing.assert_close(logits(model), logits(model), rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_matrices_are_rounded_along_their_inputs(build):
    model = build(hidden_size=32, intermediate_size=64) if build is tiny_llama else build(n_embd=32, n_inner=64)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for module in expected.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.shape[-1] % 32 == 0:
                module.weight.copy_(round_blocks(module.weight.clone(), 32))
            elif isinstance(module, Conv1D):
                module.weight.copy_(round_blocks(module.weight.T, 32).T)
    with computing(model, Q8_0):
        found = logits(model)
    with computing(expected, Arithmetic("inputs", blocks=((None, 32),))):
        torch.testing.assert_close(found, logits(expected))


def test_what_an_adapter_adds_is_not_rounded():
    model = star()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "star_delta" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    seen = []
    layer = model.base_model.model.get_submodule("model.layers.1.mlp.down_proj")
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with computing(model, INPUTS):
        logits(model)
    inputs, output = seen[0]
    base = layer.base_layer(round_blocks(inputs, 8))
    delta, neurons = layer.star_delta["default"], layer.star_neurons["default"].long()
    torch.testing.assert_close(output, base + inputs[..., neurons] @ delta)
    with computing(model, BF16):
        logits(model)
        assert layer.star_delta["default"].dtype == torch.float32


def test_an_error_leaves_the_model_as_it_was():
    model = tiny_llama()
    plain = logits(model)

    def fail(module, args):
        raise RuntimeError("as it may")

    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="as it may"), computing(model, BF16):
        logits(model)
    handle.remove()
    assert all(p.dtype == torch.float32 for p in model.parameters()) and torch.equal(logits(model), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_predictions_in_an_arithmetic_are_replayed_in_it():
    model, tokenizer = tiny_llama(), word_tokenizer()
    engine = Engine(model, replay=Replay(model, "model.layers.1"))
    batches = engine.batches(encode_rows(MANY, tokenizer))
    into = Predictions.empty(sum(map(len, batches)))
    first = predict_in(engine, BF16, batches, into.copy())
    assert engine.replay.nbytes > 0
    again = predict_in(engine, BF16, batches, into.copy())
    plain = predict_in(Engine(copy.deepcopy(model).bfloat16()), Arithmetic("own"), batches, into.copy())
    for found in (first, again):
        assert torch.equal(found.gap, plain.gap) and torch.equal(found.argmax, plain.argmax)


def test_packed_rows_are_read_in_another_type_too():
    model = tiny_llama(max_position_embeddings=512)
    shared = " ".join(f"w{3 + number % 50}" for number in range(90))
    rows = encode_rows([{**row, "prompt": f"{shared} {row['prompt']}"} for row in MANY], word_tokenizer())
    packed = make_batches(rows, 2048, model=model)
    assert packed[0].segments is not None
    padded = make_batches(rows, 2048)
    found, alone = (predict_in(Engine(model), BF16, batches, Predictions.empty(6)) for batches in (packed, padded))
    assert torch.equal(found.expected, alone.expected)
    torch.testing.assert_close(found.gap, alone.gap, atol=0.05, rtol=0.1)


def test_what_cannot_be_computed_so_is_said_in_one_sentence():
    model = tiny_llama()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    batches = make_batches(encode_rows(MANY, word_tokenizer()), 2048)
    with pytest.raises(ValueError, match="cannot compute as bf16"):
        predict_in(Engine(model), BF16, batches, Predictions.empty(6))
    with torch.no_grad():
        model = tiny_llama()
        model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(ValueError, match="cannot compute as fp16"):
        predict_in(Engine(model), FP16, batches, Predictions.empty(6))
