"""`peft-star stack`: two patches as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_star import diff, log
from support.command_line import SOLVABLE, Run, is_one_sentence


@pytest.fixture
def other(run: Run, tiny_dir: Path, write_rows, tmp_path: Path) -> Path:
    rows = write_rows("other.jsonl", ("12", "34"))
    assert run("repair", tiny_dir, rows, "-o", tmp_path / "other", *SOLVABLE).code == 0
    return tmp_path / "other"


def test_stack_writes_a_patch_with_both_ledgers(run: Run, twice: Path, other: Path, tmp_path: Path) -> None:
    target = tmp_path / "stack"
    result = run("stack", twice, other, "-o", target)
    assert (result.code, result.out) == (0, "") and "Patch saved to" in result.err and "cosine" in result.err
    parts = {entry.id for path in (twice, other) for entry in log(path).entries}
    assert {entry.id for entry in log(target).entries} == parts
    again = run("stack", twice, other, "-o", target)
    assert again.code == 2 and is_one_sentence(again)
    data = run("stack", twice, other, "-o", target, "--overwrite", "--json").json
    assert data["patch"] == str(target) and data["layers"][0]["shared"] >= 0
    assert data["apart"] == sum(layer["apart"] for layer in data["layers"])


def test_a_patch_on_top_of_itself_is_itself(run: Run, patch: Path, twice: Path, tmp_path: Path) -> None:
    assert run("stack", patch, twice, "-o", tmp_path / "stack").code == 0
    assert diff(tmp_path / "stack", twice).same
