"""Combining patches and swapping them in place."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peft_star
from peft_star import StarConfig, combine_patches, swap_patch
from peft_star.tuner.layer import star_layers
from support.tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral, tokens

A = {"num_neurons": 6}
B = {"num_neurons": 4, "layers_to_transform": [1, 2]}


def model_with(build=tiny_llama, dtype=torch.float32, **adapters):
    """A PeftModel with these adapters: random deltas, and neurons that partly overlap."""
    adapters = adapters or {"a": A, "b": B}
    model = None
    for number, (name, settings) in enumerate(adapters.items()):
        config = StarConfig(task_type="CAUSAL_LM", init_weights=False, **settings)
        if model is None:
            model = get_peft_model(build().to(dtype), config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(number)
        for layer in star_layers(model, name).values():
            count = layer.star_neurons[name].numel()
            neurons = torch.randperm(min(12, layer.in_features), generator=generator)[:count]
            layer.set_neurons(name, neurons, torch.randn(count, layer.out_features, generator=generator) * 0.3)
    return model.eval()


@torch.no_grad()
def logits(model, name=None):
    if name is not None:
        model.base_model.set_adapter(name, inference_mode=True)
    return model(input_ids=tokens()).logits


def saved(tmp_path, build=tiny_llama, name="new", seed=None, **settings):
    """A patch on disk, and the logits that it gives on a fresh model."""
    torch.manual_seed(5 if seed is None else seed)
    model = model_with(build, **{"default": {**A, **settings}})
    for layer in star_layers(model, "default").values():
        layer.set_neurons(
            "default", layer.star_neurons["default"].clone(), torch.randn_like(layer.star_delta["default"]) * 0.3
        )
    model.save_pretrained(tmp_path / name)
    return tmp_path / name, logits(model)


# combining


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("weights", [None, [0.25, -2.0], [1, 0]])
def test_a_combination_is_the_weighted_sum(build, weights):
    model = model_with(build)
    combine_patches(model, ["a", "b"], "sum", weights)
    factors = [1.0, 1.0] if weights is None else weights
    assert len(star_layers(model, "sum")) == 3
    for layer in star_layers(model, "sum").values():
        x = torch.randn(2, 5, layer.in_features)
        base = layer.base_layer(x)
        wanted = base
        for name, factor in zip(["a", "b"], factors):
            if name in layer.star_delta:
                layer.set_adapter([name])
                wanted = wanted + factor * (layer(x) - base)
        layer.set_adapter(["sum"])
        assert torch.allclose(layer(x), wanted, atol=1e-5)
        parts = [set(layer.star_neurons[name].tolist()) for name in ("a", "b") if name in layer.star_neurons]
        assert layer.star_neurons["sum"].tolist() == sorted(set.union(*parts))
        assert layer.star_neurons["sum"].dtype == torch.int32


def test_all_at_once_equals_the_sum_and_saves_and_loads(tmp_path):
    model = model_with()
    together = logits(model, ["a", "b"])
    combine_patches(model, ["a", "b"], "sum")
    combined = logits(model, "sum")
    assert torch.allclose(combined, together, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum")
    assert torch.equal(logits(again), combined)
    assert torch.allclose(logits(again.merge_and_unload()), combined, atol=1e-4)


def test_nothing_but_the_new_adapter_changes():
    model = model_with()
    model.set_adapter("b")
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    out = logits(model)
    combine_patches(model, ["a", "b"], "sum")
    assert model.active_adapters == ["b"] and torch.equal(logits(model), out)
    after = dict(model.named_parameters())
    for name, (requires_grad, value) in before.items():
        assert after[name].requires_grad == requires_grad and torch.equal(after[name], value)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".sum"))
    model.set_adapter("sum")
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith(".sum"))


def test_a_single_part_is_scaled():
    model = model_with()
    combine_patches(model, ["b"], "scaled", [0.5])
    assert star_layers(model, "scaled").keys() == star_layers(model, "b").keys()
    for layer in star_layers(model, "scaled").values():
        order = layer.star_neurons["b"].argsort()
        assert torch.equal(layer.star_delta["scaled"], layer.star_delta["b"][order] * 0.5)


def test_routed_experts_are_combined():
    model = model_with(tiny_mixtral, a={**A, "target_modules": ["experts"]}, b={**B, "target_modules": ["experts"]})
    together = logits(model, ["a", "b"])
    combine_patches(model, ["a", "b"], "sum")
    assert torch.allclose(logits(model, "sum"), together, atol=1e-5)


def test_short_data_types_are_summed_in_float32():
    model = model_with(dtype=torch.bfloat16)
    combine_patches(model, ["a", "b"], "sum", [0.3, 0.7])
    for layer in star_layers(model, "sum").values():
        assert layer.star_delta["sum"].dtype == torch.bfloat16
        total = torch.zeros(layer.in_features, layer.out_features)
        for name, factor in (("a", 0.3), ("b", 0.7)):
            if name in layer.star_delta:
                total[layer.star_neurons[name].long()] += factor * layer.star_delta[name].detach().float()
        assert torch.equal(layer.star_delta["sum"], total[layer.star_neurons["sum"].long()].bfloat16())


def test_the_fingerprint_of_the_base_is_kept():
    model = model_with()
    model.peft_config["b"].base_fingerprint = peft_star.fingerprint(model)
    combine_patches(model, ["a", "b"], "sum")
    assert model.peft_config["sum"].base_fingerprint == peft_star.fingerprint(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a", "c"], "sum"), ValueError, "no adapter 'c'; it has 'a', 'b'"),
        (([], "sum"), ValueError, "names no adapter"),
        (("a", "sum"), TypeError, "should be a list of adapter names"),
        ((["a", "a"], "sum"), ValueError, "names an adapter twice"),
        ((["a", "b"], "a"), ValueError, "has an adapter 'a' already"),
        ((["a", "b"], "a.b"), ValueError, "cannot be the name of an adapter"),
        ((["a", "b"], "half"), ValueError, "cannot be the name of an adapter"),
        ((["a", "b"], ""), ValueError, "cannot be the name of an adapter"),
        ((["a", "b"], 3), TypeError, "`new_name` should be a string"),
        ((["a", "b"], "sum", [1.0]), ValueError, "holds 1 numbers for 2 adapters"),
        ((["a", "b"], "sum", 1.0), TypeError, "should be a list of numbers"),
        ((["a", "b"], "sum", [1.0, "x"]), TypeError, "should hold numbers"),
        ((["a", "b"], "sum", [1.0, float("nan")]), ValueError, "finite numbers"),
        ((["a", "b"], "sum", [1e38, 1e39]), ValueError, "is not finite in torch.float32; give smaller weights"),
    ],
)
def test_bad_combinations_change_nothing(arguments, error, message):
    model = model_with()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        combine_patches(model, *arguments)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert list(model.peft_config) == ["a", "b"]


def test_merged_adapters_foreign_models_and_whole_modules_are_refused():
    model = model_with()
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="Adapter 'a' is merged and cannot be combined"):
        combine_patches(model, ["a", "b"], "sum")
    with pytest.raises(TypeError, match="takes a PeftModel with STAR adapters, got a LlamaForCausalLM"):
        combine_patches(tiny_llama(), ["a"], "sum")
    model = model_with(a=A, b={**B, "modules_to_save": ["lm_head"]})
    with pytest.raises(ValueError, match="Adapter 'b' holds `modules_to_save`"):
        combine_patches(model, ["a", "b"], "sum")


def test_add_weighted_adapter_names_the_way():
    with pytest.raises(TypeError, match="peft_star.combine_patches"):
        model_with().add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


# swapping


@pytest.mark.parametrize("settings", [{}, {"num_neurons": 3}, {"num_neurons": 9}, {"layers_to_transform": [1]}])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_swapped_patch_is_the_patch(build, settings, tmp_path):
    directory, expected = saved(tmp_path, build, **settings)
    model = model_with(build, default=A)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    before = {name: parameter for name, parameter in model.named_parameters()}
    in_place = swap_patch(model, directory)
    assert in_place == (settings.get("num_neurons", 6) == 6)
    assert torch.equal(logits(model), expected)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name].requires_grad == before[name].requires_grad for name in before)
    if in_place:
        assert all(after[name] is before[name] for name in before)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / "again")), expected)


def test_the_model_that_transformers_loads_swaps_too(tmp_path):
    first, _ = saved(tmp_path, name="first", seed=1)
    second, expected = saved(tmp_path, name="second", seed=2)
    model = tiny_llama()
    model.load_adapter(str(first), adapter_name="default")
    assert swap_patch(model, second)
    assert torch.equal(logits(model), expected)


def test_a_named_and_inactive_adapter_is_swapped_alone(tmp_path):
    directory, expected = saved(tmp_path)
    model = model_with(a=A, b=A)
    out = logits(model, "a")
    assert swap_patch(model, directory, "b")
    assert torch.equal(logits(model), out)
    assert torch.equal(logits(model, "b"), expected)


@pytest.mark.parametrize("wrapped", [False, True], ids=["compile-method", "compile-function"])
def test_a_compiled_model_is_not_compiled_anew(wrapped, tmp_path):
    first, expected_first = saved(tmp_path, name="first", seed=1)
    second, expected_second = saved(tmp_path, name="second", seed=2)
    other, _ = saved(tmp_path, name="other", num_neurons=3)
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounter()
    model = PeftModel.from_pretrained(tiny_llama(), first)
    torch._dynamo.reset()
    if wrapped:
        model = torch.compile(model, backend=counter)
    else:
        model.compile(backend=counter)
    assert torch.allclose(logits(model), expected_first, atol=1e-5)
    count = counter.frame_count
    assert count > 0
    for directory, expected in ((second, expected_second), (first, expected_first)):
        assert swap_patch(model, directory)
        assert torch.allclose(logits(model), expected, atol=1e-5)
        assert counter.frame_count == count
    with pytest.warns(UserWarning, match="holds other numbers of neurons .* will be compiled anew"):
        assert not swap_patch(model, other)
    logits(model)
    assert counter.frame_count > count
    torch._dynamo.reset()


def test_the_old_report_goes_and_the_fingerprint_comes(tmp_path):
    directory, _ = saved(tmp_path)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    model = model_with(default=A)
    config["base_fingerprint"] = peft_star.fingerprint(tiny_llama(seed=3))
    path.write_text(json.dumps(config))
    model.peft_config["default"].repaired = object()
    with pytest.warns(UserWarning, match="was solved for other weights"):
        swap_patch(model, directory)
    assert model.peft_config["default"].repaired is None
    assert model.peft_config["default"].base_fingerprint == config["base_fingerprint"]


def _edit(directory, change, **config):
    """Change tensors of a patch, which forgets its checksum, and its configuration."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tensors_sha256": None, **config}))
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def _out_of_range(tensors):
    key = next(key for key in tensors if key.endswith("1.mlp.down_proj.star_neurons"))
    tensors[key][0] = 40


def _nan(tensors):
    key = next(key for key in tensors if key.endswith("1.mlp.down_proj.star_delta"))
    tensors[key][0] = float("nan")


def _other_width(tensors):
    key = next(key for key in tensors if key.endswith("1.mlp.down_proj.star_delta"))
    tensors[key] = tensors[key][:, :8].clone()


def _extra(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_out_of_range, "should be in \\[0, 40\\), got 40"),
        (_nan, "is not finite"),
        (_other_width, "should have the shape \\(6, 16\\)"),
        (_extra, "which its configuration does not name"),
    ],
)
def test_a_bad_patch_changes_nothing(change, message, tmp_path):
    directory, _ = saved(tmp_path)
    _edit(directory, change)
    model = model_with(default=A)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        swap_patch(model, directory)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_cannot_be_swapped_is_said_in_a_sentence(tmp_path):
    directory, _ = saved(tmp_path)
    with pytest.raises(ValueError, match="does not hold, so it cannot be swapped in place; load it as an adapter"):
        swap_patch(model_with(default={**A, "layers_to_transform": [0]}), directory)
    with pytest.raises(ValueError, match="has no STAR adapter 'other'"):
        swap_patch(model_with(default=A), directory, "other")
    with pytest.raises(ValueError, match="has no STAR adapter 'default'"):
        swap_patch(tiny_llama(), directory)
    with pytest.raises(TypeError, match="takes a model, got a str"):
        swap_patch("model", directory)
    with pytest.raises(FileNotFoundError, match="There is no patch at"):
        swap_patch(model_with(default=A), tmp_path / "missing")
    model = model_with(default=A)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged and cannot be swapped"):
        swap_patch(model, directory)
    with pytest.raises(ValueError, match="holds `modules_to_save`"):
        swap_patch(model_with(default={**A, "modules_to_save": ["lm_head"]}), directory)


def test_a_patch_with_whole_modules_cannot_be_swapped(tmp_path):
    directory, _ = saved(tmp_path)
    _edit(directory, _extra, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="also holds whole modules"):
        swap_patch(model_with(default=A), directory)


def test_values_too_large_for_the_adapter_are_refused(tmp_path):
    directory, _ = saved(tmp_path)
    _edit(directory, lambda tensors: [t.mul_(1e6) for key, t in tensors.items() if key.endswith("star_delta")])
    model = model_with(dtype=torch.float16, default=A)
    with pytest.raises(ValueError, match="too large for the adapter's torch.float16"):
        swap_patch(model, directory)
