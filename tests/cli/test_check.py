"""`peft-star check`: exit code 0 while everything is as it was, 1 with a table when not."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft_star.sharing.recorded import Recorded, write_recorded
from support.command_line import Run, is_one_sentence


def test_a_patch_that_holds_is_0(run: Run, tiny_dir: Path, twice: Path) -> None:
    result = run("check", tiny_dir, twice)
    assert (result.code, result.out) == (0, "")
    assert "0 of 2 rows regressed (0 of 2 failures), of 2 repairs" in result.err
    data = run("check", tiny_dir, twice, "--json")
    assert data.code == 0 and data.err == "" and data.json["summary"]["ok"]
    assert all(row["generated_now"] for row in data.json["rows"])
    data = run("check", tiny_dir, twice, "--json", "--no-generate")
    assert all(row["generated_now"] is None for row in data.json["rows"])


def damaged(patch: Path, directory: Path) -> Path:
    """The patch with deltas of half their size, and the ledger as it was."""
    found = Recorded.read(patch)
    directory.mkdir()
    tensors = {name: tensor if tensor.dim() == 1 else -tensor for name, tensor in found.tensors().items()}
    write_recorded(directory, found.patch.config, tensors, found.ledger)
    return directory


def test_a_patch_that_does_not_is_1_with_a_table(run: Run, tiny_dir: Path, twice: Path, tmp_path: Path) -> None:
    broken = damaged(twice, tmp_path / "broken")
    result = run("check", tiny_dir, broken)
    assert result.code == 1 and result.out == ""
    assert "Regressed" in result.err and "2 of 2 rows regressed" in result.err and "a·b" not in result.err
    data = run("check", tiny_dir, broken, "--json")
    assert data.code == 1 and data.json["summary"]["failures_regressed"] == 2


def test_what_cannot_be_checked_is_2(run: Run, tiny_dir: Path, twice: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(twice, tmp_path / "copy"))
    for name in ("repair_ledger.json", "repair_ledger.safetensors"):
        (copy / name).unlink()
    result = run("check", tiny_dir, copy)
    assert result.code == 2 and is_one_sentence(result) and "has no ledger with a repair in it" in result.err
    for args in ((tiny_dir, "./nowhere"), ("./nowhere", twice)):
        result = run("check", *args, "--json")
        assert result.code == 2 and is_one_sentence(result), result.err
