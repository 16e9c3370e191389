"""Neurons of routed experts, on the forms in which transformers 5 stores them."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_star import StarConfig, export_lora
from peft_star.engine.batch import make_batches
from peft_star.engine.engine import Engine
from peft_star.failures import Row
from peft_star.method.trace import Probe, trace
from peft_star.models import structure
from peft_star.tuner.experts import Experts
from support.tiny_models import tiny_llama, tiny_mixtral, tokens

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {**COMMON, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
MODELS = {
    "MixtralConfig": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": QWEN,
    # with an expert that every token goes to besides
    "Qwen2MoeConfig": {**QWEN, "shared_expert_intermediate_size": 20},
    "OlmoeConfig": {**COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3Config": {
        **{key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    # stored transposed, gate and up interleaved, with biases, and a gate of its own
    "GptOssConfig": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


def build(name: str = "MixtralConfig", seed: int = 0, dtype=torch.float32, implementation: str | None = None):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**MODELS[name]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key:  # some are left at zero, or uninitialised
                parameter.normal_(0, 0.3)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model.to(dtype).eval()


def patched(base: nn.Module, k: int = 11, seed: int = 1, **settings) -> PeftModel:
    """Random deltas on random neurons of all experts."""
    torch.manual_seed(seed)
    config = StarConfig(task_type="CAUSAL_LM", num_neurons=k, target_modules=["experts"], **settings)
    model = get_peft_model(base, config).eval()
    for layer in layers_of(model):
        layer.set_neurons("default", torch.randperm(layer.in_features)[:k], torch.randn(k, layer.out_features))
    return model


def layers_of(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# the layer


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_base_with_added_columns(name, implementation):
    base, reference = build(name, implementation=implementation), build(name, implementation=implementation)
    before = logits(base)
    model = patched(base)
    patches = layers_of(model)
    assert len(patches) == 2 and patches[0].in_features == 96 and patches[0].out_features == 16
    experts = [module for key, module in reference.named_modules() if key.endswith(".experts")]
    with torch.no_grad():
        for layer, module in zip(patches, experts):
            dense = layer.get_delta_weight("default")
            assert dense.shape == module.down_proj.shape
            assert int((dense.abs().sum(dim=2 if module.is_transposed else 1) > 0).sum()) == 11
            module.down_proj += dense
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=1e-5)
    assert (logits(model) - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unmerge(name):
    base = build(name)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = patched(base)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers_of(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    changed = [key for key, value in merged.state_dict().items() if not torch.equal(value, weights[key])]
    assert all(key.endswith("experts.down_proj") for key in changed) and len(changed) == 2


def test_unload_and_disabling_while_merged():
    base = build()
    before = logits(base)
    model = patched(base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


def test_safe_merge_refuses_nan():
    model = patched(build())
    weights = [layer.weight.detach().clone() for layer in layers_of(model)]
    with torch.no_grad():
        layers_of(model)[0].star_delta["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers_of(model), weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    base = build(dtype=dtype)
    before = logits(base)
    model = patched(base)
    assert layers_of(model)[0].star_delta["default"].dtype == torch.float32
    result = logits(model)
    assert result.dtype == dtype and (result - before).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(logits(model).float(), result.float(), atol=3e-2, rtol=3e-2)


def test_a_fresh_adapter_changes_nothing_and_trains():
    base = build()
    before = logits(base)
    model = get_peft_model(base, StarConfig(num_neurons=0.25, target_modules=["experts"]))
    assert torch.equal(logits(model), before)
    assert {key.rpartition(".")[0].rpartition(".")[2] for key, p in model.named_parameters() if p.requires_grad} == {
        "star_delta"
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(tokens()).logits.flatten(0, 1), tokens(seed=1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("name", ["MixtralConfig", "GptOssConfig"])
def test_gradient(name):
    """∂L/∂delta is the gradient of the dense `down_proj` at the neurons' columns."""
    model, reference = patched(build(name)), build(name)
    model(tokens()).logits.float().logsumexp(-1).sum().backward()
    experts = [module for key, module in reference.named_modules() if key.endswith(".experts")]
    for layer, module in zip(layers_of(model), experts):
        module.down_proj.data += layer.get_delta_weight("default").detach()
    reference(tokens()).logits.float().logsumexp(-1).sum().backward()
    for layer, module in zip(layers_of(model), experts):
        gradient = module.down_proj.grad[layer._columns(layer.star_neurons["default"].long())]
        torch.testing.assert_close(layer.star_delta["default"].grad, gradient, atol=1e-4, rtol=1e-4)


def test_tokens_that_skip_an_expert_do_not_feel_it():
    model = patched(build())
    layer = layers_of(model)[0]
    layer.set_neurons("default", [0, 1], torch.full((2, 16), 1e30))  # of expert 0
    x = torch.randn(2, 16)
    index, weights = torch.tensor([[1, 2], [0, 3]]), torch.full((2, 2), 0.5)
    result, expected = layer(x, index, weights), layer.base_layer(x, index, weights)
    assert torch.equal(result[0], expected[0])
    assert result[1].abs().max() > 1e20
    with torch.no_grad():
        # an overflow in an expert that no token is sent to
        layer.base_layer.gate_up_proj[0] = 1e38
    index[1, 0] = 2
    assert layer(x, index, weights).isfinite().all()


# patches


@pytest.mark.parametrize("name", ["MixtralConfig", "GptOssConfig"])
def test_save_and_load(name, tmp_path):
    model = patched(build(name))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    config = StarConfig.from_pretrained(tmp_path)
    assert config.in_features == [4, 24] and config.num_neurons == 11
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        assert torch.equal(logits(PeftModel.from_pretrained(build(name), tmp_path, **kwargs)), expected)
    base = build(name)
    base.load_adapter(tmp_path)
    assert torch.equal(logits(base), expected)


def test_several_adapters():
    model = patched(build())
    first = logits(model)
    model.add_adapter("other", StarConfig(num_neurons=3, target_modules=["experts"], init_weights=False))
    model.set_adapter("other")
    other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert not torch.equal(first, other) and not torch.equal(both, first)
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(logits(merged), both, atol=1e-5, rtol=1e-5)


def test_retarget(tmp_path):
    model = patched(build())
    name = "model.layers.1.mlp.experts"
    model.base_model.retarget("default", {name: torch.tensor([95, 0, 30])})
    assert len(layers_of(model)) == 1
    layers_of(model)[0].set_neurons("default", [95, 0, 30], torch.randn(3, 16))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path)), expected)
    model.base_model.retarget("default", {"model.layers.0.mlp.experts": torch.tensor([1])})
    assert [layer.star_neurons["default"].tolist() for layer in layers_of(model)] == [[1]]
    with pytest.raises(ValueError, match=r"should be in \[0, 96\), got 96"):
        model.base_model.retarget("default", {name: torch.tensor([96])})


def test_beside_linear_layers(tmp_path):
    """The expert that every token goes to is an ordinary FFN, and can be patched along with the routed ones."""
    config = StarConfig(target_modules=["experts", "shared_expert.down_proj"], num_neurons=4, init_weights=False)
    model = get_peft_model(build("Qwen2MoeConfig"), config).eval()
    assert config.in_features == {
        **{f"model.layers.{index}.mlp.experts": [4, 24] for index in range(2)},
        **{f"model.layers.{index}.mlp.shared_expert.down_proj": 20 for index in range(2)},
    }
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("Qwen2MoeConfig"), tmp_path)
    assert torch.equal(logits(loaded), expected)


def test_export_is_refused(tmp_path):
    model = patched(build())
    model.save_pretrained(tmp_path / "star")
    for source in (model, tmp_path / "star"):
        with pytest.raises(ValueError, match="neurons of routed experts .*experts.*merge the patch"):
            export_lora(source, tmp_path / "lora")


# as one linear map


@pytest.mark.parametrize("name", MODELS)
def test_hooked_second_matrix(name):
    """While it is hooked, u -> o runs through one module, and everything stays the same."""
    model = patched(build(name))
    expected = logits(model)
    layer = layers_of(model)[0]
    seen = {}
    handle = layer.second.register_forward_hook(lambda module, args, output: seen.update(u=args[0], o=output))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    handle.remove()
    u = seen["u"]
    assert u.shape == (16, 96)
    # two of four experts are asked
    assert ((u.unflatten(-1, (4, 24)) != 0).any(-1).sum(-1) == 2).all()
    base = layer.get_base_layer()
    weight = base.down_proj + layer.get_delta_weight("default")
    if not base.is_transposed:
        weight = weight.transpose(1, 2)
    if not base.has_bias:
        torch.testing.assert_close(seen["o"], u @ weight.reshape(96, 16), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), expected)


def test_trace_through_the_second_matrix():
    """The trace's gradient of the deltas, read at u and o, is autograd's."""
    model = patched(build())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = tokens(1, 10)[0].tolist()
    row = Row(0, "", "", tuple(ids[:4]), tuple(ids[4:]))
    batches = make_batches([row], 1000, "cpu")
    base = model.base_model.model
    names = [name for name, module in base.named_modules() if isinstance(module, Experts)]
    ffns = {name: base.get_submodule(name).second for name in names}
    traced = trace(Engine(base), batches, Probe(ffns, dict(structure.find_decoder_layers(base))))
    assert traced.medium.numel() > 0
    deltas = [base.get_submodule(name).star_delta["default"].requires_grad_(True) for name in names]
    output = base(input_ids=torch.tensor([ids])).logits[0].float()
    positions = torch.arange(3, 9)[traced.medium]
    loss = F.cross_entropy(output[positions], torch.tensor(ids)[positions + 1], reduction="sum")
    assert loss.item() == pytest.approx(traced.loss, rel=1e-4)
    for name, gradient in zip(names, torch.autograd.grad(loss, deltas)):
        layer = base.get_submodule(name)
        found = traced.layers[name]
        assert found.squares.shape == (96,)
        neurons = layer.star_neurons["default"].long()
        torch.testing.assert_close(found.gradient(neurons), gradient, atol=1e-4, rtol=1e-3)


# what is out of reach


def test_recognised_forms():
    assert structure.routed_shape(build().model.layers[0].mlp.experts) == (4, 24, 16)
    assert structure.routed_shape(build("GptOssConfig").model.layers[0].mlp.experts) == (4, 24, 16)
    assert structure.routed_shape(tiny_llama().model.layers[0].mlp) is None
    experts = build().model.layers[0].mlp.experts
    for attribute in ("has_post_expert_norm", "_is_expert_parallel"):
        setattr(experts, attribute, True)
        assert structure.routed_shape(experts) is None
        setattr(experts, attribute, False)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert structure.routed_shape(experts) is None


def test_other_forms_are_named():
    model = build()
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
    with pytest.raises(TypeError, match="is not supported.*routed experts with a `down_proj` of three dimensions"):
        get_peft_model(model, StarConfig(target_modules=["experts"]))


def test_without_targets_the_form_is_named_with_the_way():
    with pytest.raises(ValueError, match=r"fused expert parameters .*can be named: target_modules=\['experts'\]"):
        get_peft_model(tiny_mixtral(), StarConfig())
