"""A patch as a LoRA for llama.cpp: what is in the file, read back by the gguf package, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file

from peft_star import export_lora
from peft_star.models.structure import find_second_matrices, linear_shape
from peft_star.sharing import gguf_base
from peft_star.sharing.gguf_base import ARCHITECTURES, GGUF_MAGIC
from peft_star.sharing.gguf_lora import patch_to_gguf
from peft_star.sharing.patch_files import write_adapter
from support.byte_llama import build_model
from support.gguf_models import read_tensors, read_values, write_llama
from support.tiny_models import MODELS, tiny_gpt2, tiny_llama


def save_patch(directory: Path, shapes: dict[str, tuple[int, int]], counts=(5, 2, 4), **config) -> dict:
    """Write a patch with as many neurons of each module as `counts` says in turn, and return the deltas (d, m)."""
    torch.manual_seed(0)
    tensors, dense = {}, {}
    for number, (name, (inputs, outputs)) in enumerate(shapes.items()):
        neurons = torch.randperm(inputs)[: counts[number % len(counts)]]
        delta = torch.randn(len(neurons), outputs)
        tensors |= {f"{name}.star_neurons": neurons.int(), f"{name}.star_delta": delta}
        dense[name] = torch.zeros(outputs, inputs)
        dense[name][:, neurons] = delta.T
    directory.mkdir()
    widths = {name: inputs for name, (inputs, _) in shapes.items()}
    write_adapter(directory, {"peft_type": "STAR", "in_features": widths, **config}, tensors)
    return dense


def second_matrices(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {name: linear_shape(module) for name, module in find_second_matrices(model).items()}


def products(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each tensor: B A, times alpha over the rank of the pair unless alpha is 0."""
    alpha, tensors = read_values(path)["adapter.lora.alpha"], read_tensors(path)
    assert {kind for kind, _ in tensors.values()} == {"F32"}
    names = {name.rpartition(".")[0] for name in tensors}
    assert tensors.keys() == {f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")}
    pairs = {name: (tensors[f"{name}.lora_a"][1], tensors[f"{name}.lora_b"][1]) for name in names}
    return {name: (alpha / len(down) if alpha else 1) * (up @ down) for name, (down, up) in pairs.items()}


KINDS = {kind: model for kind, model in MODELS.items() if kind not in ("gptj", "codegen", "gpt_neo", "opt")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_deltas_are_added_to_the_tensors_that_llama_cpp_has(tmp_path, kind):
    model = KINDS[kind].build()
    model.config.save_pretrained(tmp_path / "base")
    dense = save_patch(tmp_path / "patch", second_matrices(model))
    written = patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", tmp_path / "base")
    architecture = ARCHITECTURES[model.config.model_type]
    assert written == {"base": str(tmp_path / "base"), "architecture": architecture, "rank": 5}
    assert read_values(tmp_path / "lora.gguf") == {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 5.0,
    }
    found = products(tmp_path / "lora.gguf")
    assert found.keys() == {f"blk.{number}.ffn_down.weight" for number in range(len(dense))}
    for number, delta in enumerate(dense.values()):
        np.testing.assert_array_equal(found[f"blk.{number}.ffn_down.weight"], delta.numpy())


def test_every_architecture_that_is_known_is_tried():
    tried = {model.build().config.model_type for model in KINDS.values()}
    assert tried | {"gemma3"} == set(ARCHITECTURES)  # the text model of which is tried
    assert set(ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


def test_pairs_are_those_of_the_plain_lora(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "base")
    save_patch(tmp_path / "patch", second_matrices(tiny_llama()))
    patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", tmp_path / "base")
    export_lora(tmp_path / "patch", tmp_path / "lora")
    found = read_tensors(tmp_path / "lora.gguf")
    plain = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(plain) == len(found) == 6
    for name, tensor in plain.items():
        part = name.replace("base_model.model.model.layers.", "blk.").replace("mlp.down_proj", "ffn_down.weight")
        part = part.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")
        np.testing.assert_array_equal(found[part][1], tensor.numpy())


def test_a_gguf_base(tmp_path):
    base = write_llama(tmp_path / "base.gguf", build_model(), "Q8_0")
    dense = save_patch(tmp_path / "patch", second_matrices(build_model()), base_model_name_or_path=str(base))
    written = patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf")
    assert written == {"base": str(base), "architecture": "llama", "rank": 5}
    found = products(tmp_path / "lora.gguf")
    np.testing.assert_array_equal(found["blk.3.ffn_down.weight"], dense["model.layers.3.mlp.down_proj"].numpy())
    # a patch without recorded widths takes the base's
    config = json.loads((tmp_path / "patch" / "adapter_config.json").read_text())
    del config["in_features"]
    (tmp_path / "patch" / "adapter_config.json").write_text(json.dumps(config))
    first = (tmp_path / "lora.gguf").read_bytes()
    patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", overwrite=True)
    assert (tmp_path / "lora.gguf").read_bytes() == first


def test_a_text_model_within_a_model_of_several_modalities(tmp_path):
    text = {key: value for key, value in MODELS["gemma3"].settings.items()}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    config.save_pretrained(tmp_path / "base")
    with torch.device("meta"):
        shapes = second_matrices(transformers.AutoModelForCausalLM.from_config(config))
    save_patch(tmp_path / "patch", shapes)
    assert patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", tmp_path / "base")["architecture"] == "gemma3"
    assert products(tmp_path / "lora.gguf").keys() == {f"blk.{number}.ffn_down.weight" for number in range(3)}


def test_half_precision_deltas_are_widened(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "base")
    name = "model.layers.1.mlp.down_proj"
    (tmp_path / "patch").mkdir()
    delta = torch.randn(2, 16).bfloat16()
    tensors = {f"{name}.star_neurons": torch.tensor([7, 3]), f"{name}.star_delta": delta}
    write_adapter(tmp_path / "patch", {"peft_type": "STAR", "in_features": 40}, tensors)
    patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", tmp_path / "base")
    [product] = products(tmp_path / "lora.gguf").values()
    np.testing.assert_array_equal(product[:, [7, 3]], delta.float().numpy().T)


# bad input


def llama_dir(path: Path) -> Path:
    tiny_llama().config.save_pretrained(path / "base")
    return path / "base"


def attention(path: Path):
    save_patch(path / "patch", {"model.layers.0.self_attn.o_proj": (16, 16)})
    return llama_dir(path)


def attention_of_a_file(path: Path):
    save_patch(path / "patch", {"model.layers.0.self_attn.o_proj": (32, 32)})
    return write_llama(path / "base.gguf", build_model())


def too_deep(path: Path):
    save_patch(path / "patch", {"model.layers.3.mlp.down_proj": (40, 16)})
    return llama_dir(path)


def too_deep_for_a_file(path: Path):
    save_patch(path / "patch", {"model.layers.4.mlp.down_proj": (96, 32)})
    return write_llama(path / "base.gguf", build_model())


def experts(path: Path):
    save_patch(path / "patch", {"model.layers.0.mlp.experts": (40, 16)}, in_features=[4, 10])
    return llama_dir(path)


def whole_modules(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()), modules_to_save=["lm_head"])
    return llama_dir(path)


def other_width(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama(intermediate_size=48)))
    return llama_dir(path)


def other_outputs(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()))
    tiny_llama(hidden_size=32).config.save_pretrained(path / "base")
    return path / "base"


def other_architecture(path: Path):
    # of the same shapes
    tiny_gpt2().config.save_pretrained(path / "own")
    save_patch(path / "patch", second_matrices(tiny_gpt2()), base_model_name_or_path=str(path / "own"))
    return write_llama(path / "base.gguf", build_model(hidden_size=16, intermediate_size=40, num_hidden_layers=3))


def other_names(path: Path):
    save_patch(path / "patch", second_matrices(tiny_gpt2()))
    return llama_dir(path)


def unknown_architecture(path: Path):
    save_patch(path / "patch", second_matrices(MODELS["codegen"].build()))
    MODELS["codegen"].build().config.save_pretrained(path / "base")
    return path / "base"


def unknown_architecture_of_a_file(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()))
    writer = gguf.GGUFWriter(path / "base.gguf", "codegen")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "base.gguf"


def adapter(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()))
    patch_to_gguf(path / "patch", path / "adapter.gguf", llama_dir(path))
    return path / "adapter.gguf"


def part_of_a_model(path: Path):
    save_patch(path / "patch", second_matrices(build_model()))
    return write_llama(path / "base.gguf", build_model(), split__count=2)


def no_gguf(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()))
    (path / "base.gguf").write_text("something")
    return path / "base.gguf"


def cut_off(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()))
    (path / "base.gguf").write_bytes(write_llama(path / "whole.gguf", build_model()).read_bytes()[:3000])
    return path / "base.gguf"


def no_base(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()))


def missing(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()), base_model_name_or_path=str(path / "gone.gguf"))


def no_config(path: Path):
    save_patch(path / "patch", second_matrices(tiny_llama()))
    (path / "base").mkdir()
    return path / "base"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (attention, "o_proj is not the second matrix of an FFN of .*, a llama model of 3 layers; nothing else"),
        (attention_of_a_file, "o_proj is not the second matrix of an FFN of .*base.gguf, a llama model of 4 layers"),
        (too_deep, "layers.3.mlp.down_proj is not the second matrix of an FFN"),
        (too_deep_for_a_file, "layers.4.mlp.down_proj is not the second matrix of an FFN"),
        (experts, "neurons of routed experts .*merge the patch"),
        (whole_modules, "also holds whole modules"),
        (other_width, "does not fit .*base: model.layers.0.mlp.down_proj has 40 neurons there and 48 in the patch"),
        (other_outputs, "does not fit .*base: The delta of model.layers.0.mlp.down_proj should have the shape"),
        (other_architecture, r"a model of another architecture \(gpt2\) than .*base.gguf \(llama\)"),
        (other_names, "c_proj is not the second matrix of an FFN"),
        (unknown_architecture, r"What llama.cpp makes of a codegen model \(.*base\) is not known here"),
        (unknown_architecture_of_a_file, "is a codegen model, of which the installed gguf package knows nothing"),
        (adapter, "holds an adapter, not a model"),
        (part_of_a_model, "is one of several files; join them first"),
        (no_gguf, "is not a GGUF file"),
        (cut_off, "base.gguf is damaged"),
        (no_base, "does not say which base model it is for"),
        (missing, "There is no model at .*gone.gguf"),
        (no_config, "has no configuration that can be read"),
    ],
)
def test_what_is_refused(tmp_path, build, message):
    base = build(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        patch_to_gguf(tmp_path / "patch", tmp_path / "out.gguf", base)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_base_on_the_hub_is_asked_for_its_configuration_alone(tmp_path, monkeypatch):
    save_patch(tmp_path / "patch", second_matrices(tiny_llama()), base_model_name_or_path="you/model", revision="v2")
    asked = []

    def download(*args, **kwargs):
        asked.append((*args, kwargs))
        return str(llama_dir(tmp_path) / "config.json")

    monkeypatch.setattr(gguf_base, "hf_hub_download", download)
    assert patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", token="secret")["base"] == "you/model"
    assert asked == [("you/model", "config.json", {"revision": "v2", "token": "secret"})]

    def refuse(*args, **kwargs):
        raise OfflineModeIsEnabled("many\nlines")

    monkeypatch.setattr(gguf_base, "hf_hub_download", refuse)
    with pytest.raises(OSError, match="no local model you/model, and the Hub is switched off"):
        patch_to_gguf(tmp_path / "patch", tmp_path / "other.gguf")


def test_without_the_package(tmp_path, monkeypatch):
    save_patch(tmp_path / "patch", second_matrices(tiny_llama()))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs the gguf package: pip install 'peft_star\[gguf\]'"):
        patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", llama_dir(tmp_path))


def test_what_is_replaced(tmp_path):
    base = write_llama(tmp_path / "base.gguf", build_model())
    save_patch(tmp_path / "patch", second_matrices(build_model()))
    out = tmp_path / "lora.gguf"
    patch_to_gguf(tmp_path / "patch", out, base)
    with pytest.raises(ValueError, match="is there already"):
        patch_to_gguf(tmp_path / "patch", out, base)
    patch_to_gguf(tmp_path / "patch", out, base, overwrite=True)

    model = write_llama(tmp_path / "model.gguf", build_model())
    (tmp_path / "text.gguf").write_text("a text")
    (tmp_path / "magic.gguf").write_bytes(GGUF_MAGIC)
    (tmp_path / "directory.gguf").mkdir()
    for path, message in (
        (model, "holds no adapter, so --overwrite does not replace it"),
        (base, "is the input"),
        (tmp_path / "text.gguf", "is another kind of file"),
        (tmp_path / "magic.gguf", "is damaged"),
        (tmp_path / "directory.gguf", "is a directory"),
        (tmp_path / "lora", "a name that ends with .gguf"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_to_gguf(tmp_path / "patch", path, base, overwrite=True)
    assert model.read_bytes() == base.read_bytes()


def test_nothing_is_left_of_a_failed_export(tmp_path, monkeypatch):
    base = llama_dir(tmp_path)
    save_patch(tmp_path / "patch", second_matrices(tiny_llama()))
    patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", base)
    before = (tmp_path / "lora.gguf").read_bytes()

    def fail(self) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        patch_to_gguf(tmp_path / "patch", tmp_path / "lora.gguf", base, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora.gguf", "patch"]
    assert (tmp_path / "lora.gguf").read_bytes() == before
