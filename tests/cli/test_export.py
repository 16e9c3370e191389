"""`peft-star export`: what it writes, and one sentence for every bad input."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from peft_star import StarConfig
from support.byte_llama import build_model
from support.command_line import Run
from support.gguf_models import read_values, write_llama


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(build_model(), StarConfig(task_type="CAUSAL_LM", num_neurons=6, init_weights=False))
    model.save_pretrained(tmp_path / "patch")
    return tmp_path / "patch"


@pytest.fixture
def run(run: Run) -> Run:
    """Run this command."""
    return functools.partial(run, "export")


def test_export(run, patch, tmp_path):
    code, out, err = run(patch, "-o", tmp_path / "lora", "--to", "lora")
    assert (code, out) == (0, "")
    assert "Exported a LoRA of rank 6" in err
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 6)
    ids = torch.arange(3, 20)[None]
    logits = [PeftModel.from_pretrained(build_model(), path).eval()(ids).logits for path in (patch, tmp_path / "lora")]
    torch.testing.assert_close(*logits)
    # nothing is left beside the two directories
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "patch"]


def test_json(run, patch, tmp_path):
    code, out, err = run(patch, "-o", tmp_path / "lora", "--json")
    assert (code, err) == (0, "")
    size = sum(path.stat().st_size for path in (tmp_path / "lora").iterdir())
    expected = {"patch": str(patch), "to": "lora", "output": str(tmp_path / "lora"), "rank": 6, "bytes": size}
    assert json.loads(out) == expected


def test_into_the_patch(run, patch):
    assert run(patch, "-o", patch / "lora")[0] == 0
    assert (patch / "lora" / "adapter_model.safetensors").is_file()
    assert "star_neurons" in " ".join(load_file(patch / "adapter_model.safetensors"))


def test_overwrite(run, patch, tmp_path):
    assert run(patch, "-o", tmp_path / "lora")[0] == 0
    code, out, err = run(patch, "-o", tmp_path / "lora")
    assert (code, out) == (2, "") and "is not empty; give --overwrite" in err
    assert run(patch, "-o", tmp_path / "lora", "--overwrite")[0] == 0


def test_for_llama_cpp(run, patch, tmp_path):
    base = write_llama(tmp_path / "base.gguf", build_model())
    code, out, err = run(patch, "-o", tmp_path / "lora.gguf", "--to", "gguf", "--base", base)
    assert (code, out) == (0, "")
    assert f"Exported a LoRA of rank 6: {tmp_path / 'lora.gguf'}" in err
    assert read_values(tmp_path / "lora.gguf")["adapter.lora.alpha"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "lora.gguf", "patch"]

    arguments = [patch, "-o", tmp_path / "lora.gguf", "--to", "gguf", "--base", base, "--json"]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and "is there already; give --overwrite to replace it" in err
    code, out, err = run(*arguments, "--overwrite")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "patch": str(patch),
        "to": "gguf",
        "output": str(tmp_path / "lora.gguf"),
        "base": str(base),
        "architecture": "llama",
        "rank": 6,
        "bytes": (tmp_path / "lora.gguf").stat().st_size,
    }


def test_for_llama_cpp_with_the_base_that_the_patch_names(run, tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, StarConfig(task_type="CAUSAL_LM", num_neurons=6)).save_pretrained(tmp_path / "patch")
    code, out, _ = run(tmp_path / "patch", "-o", tmp_path / "lora.gguf", "--to", "gguf", "--json")
    assert (code, json.loads(out)["base"]) == (0, str(tmp_path / "base"))


def bad_form(patch: Path, tmp_path: Path) -> list:
    return [patch, "-o", tmp_path / "out", "--to", "onnx"]


def no_base(patch: Path, tmp_path: Path) -> list:
    return [patch, "-o", tmp_path / "out.gguf", "--to", "gguf"]


def useless_base(patch: Path, tmp_path: Path) -> list:
    return [patch, "-o", tmp_path / "out", "--base", tmp_path]


def no_gguf_name(patch: Path, tmp_path: Path) -> list:
    return [patch, "-o", tmp_path / "out", "--to", "gguf", "--base", tmp_path]


def base_itself(patch: Path, tmp_path: Path) -> list:
    base = write_llama(tmp_path / "base.gguf", build_model())
    return [patch, "-o", base, "--to", "gguf", "--base", base, "--overwrite"]


def missing(patch: Path, tmp_path: Path) -> list:
    return [tmp_path / "nothing", "-o", tmp_path / "out"]


def no_star(patch: Path, tmp_path: Path) -> list:
    get_peft_model(build_model(), LoraConfig(target_modules=["down_proj"])).save_pretrained(tmp_path / "other")
    return [tmp_path / "other", "-o", tmp_path / "out"]


def itself(patch: Path, tmp_path: Path) -> list:
    return [patch, "-o", patch, "--overwrite"]


def damaged(patch: Path, tmp_path: Path) -> list:
    (patch / "adapter_model.safetensors").write_bytes(b"12345678")
    return [patch, "-o", tmp_path / "out"]


def old(patch: Path, tmp_path: Path) -> list:
    config = json.loads((patch / "adapter_config.json").read_text())
    del config["in_features"]
    (patch / "adapter_config.json").write_text(json.dumps(config))
    return [patch, "-o", tmp_path / "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad_form, "--to is 'onnx'; the forms are: lora, gguf."),
        (no_base, "does not say which base model it is for; give that, too (--base)"),
        (useless_base, "--base is of use with --to gguf alone"),
        (no_gguf_name, "give the output a name that ends with .gguf"),
        (base_itself, "is the input"),
        (missing, "There is no patch at"),
        (no_star, "adapter of type LORA, not a STAR patch"),
        (itself, "is or holds the input"),
        (damaged, "damaged"),
        (old, "does not record how wide the patched modules are"),
    ],
)
def test_bad_input(run, patch, tmp_path, arguments, message):
    code, out, err = run(*arguments(patch, tmp_path))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("Error: ") and err.count("Error:") == 1 and "Traceback" not in err
    assert message in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.gguf").exists()
