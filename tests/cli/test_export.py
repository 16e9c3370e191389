"""`peft-star export`: what it writes, and one sentence for every bad input."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_star import StarConfig
from support.byte_llama import build_model
from support.command_line import Run


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


def bad_form(patch: Path, tmp_path: Path) -> list:
    return [patch, "-o", tmp_path / "out", "--to", "gguf"]


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
        (bad_form, "--to is 'gguf'; the forms are: lora."),
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
    assert not (tmp_path / "out").exists()
