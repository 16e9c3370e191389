"""`peft-star merge`: a plain model that says what the patched one says, and patches that are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_star import StarConfig
from peft_star.loading import load_model
from support.byte_llama import build_model, build_tokenizer
from support.command_line import SOLVABLE, Run, names
from support.gguf_models import read_tensors, write_llama


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_merge_writes_a_plain_model(run: Run, tiny_dir: Path, patch: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    result = run("merge", tiny_dir, patch, "-o", target)
    assert (result.code, result.out) == (0, ""), result.err
    merged = AutoModelForCausalLM.from_pretrained(target)
    patched = PeftModel.from_pretrained(build_model(), patch)
    torch.testing.assert_close(logits(merged), logits(patched))
    assert not torch.allclose(logits(merged), logits(build_model()))
    assert AutoTokenizer.from_pretrained(target)("abc")["input_ids"] == build_tokenizer()("abc")["input_ids"]
    assert not any("star" in name for name in merged.state_dict())
    assert "adapter_config.json" not in names(target)


def test_merged_models_load_without_this_package(tiny_dir: Path, patch: Path, tmp_path: Path, run) -> None:
    assert run("merge", tiny_dir, patch, "-o", tmp_path / "merged").code == 0
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "output = model.generate(**tokenizer('a b', return_tensors='pt'), max_new_tokens=2, do_sample=False)\n"
        "assert 'peft_star' not in sys.modules\n"
        "print(tokenizer.decode(output[0]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "merged")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "a bcd\n", result.stderr


def test_merge_of_several_patches_adds_them_up(
    run: Run, tiny_dir: Path, patch: Path, failures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert run("repair", tiny_dir, failures, "-o", other, "--layers", "all", *SOLVABLE).code == 0
    result = run("merge", tiny_dir, patch, other, "-o", tmp_path / "merged", "--json")
    assert result.code == 0
    assert result.err == ""
    assert result.json["patches"] == [str(patch), str(other)]
    both = PeftModel.from_pretrained(build_model(), patch).merge_and_unload()
    both = PeftModel.from_pretrained(both, other)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(both))


def test_merge_into_a_gguf_file(run: Run, tiny_dir: Path, patch: Path, tmp_path: Path) -> None:
    base, target = write_llama(tmp_path / "base.gguf", build_model()), tmp_path / "merged.gguf"
    result = run("merge", base, patch, "-o", target, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["bytes"] == target.stat().st_size
    merged, tokenizer = load_model(target)
    torch.testing.assert_close(logits(merged), logits(PeftModel.from_pretrained(build_model(), patch)))
    assert tokenizer("abc")["input_ids"] == build_tokenizer()("abc")["input_ids"]

    assert "is there already" in run("merge", base, patch, "-o", target).err
    assert run("merge", base, patch, "-o", target, "--overwrite", "--dtype", "bfloat16").code == 0
    kinds = {name: kind for name, (kind, _) in read_tensors(target).items()}
    assert "BF16" in kinds.values()
    assert {name.split(".")[2] for name, kind in kinds.items() if kind == "BF16"} == {"ffn_down"}


def test_merge_into_a_gguf_file_refuses_what_does_not_fit(
    run: Run, tiny_dir: Path, patch: Path, tmp_path: Path
) -> None:
    base = write_llama(tmp_path / "base.gguf", build_model())
    narrow = write_llama(tmp_path / "narrow.gguf", build_model(intermediate_size=64))
    other = write_llama(tmp_path / "other.gguf", build_model(seed=1))
    for model, target, message in (
        (tiny_dir, "out.gguf", "can only be made of the base model's .gguf file"),
        (narrow, "out.gguf", "has 64 neurons there and 96 in the patch"),
        (other, "out.gguf", "solved for other weights"),
        (base, "base.gguf", "is the input"),
    ):
        result = run("merge", model, patch, "-o", tmp_path / target, "--overwrite")
        assert result.code == 2 and message in result.err, result.err
    assert names(tmp_path) == ["base.gguf", "narrow.gguf", "other.gguf"]
    assert run("merge", other, patch, "-o", tmp_path / "out.gguf", "--allow-other-base").code == 0


def test_merge_refuses_what_does_not_fit(run: Run, tiny_dir: Path, patch: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    build_model(hidden_size=16).save_pretrained(narrow)
    build_tokenizer().save_pretrained(narrow)
    lora = tmp_path / "lora"
    get_peft_model(build_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])).save_pretrained(
        lora
    )
    for model, patches, message in (
        (narrow, [patch], "does not fit this model"),
        (tiny_dir, [lora], "adapter of type LORA"),
        (tiny_dir, [patch, lora], "adapter of type LORA"),
        (tiny_dir, [tiny_dir], "holds a model"),
        (tiny_dir, ["./nowhere"], "There is no patch at"),
        ("./nowhere", [patch], "There is no model at"),
    ):
        result = run("merge", model, *patches, "-o", tmp_path / "merged")
        assert result.code == 2
        assert message in result.err
        assert "Traceback" not in result.err
        assert names(tmp_path) == ["lora", "narrow"]


def test_merge_does_not_replace_its_own_base(run: Run, tiny_dir: Path, patch: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    result = run("merge", base, patch, "-o", base, "--overwrite")
    assert result.code == 2
    assert "is or holds the input" in result.err


def test_merge_works_for_a_gguf_base(run: Run, smollm2_gguf: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=4, layers_to_transform=[3]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "star_delta" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "patch")
    expected = logits(model.eval())
    result = run("merge", smollm2_gguf, tmp_path / "patch", "-o", tmp_path / "merged")
    assert result.code == 0, result.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(smollm2_dir)), expected, atol=0.1)


def test_merge_refuses_a_patch_of_other_weights_unless_told(
    run: Run, patch: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    build_model(seed=1).save_pretrained(tmp_path / "other")
    build_tokenizer().save_pretrained(tmp_path / "other")
    refused = run("merge", tmp_path / "other", patch, "-o", tmp_path / "merged")
    assert refused.code == 2 and "solved for other weights" in refused.err and "--allow-other-base" in refused.err
    assert not (tmp_path / "merged").exists()
    with pytest.warns(UserWarning, match="other weights"):
        told = run("merge", tmp_path / "other", patch, "-o", tmp_path / "merged", "--allow-other-base")
    assert told.code == 0
    assert run("merge", tiny_dir, patch, patch, "-o", tmp_path / "right").code == 0
