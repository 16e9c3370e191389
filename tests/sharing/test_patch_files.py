"""Patches as files: what is read is what was saved, and nothing damaged passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_star import StarConfig, loading
from peft_star.sharing.patch_files import Patch, checksum, patch_folders, read_patch_modules, write_adapter
from peft_star.tuner.layer import star_layers
from support.tiny_models import MODELS, tiny_llama

NAMES = MODELS["llama"].names
WIDTH, HEIGHT = MODELS["llama"].width


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), StarConfig(task_type="CAUSAL_LM", num_neurons=3, init_weights=False))


@pytest.fixture
def directory(model: torch.nn.Module, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "patch")
    return tmp_path / "patch"


def test_a_patch_is_read_as_it_was_saved(model: torch.nn.Module, directory: Path) -> None:
    patch = Patch.read(directory)
    assert patch.config == json.loads((directory / "adapter_config.json").read_text()) and patch.others == ()
    assert list(patch.neurons) == list(patch.deltas) == NAMES
    for name, layer in star_layers(model.get_base_model()).items():
        assert torch.equal(patch.neurons[name], layer.star_neurons["default"])
        assert torch.equal(patch.deltas[name], layer.star_delta["default"])
    summary = patch.summary()
    assert (summary, []) == read_patch_modules(directory) == loading.read_patch_modules(directory)
    assert [item["name"] for item in summary] == NAMES and summary[0]["outputs"] == HEIGHT
    assert summary[0]["norm"] == pytest.approx(float(patch.deltas[NAMES[0]].norm()))


def test_names_without_the_prefix_are_the_same_patch(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    expected = Patch.read(directory)
    save_file({key.removeprefix("base_model.model."): tensor for key, tensor in load_file(path).items()}, path)
    assert Patch.read(directory).summary() == expected.summary()


def with_config(directory: Path, **values: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_other_tensors_are_named_by_the_configuration_or_refused(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
    with_config(directory, tensors_sha256=None)
    with pytest.raises(ValueError, match="holds base_model.model.lm_head.weight, which its configuration does not"):
        Patch.read(directory)
    with_config(directory, modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="does not name"):
        read_patch_modules(directory)
    with_config(directory, modules_to_save=["lm_head"])
    assert Patch.read(directory).others == ("base_model.model.lm_head.weight",)


def test_the_checksum_is_one_of_names_types_shapes_and_values() -> None:
    tensors = {"base_model.model.b": torch.arange(4, dtype=torch.int32), "a": torch.ones(2, 2)}
    same = {"a": torch.ones(2, 2), "b": torch.arange(8, dtype=torch.int32).view(4, 2).T[0] // 2}
    assert checksum(tensors) == checksum(same) and len(checksum(tensors)) == 64
    others = [
        {**same, "a": torch.ones(4)},
        {**same, "a": torch.ones(2, 2).view(torch.int32)},
        {**same, "a": torch.ones(2, 2) * (1 + 2**-23)},
        {"a": same["a"]},
        {"a": same["a"], "c": same["b"]},
    ]
    assert len({checksum(item) for item in [same, *others]}) == 6
    assert len(checksum({"a": torch.tensor(1.0, dtype=torch.bfloat16)})) == 64


def test_layers_come_in_order_of_depth(tmp_path: Path) -> None:
    tensors = {}
    for index in (10, 9, 0):
        tensors[f"layers.{index}.down.star_neurons"] = torch.tensor([1])
        tensors[f"layers.{index}.down.star_delta"] = torch.ones(1, 2)
    write_adapter(tmp_path, {"peft_type": "STAR"}, tensors)
    assert list(Patch.read(tmp_path).neurons) == ["layers.0.down", "layers.9.down", "layers.10.down"]


def test_a_patch_is_held_against_its_modules(directory: Path) -> None:
    patch = Patch.read(directory)
    shapes = dict.fromkeys([*NAMES, "another"], (WIDTH, HEIGHT))
    wide = Patch(patch.config, {name: neurons.long() for name, neurons in patch.neurons.items()}, patch.deltas)
    checked = wide.check(shapes)
    assert all(torch.equal(checked.neurons[name], patch.neurons[name]) for name in NAMES)
    assert {neurons.dtype for neurons in checked.neurons.values()} == {torch.int32}
    with pytest.raises(ValueError, match=rf"neurons of here {NAMES[1]} should be in \[0, 2\)"):
        patch.check({**shapes, NAMES[1]: (2, HEIGHT)}, "here ")
    with pytest.raises(ValueError, match=rf"delta of {NAMES[1]} should have the shape \(3, 5\)"):
        patch.check({**shapes, NAMES[1]: (WIDTH, 5)})


def test_where_patches_lie(directory: Path, tmp_path: Path) -> None:
    assert patch_folders(directory) == [directory]
    assert patch_folders(tmp_path) == [directory]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert patch_folders(tmp_path) == [directory]
    assert patch_folders(tmp_path / "other") == [tmp_path / "other"]  # what is wrong with it is said by who reads it
