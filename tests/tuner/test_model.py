"""StarModel inside PEFT and transformers: injection, saving and loading, retargeting, training, bad patches."""

from __future__ import annotations

import copy
import os
import re
import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from peft_star import StarConfig
from peft_star.tuner import StarLayer, StarModel
from peft_star.tuner.layer import star_layers
from support.tiny_models import MODELS, tiny_gpt2, tiny_llama, tokens

NAMES = MODELS["llama"].names
WEIGHTS = "adapter_model.safetensors"
WIDTH, HEIGHT = MODELS["llama"].width


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def star(model: nn.Module | None = None, adapter_name: str = "default", **values) -> PeftModel:
    values = {"task_type": "CAUSAL_LM", "num_neurons": 4, "init_weights": False, **values}
    base = tiny_llama() if model is None else model
    return get_peft_model(base, StarConfig(**values), adapter_name=adapter_name).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, StarLayer]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return star_layers(inner, adapter_name)


def randomize(model: nn.Module, adapter_name: str = "default") -> None:
    """Give an adapter deltas that can be seen, as training would."""
    for layer in layers(model, adapter_name).values():
        nn.init.normal_(layer.star_delta[adapter_name])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


#############
# Injection #
#############


def test_base_and_frozen_parameters():
    model = star()
    assert isinstance(model.base_model, StarModel) and model.base_model.prefix == "star_"
    assert model.peft_config["default"].peft_type is PeftType.STAR
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.{name}.star_delta.default" for name in NAMES}
    trainable_count, all_count = model.get_nb_trainable_parameters()
    assert trainable_count == 3 * 4 * HEIGHT
    assert all_count - trainable_count == sum(parameter.numel() for parameter in tiny_llama().parameters())


def test_print_trainable_parameters(capsys):
    star().print_trainable_parameters()
    assert "trainable params: 192 ||" in capsys.readouterr().out


@pytest.mark.parametrize(
    "target_modules, expected",
    [
        (None, NAMES),
        (["down_proj"], NAMES),
        (r".*\.1\.mlp\.(up|down)_proj", ["model.layers.1.mlp.up_proj", NAMES[1]]),
        ([NAMES[2]], [NAMES[2]]),
        (["q_proj", "down_proj"], None),
    ],
)
def test_target_modules(target_modules, expected):
    model = star(target_modules=target_modules)
    found = list(layers(model))
    assert found == expected if expected else len(found) == 6


def test_all_linear_leaves_out_the_head():
    found = layers(star(target_modules="all-linear"))
    assert len(found) == 3 * 7 and not any("lm_head" in name for name in found)


def test_exclude_modules_and_layers_to_transform():
    assert list(layers(star(exclude_modules=["layers.0.mlp.down_proj"]))) == NAMES[1:]
    assert list(layers(star(exclude_modules=r".*\.2\..*"))) == NAMES[:2]
    assert list(layers(star(layers_to_transform=1))) == [NAMES[1]]
    assert list(layers(star(layers_to_transform=[0, 1], layers_pattern="layers"))) == NAMES[:2]


def test_num_neurons_as_a_share():
    assert {layer.star_neurons["default"].numel() for layer in layers(star(num_neurons=0.25)).values()} == {10}


def test_neurons_per_module():
    model = star(neurons_per_module={NAMES[1]: 9, "no.such.module": 3})
    assert [layer.star_neurons["default"].numel() for layer in layers(model).values()] == [4, 9, 4]


def test_too_many_neurons_name_the_module_and_its_width():
    with pytest.raises(ValueError, match="41 neurons were requested for the module model.layers.0.mlp.down_proj, "):
        star(num_neurons=41)
    # the width that matters is the module's own
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj, which has only 16"):
        star(num_neurons=17, target_modules="all-linear")


@pytest.mark.parametrize("target_modules", [["embed_tokens"], ["input_layernorm"], ["mlp"]])
def test_unsupported_modules(target_modules):
    with pytest.raises(TypeError, match="is not supported. Currently, only the following modules are supported"):
        star(target_modules=target_modules)


def test_unknown_modules():
    with pytest.raises(ValueError, match="Target modules .* not found in the base model"):
        star(target_modules=["no_such_module"])


def test_module_with_an_adapter_of_another_method():
    base = tiny_llama()
    inject_adapter_in_model(LoraConfig(target_modules=["down_proj"]), base, "lora")
    with pytest.raises(ValueError, match="already carries an adapter of another method"):
        inject_adapter_in_model(StarConfig(num_neurons=3), base, "star")


def test_same_seed_gives_the_same_adapter_whatever_its_name():
    states = []
    for name in ("one", "two"):
        base = tiny_llama()
        torch.manual_seed(5)
        states.append(get_peft_model_state_dict(star(base, name), adapter_name=name))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_adapter_of_a_half_precision_model_is_fp32_unless_asked_otherwise(dtype):
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        config = StarConfig(num_neurons=4, init_weights=False)
        model = get_peft_model(tiny_llama(dtype=dtype), config, autocast_adapter_dtype=autocast).eval()
        for layer in layers(model).values():
            assert layer.star_delta["default"].dtype == expected
            assert layer.star_neurons["default"].dtype == torch.int32
        assert logits(model).dtype == dtype


####################
# Several adapters #
####################


def two_adapters() -> PeftModel:
    model = star(adapter_name="one")
    model.add_adapter("two", StarConfig(num_neurons=6, init_weights=False))
    return model.eval()


def test_switching_activating_and_disabling():
    model = two_adapters()
    base = logits(tiny_llama())
    a = logits(model)
    model.set_adapter("two")
    b = logits(model)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    outputs = [base, a, b, both]
    for i, one in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert not torch.allclose(one, other, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)
    model.set_adapter("one")
    assert torch.equal(logits(model), a)


def test_delete_leaves_no_entry_and_the_other_adapter_as_it_was():
    model = two_adapters()
    model.set_adapter("two")
    b = logits(model)
    model.delete_adapter("one")
    assert torch.equal(logits(model), b)
    assert list(model.peft_config) == ["two"]
    assert not any(".one" in key.rpartition("star_")[2] for key in model.state_dict() if "star_" in key)
    for layer in layers(model).values():
        for name in StarLayer.adapter_layer_names + StarLayer.other_param_names:
            assert "one" not in getattr(layer, name)


def test_merged_adapters_cannot_be_deleted():
    model = two_adapters()
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("one")
    model.delete_adapter("two")


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_merging_two_adapters_and_unmerging_is_exact(build, dtype):
    model = star(build(dtype=dtype), "one")
    model.add_adapter("two", StarConfig(num_neurons=6, init_weights=False))
    model.base_model.set_adapter(["one", "two"])
    before, patched = state(model), logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter(safe_merge=True)
    atol = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(model), patched, atol=atol, rtol=atol)
    model.unmerge_adapter()
    assert_same_state(model, before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert_same_state(model, before)


def test_merge_and_unload_and_unload():
    model = two_adapters()
    before, patched = state(tiny_llama()), logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is transformers.LlamaForCausalLM and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), patched, atol=1e-5, rtol=1e-5)
    both = copy.deepcopy(model).merge_and_unload(adapter_names=["one", "two"])
    assert not torch.allclose(logits(both), patched, atol=1e-3)
    unloaded = model.unload()
    assert_same_state(unloaded, before)


def test_safe_merge_refuses_a_broken_adapter():
    model = star()
    layers(model)[NAMES[1]].star_delta["default"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


def test_mixed_batches_have_a_clear_error():
    model = two_adapters()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="does not support mixed batches"):
            call(input_ids=tokens(), adapter_names=["one", "two"])


def test_status():
    model = two_adapters()
    model.merge_adapter(["two"])
    for status in get_layer_status(model):
        assert status.module_type == "star.Linear" or status.module_type == "Linear"
        assert status.available_adapters == ["one", "two"]
        assert status.active_adapters == ["one"]
        assert status.merged_adapters == ["two"]
        assert status.devices == {"one": ["cpu"], "two": ["cpu"]}
    status = get_model_status(model)
    assert status.peft_types == {"one": "STAR", "two": "STAR"}
    assert status.num_adapter_layers == 3 and status.available_adapters == ["one", "two"]
    assert status.trainable_params == 3 * 4 * HEIGHT and status.adapter_model_type == "StarModel"


###################
# Save and reload #
###################


@pytest.fixture
def patch(tmp_path):
    """A saved patch and the logits it should give."""
    model = star()
    model.save_pretrained(tmp_path)
    return str(tmp_path), logits(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default", "renamed"])
def test_save_and_reload(patch, name, low_cpu_mem_usage):
    folder, expected = patch
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|meta|adapter keys).*")
        loaded = PeftModel.from_pretrained(
            tiny_llama(), folder, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
        )
    assert torch.equal(logits(loaded), expected)
    assert loaded.peft_config[name].inference_mode
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for layer in layers(loaded).values():
        assert layer.star_neurons[name].dtype == torch.int32
        assert layer.star_neurons[name].device == layer.star_delta[name].device == torch.device("cpu")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter_beside_another(patch, low_cpu_mem_usage):
    folder, expected = patch
    model = star(num_neurons=2)
    other = logits(model)
    result = model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.missing_keys
    assert torch.equal(logits(model), other)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


def test_trainable_after_loading(patch):
    model = PeftModel.from_pretrained(tiny_llama(), patch[0], is_trainable=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}.star_delta.default" for name in NAMES
    }


def test_auto_peft_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = star(base)
    model.save_pretrained(tmp_path / "patch")
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "patch"))
    assert torch.equal(logits(loaded), logits(model))
    # transformers looks into the folder of an adapter by itself
    direct = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "patch"))
    assert torch.equal(logits(direct), logits(model))


def test_file_holds_the_patch_and_nothing_else(patch):
    tensors = load_file(os.path.join(patch[0], WEIGHTS))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()} == {
        f"base_model.model.{name}.{attribute}": form
        for name in NAMES
        for attribute, form in (
            ("star_delta", (torch.float32, (4, HEIGHT))),
            ("star_neurons", (torch.int32, (4,))),
        )
    }
    # four bytes per entry of the deltas and one index per neuron; the rest is the header
    size = os.path.getsize(os.path.join(patch[0], WEIGHTS))
    header = int.from_bytes(open(os.path.join(patch[0], WEIGHTS), "rb").read(8), "little") + 8
    assert size - header == 3 * (4 * HEIGHT * 4 + 4 * 4)


def test_half_precision_patch_is_saved_in_fp32(tmp_path):
    model = star(tiny_llama(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float32, torch.int32}
    loaded = PeftModel.from_pretrained(tiny_llama(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_only_the_named_adapter_is_saved(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    assert not (tmp_path / "one").exists() and not (tmp_path / WEIGHTS).exists()
    assert load_file(tmp_path / "two" / WEIGHTS)[f"base_model.model.{NAMES[0]}.star_delta"].shape == (6, HEIGHT)


def test_state_dict_of_parameters_only_gets_its_indices(tmp_path):
    """Some trainers gather parameters and no buffers before saving."""
    model = star()
    parameters = dict(model.named_parameters())
    saved = get_peft_model_state_dict(model, state_dict=parameters)
    expected = get_peft_model_state_dict(model)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_modules_to_save(tmp_path):
    model = star(modules_to_save=["lm_head"])
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("irregular", [False, True], ids=["same-number", "different-numbers"])
def test_transformers_load_adapter(tmp_path, irregular, dtype):
    base = tiny_llama(dtype=dtype)
    base.add_adapter(StarConfig(num_neurons=5, init_weights=False))
    model = get_peft_model(tiny_llama(dtype=dtype), StarConfig(num_neurons=5), autocast_adapter_dtype=False).eval()
    neurons = {NAMES[0]: torch.tensor([7, 3]), NAMES[2]: torch.tensor([1, 39] + [5] * irregular)}
    model.base_model.retarget("default", neurons)
    randomize(model)
    model.save_pretrained(tmp_path)

    loaded = tiny_llama(dtype=dtype)
    loaded.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(loaded), logits(model))
    assert {name: layer.star_neurons["mine"].tolist() for name, layer in layers(loaded).items()} == {
        name: indices.tolist() for name, indices in neurons.items()
    }
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(tiny_llama(dtype=dtype)))
    loaded.enable_adapters()
    loaded.delete_adapter("mine")
    assert torch.equal(logits(loaded), logits(tiny_llama(dtype=dtype)))


def test_transformers_add_adapter_and_save(tmp_path):
    base = tiny_llama()
    base.add_adapter(StarConfig(num_neurons=5, init_weights=False), adapter_name="mine")
    expected = logits(base)
    assert not torch.allclose(expected, logits(tiny_llama()), atol=1e-3)
    base.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_inject_and_set_state_dict(low_cpu_mem_usage):
    source = star(num_neurons=7)
    state_dict = get_peft_model_state_dict(source)
    for prefix in ("base_model.model.", ""):
        patch = {key.replace("base_model.model.", prefix): value for key, value in state_dict.items()}
        # the config says another number of neurons than the patch has
        model = inject_adapter_in_model(
            StarConfig(num_neurons=2), tiny_llama(), "mine", low_cpu_mem_usage=low_cpu_mem_usage
        )
        result = set_peft_model_state_dict(model, patch, "mine", low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        assert torch.equal(logits(model), logits(source))
        assert model.peft_config["mine"].num_neurons == 7


def test_low_cpu_mem_usage_injects_an_empty_adapter():
    model = inject_adapter_in_model(StarConfig(num_neurons=2), tiny_llama(), "mine", low_cpu_mem_usage=True)
    adapter = get_peft_model_state_dict(model, adapter_name="mine")
    assert len(adapter) == 6 and all(value.is_meta for value in adapter.values())
    assert not any(parameter.is_meta for name, parameter in model.named_parameters() if "star_" not in name)


def test_injection_from_the_keys_of_a_state_dict():
    source = star(layers_to_transform=[0, 2])
    state_dict = {
        key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(source).items()
    }
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        model = inject_adapter_in_model(StarConfig(num_neurons=4), tiny_llama(), state_dict=state_dict)
    assert list(layers(model)) == [NAMES[0], NAMES[2]]
    set_peft_model_state_dict(model, state_dict)
    assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_patch_with_another_number_of_neurons_than_its_config(patch, tmp_path, low_cpu_mem_usage):
    folder, expected = patch
    config = StarConfig.from_pretrained(folder)
    config.num_neurons = 1.0
    config.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    # and what was found is what is saved
    assert loaded.peft_config["default"].num_neurons == 4
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")), expected)


def test_reloading_the_weights_keeps_the_parameter_when_the_number_is_the_same(patch):
    model = star()
    before = [layer.star_delta["default"] for layer in layers(model).values()]
    for value in before:
        nn.init.zeros_(value)
    model.load_adapter(patch[0], "default", is_trainable=True)
    assert [id(layer.star_delta["default"]) for layer in layers(model).values()] == [id(value) for value in before]
    assert torch.equal(logits(model), patch[1])


###############
# Bad patches #
###############


def tampered(folder: str, change, *, checksum: bool = False) -> None:
    """Change tensors of a patch, which forgets its checksum, as those of earlier versions have none, or keeps it."""
    if not checksum:
        config = StarConfig.from_pretrained(folder)
        config.tensors_sha256 = None
        PeftConfig.save_pretrained(config, folder)
    path = os.path.join(folder, WEIGHTS)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


DELTA, INDEX = (f"base_model.model.{NAMES[1]}.{attribute}" for attribute in ("star_delta", "star_neurons"))


def _set(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


BAD_PATCHES = {
    "index out of range": (_set(INDEX, torch.tensor([0, 1, 2, WIDTH])), ValueError, r"in \[0, 40\), got 40"),
    "negative index": (_set(INDEX, torch.tensor([0, 1, 2, -1])), ValueError, r"in \[0, 40\), got -1"),
    "repeated index": (_set(INDEX, torch.tensor([0, 1, 2, 2])), ValueError, "unique"),
    "float index": (_set(INDEX, torch.tensor([0.0, 1.0, 2.0, 3.0])), TypeError, "integer indices"),
    "index of two dimensions": (_set(INDEX, torch.tensor([[0, 1, 2, 3]])), ValueError, "should be a vector"),
    "no index": (_set(INDEX, torch.empty(0, dtype=torch.int32)), ValueError, "empty"),
    "too few indices": (_set(INDEX, torch.tensor([0, 1])), ValueError, r"shape \(2, 16\)"),
    "wrong width": (_set(DELTA, torch.zeros(4, HEIGHT + 1)), ValueError, r"shape \(4, 16\).*got \(4, 17\)"),
    "transposed": (_set(DELTA, torch.zeros(HEIGHT, 4)), ValueError, r"shape \(4, 16\)"),
    "nan": (_set(DELTA, torch.full((4, HEIGHT), torch.nan)), ValueError, "NaN or infinite"),
    "infinity": (_set(DELTA, torch.full((4, HEIGHT), -torch.inf)), ValueError, "NaN or infinite"),
    "integer delta": (_set(DELTA, torch.zeros(4, HEIGHT, dtype=torch.int32)), TypeError, "floating point"),
    "unknown module": (
        lambda tensors: tensors.__setitem__(DELTA.replace("layers.1", "layers.9"), tensors.pop(DELTA)),
        ValueError,
        "layers.9.mlp.down_proj, which the model does not have",
    ),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", sorted(BAD_PATCHES))
def test_bad_patches_are_refused(patch, kind, low_cpu_mem_usage):
    change, error, message = BAD_PATCHES[kind]
    tampered(patch[0], change)
    with pytest.raises(error, match=message) as raised:
        PeftModel.from_pretrained(tiny_llama(), patch[0], low_cpu_mem_usage=low_cpu_mem_usage)
    assert "model.layers." in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("kind", sorted(BAD_PATCHES))
def test_bad_patches_alter_nothing(patch, kind):
    change, error, _ = BAD_PATCHES[kind]

    def change_more(tensors):
        # the modules before the bad one are fine, and of another size, so their tensors would have to be replaced
        tensors[f"base_model.model.{NAMES[0]}.star_neurons"] = torch.arange(2)
        tensors[f"base_model.model.{NAMES[0]}.star_delta"] = torch.ones(2, HEIGHT)
        change(tensors)

    tampered(patch[0], change_more)
    model = star()
    before, config = state(model), copy.deepcopy(model.peft_config["default"])
    with pytest.raises(error):
        model.load_adapter(patch[0], "default")
    assert_same_state(model, before)
    assert model.peft_config["default"] == config


@pytest.mark.parametrize("kind", ["index out of range", "negative index", "repeated index"])
def test_transformers_refuses_bad_indices(patch, kind):
    change, error, message = BAD_PATCHES[kind]
    tampered(patch[0], change)
    with pytest.raises((error, RuntimeError), match=f"{message}|names neurons that cannot be"):
        tiny_llama().load_adapter(patch[0], adapter_name="mine")


@pytest.mark.parametrize("kind", ["too few indices", "wrong width", "transposed"])
def test_transformers_refuses_tensors_of_wrong_shapes(patch, kind):
    tampered(patch[0], BAD_PATCHES[kind][0])
    with pytest.raises((ValueError, RuntimeError)):
        tiny_llama().load_adapter(patch[0], adapter_name="mine")


EMBEDDING = "base_model.model.model.embed_tokens.weight"
STRANGERS = {
    "an embedding": EMBEDDING,
    "a base layer": f"base_model.model.{NAMES[1]}.base_layer.weight",
    "another layer": "base_model.model.model.layers.0.self_attn.q_proj.weight",
}


@pytest.mark.parametrize("load", ["peft", "load_adapter", "transformers"])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("kind", sorted(STRANGERS))
def test_a_patch_cannot_bring_a_weight_of_the_base(patch, kind, checksum, load):
    key = STRANGERS[kind]
    shape = (64, HEIGHT) if kind == "an embedding" else (HEIGHT, WIDTH if kind == "a base layer" else HEIGHT)
    tampered(patch[0], _set(key, torch.zeros(shape)), checksum=checksum)
    base = star() if load == "load_adapter" else tiny_llama()
    before = {key: value.clone() for key, value in base.state_dict().items() if "star_" not in key}
    with pytest.raises(ValueError, match=rf"holds \S*{re.escape(key.rpartition('.')[0])}.* does not name"):
        if load == "peft":
            PeftModel.from_pretrained(base, patch[0])
        else:
            base.load_adapter(patch[0], adapter_name="stranger")
    now = [value for key, value in base.state_dict().items() if "star_" not in key]
    assert len(now) == len(before) and all(map(torch.equal, now, before.values()))


@pytest.mark.parametrize("load", ["peft", "transformers"])
def test_a_module_to_save_does_not_bring_the_weight_of_the_base_that_it_stands_for(tmp_path, load):
    star(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    tampered(str(tmp_path), _set("base_model.model.lm_head.original_module.weight", torch.zeros(64, HEIGHT)))
    base = tiny_llama()
    weight = base.lm_head.weight
    with pytest.raises(ValueError, match="lm_head.original_module.weight, which its configuration does not name"):
        PeftModel.from_pretrained(base, tmp_path) if load == "peft" else base.load_adapter(str(tmp_path))
    assert weight.any()


@pytest.mark.parametrize("saved", [[], ["embed_tokens"]])
def test_embeddings_come_along_only_by_name(tmp_path, saved):
    model = star(modules_to_save=saved or None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path, save_embedding_layers=not saved)
    told = [str(item.message) for item in caught if "so it will not be loaded" in str(item.message)]
    if saved:
        assert not told and torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))
    else:
        assert len(told) == 1 and "save_embedding_layers=False" in told[0]
        with pytest.raises(ValueError, match="does not name"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("gone", [[DELTA], [INDEX], [DELTA, INDEX]], ids=["delta", "index", "both"])
@pytest.mark.parametrize("checksum", [False, True])
def test_peft_warns_of_modules_that_a_patch_lacks_and_leaves_them_alone(patch, gone, checksum, low_cpu_mem_usage):
    tampered(patch[0], lambda tensors: [tensors.pop(key) for key in gone], checksum=checksum)
    with pytest.warns(UserWarning, match="Found missing adapter keys while loading the checkpoint.*layers.1.mlp"):
        model = PeftModel.from_pretrained(tiny_llama(), patch[0], low_cpu_mem_usage=low_cpu_mem_usage)
    kept = load_file(os.path.join(patch[0], WEIGHTS))
    for name, layer in layers(model).items():
        expected = kept[f"base_model.model.{name}.star_delta"] if name != NAMES[1] else torch.zeros(4, HEIGHT)
        assert torch.equal(layer.star_delta["default"], expected)
    assert logits(model).isfinite().all()


############
# Checksum #
############


def flip(folder: str, key: str) -> None:
    """Flip the lowest bit of a tensor's first number, which no other check can see."""

    def change(tensors):
        whole = tensors[key].view(torch.int32) if tensors[key].is_floating_point() else tensors[key]
        whole.view(-1)[0] ^= 1

    tampered(folder, change, checksum=True)


@pytest.mark.parametrize("load", ["peft", "transformers"])
@pytest.mark.parametrize("key", [DELTA, INDEX, "base_model.model.lm_head.weight"])
def test_a_flipped_bit_is_found(tmp_path, key, load):
    star(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    assert len(StarConfig.from_pretrained(tmp_path).tensors_sha256) == 64
    flip(str(tmp_path), key)
    with pytest.raises(ValueError, match="is damaged: its tensors are not those that were saved"):
        if load == "peft":
            PeftModel.from_pretrained(tiny_llama(), tmp_path)
        else:
            tiny_llama().load_adapter(str(tmp_path), adapter_name="mine")


def test_the_checksum_is_of_what_was_saved_last(tmp_path):
    """A model that was loaded, changed and saved keeps no old checksum, nor does it hold one against a checkpoint."""
    star().save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", is_trainable=True)
    assert model.peft_config["default"].tensors_sha256 is None
    randomize(model)
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")), logits(model))
    model.load_adapter(tmp_path / "first", "default")
    first, second = (StarConfig.from_pretrained(tmp_path / name).tensors_sha256 for name in ("first", "second"))
    assert first != second
    again = get_peft_model(tiny_llama(), StarConfig.from_pretrained(tmp_path / "second"))
    again.save_pretrained(tmp_path / "third")
    again.load_adapter(tmp_path / "first", "default")


def test_a_patch_without_a_checksum_loads(patch):
    tampered(patch[0], lambda tensors: None)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), patch[0])), patch[1])


def test_loading_over_a_merged_adapter_is_refused(patch):
    model = star()
    model.merge_adapter()
    with pytest.raises(ValueError, match="cannot be loaded while it is merged"):
        model.load_adapter(patch[0], "default")


############
# Retarget #
############


def some_neurons() -> dict[str, torch.Tensor]:
    return {NAMES[2]: torch.tensor([39, 0, 7]), NAMES[0]: torch.tensor([5])}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_retarget_save_and_load(tmp_path, low_cpu_mem_usage):
    model = star(exclude_modules=["q_proj"], layers_to_transform=[0, 1])
    base = logits(tiny_llama())
    model.base_model.retarget("default", some_neurons())
    assert list(layers(model)) == [NAMES[0], NAMES[2]]
    assert model.base_model.targeted_module_names == [NAMES[0], NAMES[2]]
    # a patch of zeros changes nothing
    assert torch.equal(logits(model), base)
    for name, neurons in some_neurons().items():
        layer = layers(model)[name]
        assert torch.equal(layer.star_neurons["default"].long(), neurons)
        assert layer.star_neurons["default"].dtype == torch.int32
        assert torch.equal(layer.star_delta["default"], torch.zeros(len(neurons), HEIGHT))
        assert layer.star_delta["default"].requires_grad
    config = model.peft_config["default"]
    assert config.target_modules == {NAMES[0], NAMES[2]}
    assert config.layers_to_transform is None and config.exclude_modules is None
    assert config.neurons_per_module == {NAMES[0]: 1, NAMES[2]: 3}

    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert list(layers(loaded)) == [NAMES[0], NAMES[2]]
    assert loaded.peft_config["default"].neurons_per_module == config.neurons_per_module
    assert torch.equal(logits(loaded.merge_and_unload()), logits(model.merge_and_unload()))


def test_retarget_beside_what_was_patched():
    """Neurons whose delta is not zero stay with it, in ascending order with the new ones; all others go."""
    model = star()
    model.base_model.retarget("default", {name: torch.tensor([9, 3, 20]) for name in NAMES})
    delta = torch.randn(3, HEIGHT)
    delta[0] = 0
    layers(model)[NAMES[0]].set_neurons("default", torch.tensor([9, 3, 20]), delta)
    layers(model)[NAMES[1]].set_neurons("default", torch.tensor([9, 20, 3]), delta)
    patched = logits(model)
    new = {NAMES[1]: torch.tensor([3, 5]), NAMES[2]: torch.tensor([7, 1])}
    model.base_model.retarget("default", new, keep_deltas=True)
    zero = torch.zeros(HEIGHT)
    expected = {
        NAMES[0]: ([3, 20], [delta[1], delta[2]]),
        NAMES[1]: ([3, 5, 20], [delta[2], zero, delta[1]]),
        NAMES[2]: ([7, 1], [zero, zero]),
    }
    assert list(layers(model)) == NAMES
    for name, (neurons, rows) in expected.items():
        layer = layers(model)[name]
        assert layer.star_neurons["default"].tolist() == neurons
        assert (
            torch.equal(layer.star_delta["default"], torch.stack(rows)) and layer.star_delta["default"].requires_grad
        )
    assert torch.allclose(logits(model), patched, atol=1e-6)
    assert model.peft_config["default"].neurons_per_module == {NAMES[0]: 2, NAMES[1]: 3, NAMES[2]: 2}
    # nothing but what is patched
    model.base_model.retarget("default", {}, keep_deltas=True)
    assert {name: layer.star_neurons["default"].tolist() for name, layer in layers(model).items()} == {
        NAMES[0]: [3, 20],
        NAMES[1]: [3, 20],
    }


def test_retarget_to_the_same_number_everywhere():
    model = star()
    model.base_model.retarget("default", {name: torch.tensor([1, 2]) for name in NAMES})
    config = model.peft_config["default"]
    assert config.num_neurons == 2 and config.neurons_per_module is None
    assert config.target_modules == set(NAMES)


def test_retarget_restores_the_very_base_layer():
    base = tiny_llama()
    originals = {name: base.get_submodule(name) for name in NAMES}
    model = star(base)
    model.base_model.retarget("default", {NAMES[1]: torch.tensor([0])})
    for name in (NAMES[0], NAMES[2]):
        assert base.get_submodule(name) is originals[name]
    assert base.get_submodule(NAMES[1]).base_layer is originals[NAMES[1]]


def test_retarget_leaves_other_adapters_alone():
    model = two_adapters()
    model.set_adapter("two")
    b = logits(model)
    status = {
        name: [(p.requires_grad, p.dtype) for p in layer.star_delta.values()] for name, layer in layers(model).items()
    }
    model.base_model.retarget("one", {NAMES[1]: torch.tensor([0, 1])})
    assert torch.equal(logits(model), b)
    assert list(layers(model, "two")) == NAMES and list(layers(model, "one")) == [NAMES[1]]
    assert [(p.requires_grad, p.dtype) for p in layers(model)[NAMES[1]].star_delta.values()] == status[NAMES[1]]
    # and back to layers that only the other one has
    model.base_model.retarget("one", {NAMES[0]: torch.tensor([3])})
    randomize(model, "one")
    assert torch.equal(logits(model), b)
    assert model.base_model.active_adapters == ["two"]
    assert {tuple(layer.active_adapters) for layer in layers(model).values()} == {("two",)}
    assert not layers(model)[NAMES[0]].star_delta["one"].requires_grad
    assert layers(model)[NAMES[0]].star_delta["two"].requires_grad
    model.set_adapter("one")
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_retarget_keeps_dtype_trainability_and_the_switch():
    model = star(tiny_llama(dtype=torch.bfloat16), layers_to_transform=[0]).train()
    model.base_model.disable_adapter_layers()
    model.base_model.retarget("default", {NAMES[1]: torch.tensor([1, 2])})
    layer = layers(model)[NAMES[1]]
    assert layer.star_delta["default"].dtype == torch.float32
    assert layer.disable_adapters and layer.training
    assert not layer.star_delta["default"].requires_grad  # as PEFT has it for adapters that are switched off
    model.base_model.enable_adapter_layers()
    assert layer.star_delta["default"].requires_grad


def test_retarget_to_modules_that_were_no_targets():
    model = star(target_modules=["down_proj"])
    name = "model.layers.1.self_attn.q_proj"
    model.base_model.retarget("default", {name: torch.tensor([15])})
    assert list(layers(model)) == [name]
    randomize(model)
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_retarget_conv1d(tmp_path):
    model = star(tiny_gpt2())
    name = MODELS["gpt2"].names[1]
    model.base_model.retarget("default", {name: torch.tensor([39, 2])})
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "error, neurons, message",
    [
        (ValueError, {}, "names no module"),
        (ValueError, {"model.layers.7.mlp.down_proj": [0]}, "no module named 'model.layers.7.mlp.down_proj'"),
        (ValueError, {NAMES[1]: [WIDTH]}, r"model.layers.1.mlp.down_proj should be in \[0, 40\), got 40"),
        (ValueError, {NAMES[1]: [1, 1]}, "unique"),
        (ValueError, {NAMES[1]: []}, "empty"),
        (TypeError, {NAMES[1]: [0.5]}, "integer"),
        (TypeError, {"model.norm": [0]}, "is not supported. Currently, only"),
        (TypeError, {"model.layers.1.mlp": [0]}, "is not supported. Currently, only"),
        (ValueError, {"model.layers.1.mlp.up_proj": [0]}, "cannot be patched, as it is one of `modules_to_save`"),
    ],
)
def test_retarget_refuses_bad_values_and_changes_nothing(error, neurons, message):
    model = star()
    model.peft_config["default"].modules_to_save = ["up_proj"]
    before, config = state(model), copy.deepcopy(model.peft_config["default"])
    indices = {name: torch.tensor(values, dtype=None if values else torch.int64) for name, values in neurons.items()}
    for keep_deltas in (False, True) if neurons else (False,):
        with pytest.raises(error, match=message):
            # what comes first is fine
            wanted = {NAMES[0]: torch.tensor([0]), **indices} if neurons else {}
            model.base_model.retarget("default", wanted, keep_deltas)
    assert_same_state(model, before)
    assert model.peft_config["default"] == config
    assert list(layers(model)) == NAMES


def test_retarget_refuses_merged_and_unknown_adapters():
    model = two_adapters()
    with pytest.raises(ValueError, match="Adapter c does not exist"):
        model.base_model.retarget("c", some_neurons())
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="while it is merged"):
        model.base_model.retarget("one", some_neurons())
    # the other one is free to move, and the merged one can still be unmerged
    before = state(tiny_llama())
    model.base_model.retarget("two", {NAMES[0]: torch.tensor([0])})
    model.unmerge_adapter()
    assert_same_state(model.unload(), before)


def test_retarget_where_a_full_name_is_the_end_of_another(tmp_path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([Layer()])
            self.tower = nn.Module()
            self.tower.layers = nn.ModuleList([Layer()])

        def forward(self, x):
            return self.layers[0](self.tower.layers[0](x))

    model = get_peft_model(Net(), StarConfig(num_neurons=2, target_modules=["down"]))
    model.base_model.retarget("default", {"layers.0.down": torch.tensor([3])})
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert list(layers(loaded)) == ["layers.0.down"]
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), model(x))


############
# Training #
############


def loss_of(model) -> torch.Tensor:
    ids = tokens()
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("optimizer_cls, lr", [(torch.optim.SGD, 20.0), (torch.optim.AdamW, 0.1)])
def test_plain_optimizer_trains_an_adapter_made_without_data(optimizer_cls, lr):
    model = star(init_weights=True).train()
    frozen = {key: value for key, value in state(model).items() if "star_delta" not in key}
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr)
    first = loss_of(model).item()
    for _ in range(5):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model).item() < first - 1e-3
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


def test_trainer_trains_saves_and_resumes(tmp_path):
    model = star(init_weights=True)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8).tolist()]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    expected = logits(model.eval())
    assert not torch.allclose(expected, logits(tiny_llama()), atol=1e-4)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(loaded), expected)

    again = transformers.Trainer(model=star(init_weights=True), args=arguments, train_dataset=Dataset.from_list(rows))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(again.model.eval()), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        base = tiny_llama()
        torch.manual_seed(1)
        model = star(base).train()
        if checkpointing:
            model.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss_of(model).backward()
        gradients.append([layer.star_delta["default"].grad for layer in layers(model).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, checkpointed)


def test_compile(tmp_path):
    model = star()
    expected = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)
    loss_of(compiled).backward()
    assert layers(model)[NAMES[0]].star_delta["default"].grad is not None
    compiled.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)


def test_autocast_of_a_model():
    model = star()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert layers(model)[NAMES[0]].star_delta["default"].grad.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of(model), atol=0.05, rtol=0.05)


def test_generate():
    model = star()
    out = model.generate(input_ids=tokens(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (2, 11)


def test_copy_and_move():
    model = star()
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), logits(model))
    clone.to(torch.bfloat16)
    assert layers(clone)[NAMES[0]].star_neurons["default"].dtype == torch.int32
