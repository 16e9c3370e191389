"""`peft-star inspect`: what it shows, and one sentence for what is no patch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


EVIL = "\x1b[2Jgone\x9b1A\u202ereversed[bold]"


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_a_patch_says_of_itself_cannot_move_the_terminal(run: Run, patch: Path, tmp_path: Path) -> None:
    copy = tmp_path / "patch"
    shutil.copytree(patch, copy)
    edit(copy / "adapter_config.json", lambda config: config.update(base_model_name_or_path=EVIL))

    def tell(report: Any) -> None:
        report["failures"][0].update(context=EVIL, before=EVIL)
        report["rows"][0].update(goes_on=EVIL)
        report["seconds"] = {EVIL: 1.0}
        report["broken"] = [
            {
                "source": EVIL,
                "row": 0,
                "position": 0,
                "context": EVIL,
                "expected": EVIL,
                "expected_id": 0,
                "after": EVIL,
            }
            | {"after_id": 0}
        ]
        report["problems"] = [{"name": EVIL, "acts": [{"how": EVIL, "tokens": [EVIL], "layers": [EVIL]}]}]

    edit(copy / "repair_report.json", tell)
    result = run("inspect", copy)
    assert result.code == 0 and "gone" in result.err
    assert not {"\x1b", "\x9b", "\u202e"} & set(result.err)
    assert r"\x1b[2Jgone\x9b1A\u202ereversed[bold]" in result.err


def test_an_error_cannot_move_the_terminal(run: Run, patch: Path, tmp_path: Path) -> None:
    copy = tmp_path / "patch"
    shutil.copytree(patch, copy)
    edit(copy / "adapter_config.json", lambda config: config.update(peft_type=EVIL))
    result = run("inspect", copy)
    assert result.code == 2 and is_one_sentence(result) and "gone" in result.err
    assert not {"\x1b", "\x9b", "\u202e"} & set(result.err)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["rows"][0].update(tokens="many"),
        lambda report: report["rows"][0].update(goes_on=3),
        lambda report: report["failures"][0].update(gap_after=None),
        lambda report: report.update(steps="x"),
        lambda report: report.update(seconds={"a": "b"}),
        lambda report: report.update(seconds=3),
        lambda report: report.update(problems=[{"name": "a", "acts": [{"how": 3, "tokens": [], "layers": []}]}]),
        lambda report: report.update(layers=[{"name": "a", "neurons": 3, "delta_norm": 1.0}]),
        lambda report: report.update(layers=[{"name": "a", "neurons": [3], "delta_norm": 10**400}]),
        lambda report: report.update(arguments=[]),
        lambda report: report["arguments"].update(max_harm="x"),
        lambda report: report.update(versions="x"),
        lambda report: report.update(problems=[{"name": "a", "acts": [{"how": "", "tokens": {}, "layers": []}]}]),
        lambda report: report["rows"][0].update(served_after={"a": True}),
        lambda report: report.update(entry="\ud800"),
    ],
)
def test_reports_with_values_of_other_kinds_are_none(
    run: Run, patch: Path, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    copy = tmp_path / "patch"
    shutil.copytree(patch, copy)
    edit(copy / "repair_report.json", change)
    result = run("inspect", copy)
    assert result.code == 2 and is_one_sentence(result) and "is not a repair report" in result.err


@pytest.mark.parametrize("times", [{"seconds": {"a": "b"}}, {"seconds": 3}, {}, []])
def test_times_of_other_kinds_are_none(run: Run, patch: Path, tmp_path: Path, times: Any) -> None:
    copy = tmp_path / "patch"
    shutil.copytree(patch, copy)
    (copy / "repair_report.times.json").write_text(json.dumps(times))
    result = run("inspect", copy)
    assert result.code == 2 and is_one_sentence(result) and "is not a repair report" in result.err
