"""The base's fingerprint: the same for the same weights in any form, another for other weights."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_star import StarConfig
from peft_star.models.fingerprint import UNKNOWN, check_base, fingerprint, matches, warn_of_other_base
from support.tiny_models import MODELS, tiny_gpt2, tiny_llama, tokens

ARCHITECTURES = ["llama", "llama-tied", "gpt2", "starcoder2", "gemma3", "opt", "gpt_neox", "bloom"]


def spread(model: nn.Module, size: float, seed: int = 0) -> nn.Module:
    """A copy whose weights are all off by normal noise of `size` times their standard deviation."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num() * size)
    return model


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# the same weights


def test_form():
    text = fingerprint(tiny_llama())
    assert text.startswith("star1:") and len(text) < 200
    assert text == fingerprint(tiny_llama())


def test_random_numbers_are_left_alone():
    model = tiny_llama()
    state = torch.get_rng_state()
    fingerprint(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_data_types(name, dtype):
    model = MODELS[name].build()
    text = fingerprint(model)
    assert matches(text, fingerprint(copy.deepcopy(model).to(dtype)))
    assert matches(fingerprint(copy.deepcopy(model).to(torch.bfloat16)), fingerprint(model.to(dtype)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_shards_and_files(name, tmp_path):
    model = MODELS[name].build()
    text = fingerprint(model)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for directory in ("one", "many"):
        assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / directory)) == text


def test_heads():
    """The backbone alone, a classifier, and a tied head that became a tensor of its own."""
    tied = MODELS["llama-tied"].build()
    text = fingerprint(tied)
    untied = MODELS["llama"].build()
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.lm_head.weight.clone()})
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert fingerprint(untied) == text
    backbone = AutoModel.from_config(tied.config)
    backbone.load_state_dict(tied.model.state_dict())
    assert fingerprint(backbone) == text
    classifier = AutoModelForSequenceClassification.from_config(tied.config)
    classifier.model.load_state_dict(tied.model.state_dict())
    assert fingerprint(classifier) == text


def test_wrappers():
    model = tiny_llama()
    text = fingerprint(model)
    assert fingerprint(torch.compile(model)) == text
    peft_model = get_peft_model(model, StarConfig(num_neurons=3, init_weights=False))
    assert fingerprint(torch.compile(peft_model)) == text
    assert fingerprint(peft_model) == fingerprint(peft_model.base_model) == fingerprint(peft_model.model) == text
    peft_model.add_adapter("other", StarConfig(num_neurons=2, target_modules=["q_proj"], init_weights=False))
    assert fingerprint(peft_model) == text
    peft_model.merge_adapter()
    assert fingerprint(peft_model) == UNKNOWN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not every layer has the active adapter
        peft_model.unmerge_adapter()
    assert fingerprint(peft_model) == text
    assert fingerprint(peft_model.unload()) == text

    integrated = tiny_llama()
    integrated.add_adapter(StarConfig(num_neurons=3, init_weights=False))
    assert fingerprint(integrated) == text
    lora = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    lora_model = get_peft_model(tiny_llama(), lora)
    with torch.no_grad():
        lora_model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    assert fingerprint(lora_model) == text
    tokens_model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]))
    assert fingerprint(tokens_model) == text


def test_layout_in_memory():
    model = tiny_llama()
    text = fingerprint(model)
    weight = model.model.layers[0].mlp.down_proj
    weight.weight = nn.Parameter(weight.weight.detach().T.contiguous().T)
    assert not weight.weight.is_contiguous()
    assert fingerprint(model) == text


# other weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_another_seed(name):
    assert not matches(fingerprint(MODELS[name].build()), fingerprint(MODELS[name].build(seed=1)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_counts(name):
    model = MODELS[name].build()
    text = fingerprint(model)
    for key, parameter in model.named_parameters():
        before = parameter.detach().clone()
        torch.manual_seed(0)
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
            assert not matches(text, fingerprint(model)), key
            # its size alone
            if before.any():
                parameter.copy_(before * 1.5)
                assert not matches(text, fingerprint(model)), key
            parameter.copy_(before)
    assert fingerprint(model) == text


def test_training_shows():
    model = tiny_llama()
    assert not matches(fingerprint(model), fingerprint(spread(model, 0.03)))
    assert matches(fingerprint(model), fingerprint(spread(model, 0.0005)))


def test_other_architectures():
    assert not matches(fingerprint(tiny_llama()), fingerprint(tiny_gpt2()))
    assert not matches(fingerprint(tiny_llama()), fingerprint(tiny_llama(num_hidden_layers=2)))


def test_plain_modules():
    def build(scale=1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))
        with torch.no_grad():
            model[0].weight.mul_(scale)
        return model

    assert matches(fingerprint(build()), fingerprint(build()))
    assert not matches(fingerprint(build()), fingerprint(build(2.0)))


# what cannot be told


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to("meta"),
        lambda model: setattr(model.model.norm, "weight", nn.Parameter(torch.empty(0))),
        lambda model: setattr(model.model.norm, "weight", nn.Parameter(torch.full((16,), float("nan")))),
        lambda model: setattr(
            model.lm_head, "weight", nn.Parameter(torch.ones(64, 16, dtype=torch.int8), requires_grad=False)
        ),
        lambda model: model.to(torch.float8_e4m3fn),
        lambda model: setattr(model, "hf_quantizer", object()),
    ],
    ids=["meta", "empty", "nan", "int8", "float8", "quantizer"],
)
def test_unknown(change):
    model = tiny_llama()
    change(model)
    assert fingerprint(model) == UNKNOWN


def test_unknown_without_parameters():
    assert fingerprint(nn.Identity()) == UNKNOWN


@pytest.mark.parametrize("text", [UNKNOWN, "", "star2:AAAA", "star1:AAAA", "star1:not base64!", None])
def test_unknown_matches_with_a_warning(text):
    known = fingerprint(tiny_llama())
    for pair in ((text, known), (known, text)):
        with pytest.warns(UserWarning, match="cannot be told"):
            assert matches(*pair)


# the patch


@pytest.fixture
def patch(tmp_path):
    """A patch that says which weights it is for."""
    model = get_peft_model(tiny_llama(), StarConfig(task_type=TaskType.CAUSAL_LM, num_neurons=3, init_weights=False))
    model.peft_config["default"].base_fingerprint = fingerprint(model)
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    model.save_pretrained(tmp_path / "patch", save_embedding_layers=False)
    return tmp_path / "patch"


def test_config_round_trip(patch):
    assert StarConfig.from_pretrained(patch).base_fingerprint == fingerprint(tiny_llama())
    assert StarConfig().base_fingerprint is None
    with pytest.raises(TypeError, match="base_fingerprint"):
        StarConfig(base_fingerprint=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_on_its_base_is_silent(patch, dtype):
    PeftModel.from_pretrained(tiny_llama(dtype=dtype), patch)
    PeftModel.from_pretrained(tiny_llama(dtype=dtype), patch, low_cpu_mem_usage=True)
    tiny_llama(dtype=dtype).load_adapter(patch)


def test_loading_on_another_base_warns_and_works(patch):
    with pytest.warns(UserWarning, match="solved for other weights, those of someone/some-model, than this model"):
        model = PeftModel.from_pretrained(tiny_llama(seed=1), patch)
    with pytest.warns(UserWarning, match="solved for other weights"):
        model.load_adapter(patch, "again")
    assert model(tokens()).logits.isfinite().all()
    with pytest.warns(UserWarning, match="solved for other weights"):
        tiny_llama(seed=1).load_adapter(patch)


def test_loading_where_nothing_can_be_told_is_silent(patch):
    model = tiny_llama(seed=1)
    model.hf_quantizer = object()
    warn_of_other_base(model, StarConfig.from_pretrained(patch).to_dict())
    warn_of_other_base(tiny_llama(seed=1), StarConfig().to_dict())
    model = tiny_llama(seed=1)
    model.get_output_embeddings = lambda: 1 / 0
    warn_of_other_base(model, StarConfig.from_pretrained(patch).to_dict())


def test_check_base(patch):
    config = StarConfig.from_pretrained(patch)
    as_dict = json.loads((patch / "adapter_config.json").read_text())
    for form in (config.to_dict(), as_dict):
        check_base(tiny_llama(), form)
        with pytest.raises(ValueError, match="solved for other weights, those of someone/some-model,"):
            check_base(tiny_llama(seed=1), form)
        with pytest.warns(UserWarning, match="solved for other weights"):
            check_base(tiny_llama(seed=1), form, allow_mismatch=True)
        quantized = tiny_llama()
        quantized.hf_quantizer = object()
        with pytest.warns(UserWarning, match="cannot be told"):
            check_base(quantized, form)
    check_base(tiny_llama(seed=1), StarConfig().to_dict())
    check_base(tiny_llama(seed=1), {})


# the real model


@pytest.mark.slow
def test_gguf_and_its_saved_copy(smollm2_gguf, smollm2_dir):
    from peft_star.loading import load_model

    unpacked, _ = load_model(smollm2_gguf)
    saved = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype="auto")
    half = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16)
    text = fingerprint(unpacked)
    assert text != UNKNOWN
    assert fingerprint(saved) == text
    assert matches(fingerprint(half), text)
    assert not matches(fingerprint(spread(saved, 0.01)), text)
    saved.model.layers[7].mlp.down_proj.weight.data.mul_(1.5)
    assert not matches(fingerprint(saved), text)
