"""`peft-star revert`: one repair out, the others looked at where the base model is at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from peft_star import log
from support.command_line import Run, is_one_sentence, names


@pytest.fixture
def copy(twice: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(twice, tmp_path / "copy"))


def test_the_base_that_the_patch_names_is_asked(run: Run, tiny_dir: Path, twice: Path, tmp_path: Path) -> None:
    first = log(twice).entries[0]
    target = tmp_path / "out"
    result = run("revert", twice, "1", "-o", target)
    assert (result.code, result.out) == (0, ""), result.err
    assert f"Took out {first.id}" in result.err and "fail again: 2 of 2" in result.err
    assert [entry.stands for entry in log(target).entries] == [False, True]
    assert run("check", tiny_dir, target).code == 0
    assert [entry.stands for entry in log(twice).entries] == [True, True]


def test_without_a_base_nobody_has_looked(run: Run, copy: Path, tmp_path: Path) -> None:
    result = run("revert", copy, "2", "-o", tmp_path / "out", "--no-base")
    assert result.code == 0 and "Nobody has looked at the other repairs" in result.err
    # nor where the one that it names is not on this machine
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "somebody/model"}))
    data = run("revert", copy, "2", "-o", tmp_path / "again", "--json")
    assert data.code == 0 and data.json["base"] is None and data.json["report"] is None
    assert data.json["entry"] == log(copy).entries[1].id


def test_in_place_by_default(run: Run, tiny_dir: Path, copy: Path) -> None:
    result = run("revert", copy, log(copy).entries[1].id[:6], "--base", tiny_dir, "--json")
    assert result.code == 0 and result.json["output"] == str(copy)
    assert result.json["report"]["fail_again"] == result.json["report"]["failures"] > 0
    assert [entry.stands for entry in log(copy).entries] == [True, False]
    assert names(copy) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "repair_ledger.json",
        "repair_ledger.safetensors",
    ]
    again = run("revert", copy, "2")
    assert again.code == 2 and is_one_sentence(again) and "was taken out already" in again.err


def test_what_cannot_be_reverted_is_2(run: Run, tiny_dir: Path, twice: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for args in (
        (twice, "9", "-o", tmp_path / "x"),
        (twice, "1", "-o", tmp_path / "full"),
        (twice, "1", "-o", tmp_path / "x", "--base", tiny_dir, "--no-base"),
        (twice, "1", "-o", tmp_path / "x", "--base", "./nowhere"),
        (tiny_dir, "1", "-o", tmp_path / "x"),
    ):
        result = run("revert", *args)
        assert result.code == 2, result.err
        assert result.err.splitlines()[-1].startswith("Error: ") and "Traceback" not in result.err
    assert not (tmp_path / "x").exists()
