"""Promises of PEFT to its users that belong to no one room: gradients by name, k-bit preparation, Auto classes."""

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

import peft_star  # noqa: F401  (registers the method)
from peft_star import StarConfig
from support.tiny_models import MODELS

IDS = torch.arange(3, 20)[None]


def star(**config):
    return get_peft_model(MODELS["llama"].build(), StarConfig(task_type="CAUSAL_LM", num_neurons=4, **config))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_set_requires_grad_by_adapter():
    model = star()
    model.add_adapter("other", StarConfig(num_neurons=4))
    first = {name for name, _ in model.named_parameters() if ".star_delta.default" in name}
    second = {name for name, _ in model.named_parameters() if ".star_delta.other" in name}
    assert trainable(model) == first and second
    model.set_requires_grad("other")
    assert trainable(model) == first | second
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert not trainable(model)


def test_k_bit_preparation_leaves_only_the_deltas_trainable():
    base = prepare_model_for_kbit_training(MODELS["llama"].build())
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=4))
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all("star_delta" in name for name in trainable(model))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_transformers_loads_a_patch_and_its_base_by_the_patchs_name(tmp_path):
    MODELS["llama"].build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=4, init_weights=False))
    model.save_pretrained(tmp_path / "patch")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patch")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
