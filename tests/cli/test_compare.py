"""`peft-star compare`: what base and patched model generate, and one sentence for what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command_line import Run, is_one_sentence


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b", "completion": "cd"}\n{"prompt": "something else"}\n')
    return path


def test_texts_side_by_side(run: Run, tiny_dir: Path, patch: Path, prompts: Path) -> None:
    result = run("compare", tiny_dir, patch, prompts, "--max-new-tokens", 2, "--json")
    assert (result.code, result.err) == (0, "")
    first = result.json["pairs"][0]
    assert first["patched"] == "cd" and first["base"] != "cd" and first["token"] == 0 and first["at"] == 0
    assert result.json["prompts"] == 2 and result.json["changed"] == sum(
        pair["token"] is not None for pair in result.json["pairs"]
    )
    shown = run("compare", tiny_dir, patch, prompts, "--max-new-tokens", 2)
    assert (shown.code, shown.out) == (0, "")
    assert f"{result.json['changed']} of 2 texts change." in shown.err and "cd" in shown.err


def test_prompts_are_counted_by_their_lines(run: Run, tiny_dir: Path, patch: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n\n{"prompt": "a b"}\n')
    shown = run("compare", tiny_dir, patch, path, "--max-new-tokens", 2)
    assert shown.code == 0 and "│ 3 " in shown.err
    path.write_text("\n\n" + json.dumps({"prompt": "x" * 300}))
    assert f"{path}, line 3: its 300 tokens" in run("compare", tiny_dir, patch, path).err


def test_what_it_cannot_compare_is_2(run: Run, tiny_dir: Path, patch: Path, prompts: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"completion": "x"}))
    for arguments in ((tiny_dir, patch, bad), (tiny_dir, "./nowhere", prompts), (tiny_dir, tiny_dir, prompts)):
        result = run("compare", *arguments, "--json")
        assert result.code == 2 and is_one_sentence(result), result.err
