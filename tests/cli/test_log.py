"""`peft-star log`: the repairs that made a patch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from peft_star.sharing.changes import norm
from peft_star.sharing.recorded import Recorded, write_recorded
from support.command_line import Run, is_one_sentence
from support.ledgers import grown


def test_log_shows_each_repair(run: Run, twice: Path) -> None:
    result = run("log", twice)
    assert (result.code, result.out) == (0, "")
    found = Recorded.read(twice).ledger
    for number, entry in enumerate(found.entries, start=1):
        assert f"{number}  {entry.id}  {entry.time[:16].replace('T', ' ')}  " in result.err
    assert "2 of 2" in result.err and "second" in result.err and "norm ▁" not in result.err
    assert "norm " in result.err and "->" in result.err  # the curve
    rows = run("log", twice, "--rows").err
    assert "a b" in rows and "failures" in rows
    data = run("log", twice, "--json")
    assert data.err == ""
    assert [entry["id"] for entry in data.json["entries"]] == [entry.id for entry in found.entries]
    assert data.json["curves"][0]["measure"] == "norm" and len(data.json["curves"][0]["values"]) == 2
    assert data.json["unaccounted"] < 1e-5 and data.json["warnings"] == []


def test_a_patch_without_a_ledger_says_so(run: Run, twice: Path, tmp_path: Path) -> None:
    copy = bare(twice, tmp_path)
    result = run("log", copy)
    assert result.code == 0 and "has no ledger" in result.err
    assert run("log", copy, "--json").json["entries"] == []


def bare(patch: Path, tmp_path: Path) -> Path:
    """The patch as an earlier version has written it."""
    copy = Path(shutil.copytree(patch, tmp_path / "bare"))
    (copy / "repair_ledger.json").unlink()
    (copy / "repair_ledger.safetensors").unlink()
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["ledger_sha256"], config["scope"]
    path.write_text(json.dumps(config))
    return copy


def test_a_patch_that_grows_out_of_line_is_told(run: Run, twice: Path, tmp_path: Path) -> None:
    found = Recorded.read(twice)
    ledger = grown("kl", [0.01 * n for n in range(1, 9)] + [0.2, 0.4, 0.8])
    write_recorded(tmp_path, found.patch.config, found.tensors(), ledger)
    result = run("log", tmp_path)
    assert "Warning: The kl of the patch grew" in result.err and "times as fast as its load" in result.err
    # these entries do not make up this patch
    assert norm(found.deltas) and "is no entry's: it was changed outside of a repair" in result.err
    assert len(run("log", tmp_path, "--json").json["warnings"]) == 1


def test_what_a_ledger_says_cannot_move_the_terminal(run: Run, twice: Path, tmp_path: Path) -> None:
    evil = "\x1b[2Jgone\u202e[bold]"
    found = Recorded.read(twice)
    ledger = grown(evil, [0.1, 0.2])
    evils = {"note": evil, "time": evil, "summary": {"solved": evil, "failures": evil}}
    ledger = ledger.replaced(replace(ledger.entries[0], **evils))
    write_recorded(tmp_path, found.patch.config, found.tensors(), ledger)
    result = run("log", tmp_path, "--rows")
    assert result.code == 0 and "gone" in result.err
    assert not {"\x1b", "\u202e"} & set(result.err)


def test_what_is_no_patch_is_2(run: Run, twice: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(twice, tmp_path / "copy"))
    (copy / "repair_ledger.json").write_text("{}")
    for patch in (copy, tmp_path, "./nowhere"):
        result = run("log", patch)
        assert result.code == 2 and is_one_sentence(result), result.err
