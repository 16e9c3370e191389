"""`peft-star diff`: how two patches differ."""

from __future__ import annotations

from pathlib import Path

from peft_star import log
from support.command_line import Run, is_one_sentence


def test_diff_shows_entries_and_layers(run: Run, patch: Path, twice: Path) -> None:
    second = log(twice).entries[1]
    result = run("diff", patch, twice)
    assert (result.code, result.out) == (0, "")
    assert f"Only in {twice}: {second.id}" in result.err.replace("\n", "") and "the second" in result.err
    assert "Repairs in both: 1" in result.err and "down_proj" in result.err
    data = run("diff", patch, twice, "--json").json
    assert data["same"] is False and [entry["id"] for entry in data["only_b"]] == [second.id] and data["only_a"] == []


def test_the_same_patch_is_the_same(run: Run, twice: Path, tiny_dir: Path) -> None:
    assert "Both compute the same." in run("diff", twice, twice).err
    result = run("diff", twice, tiny_dir)
    assert result.code == 2 and is_one_sentence(result), result.err
