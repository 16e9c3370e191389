"""The FFN's second matrix is found in every architecture, from structure alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_star import StarConfig
from peft_star.models.structure import find_decoder_layers, find_second_matrices, is_linear, linear_shape
from support import tiny_models
from support.tiny_models import MODELS

ALL = sorted(MODELS)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(tiny_models.tokens(), **kwargs).logits


@pytest.mark.parametrize("name", ALL)
def test_second_matrices_names_order_and_shapes(name):
    tiny = MODELS[name]
    model = tiny.build()
    found = find_second_matrices(model)
    assert list(found) == tiny.names
    modules = dict(model.named_modules())
    for key, module in found.items():
        assert module is modules[key]
        assert linear_shape(module) == tiny.width


@pytest.mark.parametrize("name", ALL)
def test_second_matrix_maps_the_activation_back_to_the_hidden_width(name):
    tiny = MODELS[name]
    model = tiny.build()
    target = find_second_matrices(model)[tiny.names[1]]
    seen = []
    handle = target.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    before = logits(model)
    handle.remove()
    activation, output = seen[0]
    assert (activation.shape[-1], output.shape[-1]) == tiny.width
    with torch.no_grad():
        target.weight.zero_()
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ALL)
def test_decoder_layers(name):
    tiny = MODELS[name]
    model = tiny.build()
    layers = find_decoder_layers(model)
    assert len(layers) == tiny.layers
    modules = dict(model.named_modules())
    for (key, module), second in zip(layers, tiny.names, strict=True):
        assert module is modules[key]
        assert second.startswith(f"{key}.")
        assert isinstance(modules[key.rpartition(".")[0]], nn.ModuleList)


@pytest.mark.parametrize("name", ALL)
def test_patch_save_load_merge(name, tmp_path):
    tiny = MODELS[name]
    base_logits = logits(tiny.build())
    model = get_peft_model(tiny.build(), StarConfig(num_neurons=5, init_weights=False)).eval()
    assert model.peft_config["default"].target_modules == tiny.suffixes
    assert model.base_model.targeted_module_names == tiny.names
    patched = logits(model)
    assert not torch.allclose(patched, base_logits, atol=1e-3)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    assert torch.equal(logits(loaded), patched)
    merged = loaded.merge_and_unload()
    assert torch.allclose(logits(merged), patched, atol=1e-4, rtol=1e-4)
    assert not any("star_" in key for key in merged.state_dict())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon-new"])
def test_names_seen_through_adapters(name):
    tiny = MODELS[name]
    model = get_peft_model(tiny.build(), StarConfig(num_neurons=3))
    assert list(find_second_matrices(model)) == [f"base_model.model.{key}" for key in tiny.names]
    assert list(find_second_matrices(model.base_model)) == [f"model.{key}" for key in tiny.names]
    assert list(find_second_matrices(model.base_model.model)) == tiny.names
    assert [key for key, _ in find_decoder_layers(model)] == [
        f"base_model.model.{key}" for key, _ in find_decoder_layers(tiny.build())
    ]


def test_names_seen_through_an_adapter_of_another_method():
    tiny = MODELS["llama"]
    model = get_peft_model(tiny.build(), LoraConfig(target_modules="all-linear"))
    assert list(find_second_matrices(model.base_model.model)) == tiny.names


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_second_adapter_resolves_the_same_targets(name):
    tiny = MODELS[name]
    model = get_peft_model(tiny.build(), StarConfig(num_neurons=3))
    model.add_adapter("other", StarConfig(num_neurons=4))
    assert model.peft_config["other"].target_modules == tiny.suffixes


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_layers_to_transform(name):
    tiny = MODELS[name]
    model = get_peft_model(tiny.build(), StarConfig(num_neurons=3, layers_to_transform=[0, 2]))
    assert model.base_model.targeted_module_names == [tiny.names[0], tiny.names[2]]


def test_target_modules_that_no_suffix_expresses(tmp_path):
    """Each name to select is the end of another module's name."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

    class TwoStacks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer() for _ in range(2)])
            self.vision = nn.Module()
            self.vision.layers = nn.ModuleList([Layer()])

    model = get_peft_model(TwoStacks(), StarConfig(num_neurons=2))
    assert model.base_model.targeted_module_names == ["layers.0.down", "layers.1.down"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TwoStacks(), tmp_path)
    assert loaded.base_model.targeted_module_names == ["layers.0.down", "layers.1.down"]

    model = get_peft_model(TwoStacks(), StarConfig(num_neurons=2, layers_to_transform=[1]))
    assert model.base_model.targeted_module_names == ["layers.1.down"]
    with pytest.raises(ValueError, match="names none of the 2 layers"):
        get_peft_model(TwoStacks(), StarConfig(num_neurons=2, layers_to_transform=7))


def test_other_pairs_in_the_layer_are_not_taken_for_the_ffn():
    """A wide low-rank branch that hangs in the layer, and mixing weights with leading dimensions of one."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 4))
            self.mlp.mix_key, self.mlp.mix_value = (nn.Parameter(torch.ones(1, 1, 4)) for _ in range(2))
            self.branch_in, self.branch_out = nn.Linear(4, 50), nn.Linear(50, 4)
            self.low_rank = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))

    model = nn.Module()
    model.layers = nn.ModuleList([Layer() for _ in range(2)])
    assert list(find_second_matrices(model)) == ["layers.0.mlp.2", "layers.1.mlp.2"]


def test_encoder_decoder_takes_the_decoder():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config)
    assert list(find_second_matrices(model)) == [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(2)]
    assert [name for name, _ in find_decoder_layers(model)] == ["decoder.block.0", "decoder.block.1"]
    model = get_peft_model(model, StarConfig(num_neurons=2, layers_to_transform=1))
    assert model.base_model.targeted_module_names == ["decoder.block.1.layer.2.DenseReluDense.wo"]


def test_pair_spread_over_two_modules():
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.BertModel(config)
    assert list(find_second_matrices(model)) == [f"encoder.layer.{i}.output.dense" for i in range(2)]


def test_model_without_layers_has_a_clear_error():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    for find in (find_decoder_layers, find_second_matrices):
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            find(model)
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(model, StarConfig(num_neurons=2))


def test_attention_only_layers_have_a_clear_error():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 8), nn.Linear(8, 4)

    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mixer": Attention()}) for _ in range(2)])
    with pytest.raises(ValueError, match="No feed-forward network"):
        find_second_matrices(model)


def test_mixture_of_experts_names_its_form():
    model = tiny_models.tiny_mixtral()
    assert len(find_decoder_layers(model)) == 3
    with pytest.raises(ValueError, match="fused expert parameters .*MixtralExperts.*Please specify `target_modules`"):
        find_second_matrices(model)
    with pytest.raises(ValueError, match="mixture of experts"):
        get_peft_model(model, StarConfig(num_neurons=2))


def test_list_of_experts_names_its_form():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Linear(4, 12), nn.Linear(12, 4)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([Expert() for _ in range(3)])

    model = nn.Module()
    model.layers = nn.ModuleList([Layer() for _ in range(2)])
    with pytest.raises(ValueError, match="a list of experts"):
        find_second_matrices(model)


def test_is_linear():
    assert is_linear(nn.Linear(2, 3))
    assert is_linear(transformers.pytorch_utils.Conv1D(3, 2))
    assert linear_shape(transformers.pytorch_utils.Conv1D(3, 2)) == (2, 3)
    for module in (nn.Conv1d(2, 3, 1), nn.Embedding(2, 3), nn.LayerNorm(2), nn.Identity()):
        assert not is_linear(module)
        assert linear_shape(module) is None
