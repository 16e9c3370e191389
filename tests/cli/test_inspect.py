"""`peft-star inspect`: what it shows, and one sentence for what is no patch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.command_line import Run, is_one_sentence


def test_inspect_shows_layers_and_report(run: Run, patch: Path, tiny_dir: Path) -> None:
    result = run("inspect", patch)
    assert (result.code, result.out) == (0, "")
    assert "down_proj" in result.err
    assert "2 of 2" in result.err
    result = run("inspect", patch, "--json")
    assert result.err == ""
    assert result.json["base_model"] == str(tiny_dir)
    assert result.json["neurons"] == 32
    assert result.json["parameters"] == 32 * 32
    assert result.json["report"]["summary"]["success"] is True
    assert result.json["config"]["peft_type"] == "STAR"
    module = result.json["modules"][0]
    assert set(module) == {"name", "neurons", "outputs", "norm", "max"}


def test_inspect_needs_no_report(run: Run, patch: Path, tmp_path: Path) -> None:
    copy = tmp_path / "patch"
    shutil.copytree(patch, copy)
    (copy / "repair_report.json").unlink()
    assert "No repair report" in run("inspect", copy).err
    assert run("inspect", copy, "--json").json["report"] is None


@pytest.mark.parametrize("broken", ["adapter_config.json", "adapter_model.safetensors", "repair_report.json"])
def test_inspect_of_broken_files_is_2(run: Run, patch: Path, tmp_path: Path, broken: str) -> None:
    copy = tmp_path / "patch"
    shutil.copytree(patch, copy)
    (copy / broken).write_text('{"peft_type')
    result = run("inspect", copy, "--json")
    assert result.code == 2
    assert is_one_sentence(result), result.err


def test_inspect_of_what_is_no_patch_is_2(run: Run, tiny_dir: Path, tmp_path: Path) -> None:
    for patch in (tiny_dir, tmp_path, tiny_dir / "config.json", "./nowhere"):
        result = run("inspect", patch)
        assert result.code == 2
        assert is_one_sentence(result), result.err
