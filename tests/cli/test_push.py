"""`peft-star push`: what it asks of the Hub. How patches get there is tested with a server, in `sharing`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_star.cli import patches
from support.command_line import Run, is_one_sentence


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What would have been pushed."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def push(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "https://hub/you/patch"

    monkeypatch.setattr(patches, "push", push)
    return calls


def test_push_passes_its_options_on(run: Run, patch: Path, pushed: list[Any]) -> None:
    options = "--private --revision dev -m Better --lora --token hf_x --json"
    result = run("push", patch, "you/patch", *options.split())
    assert (result.code, result.err) == (0, "")
    url = "https://hub/you/patch"
    assert result.json == {"patch": str(patch), "repo": "you/patch", "revision": "dev", "pushed_to": url}
    settings = {"token": "hf_x", "private": True, "revision": "dev", "lora": True, "commit_message": "Better"}
    assert pushed == [((patch, "you/patch"), settings)]


def test_push_says_where_it_went(run: Run, patch: Path, pushed: list[Any]) -> None:
    result = run("push", patch, "you/patch")
    assert (result.code, result.out) == (0, "")
    assert result.err == "Pushing to you/patch\nPushed to https://hub/you/patch\n"
    assert pushed == [((patch, "you/patch"), {"token": None, "private": None, "revision": None, "lora": False})]


def test_push_of_what_is_no_patch_is_2(run: Run, tmp_path: Path) -> None:
    for directory in (tmp_path, "./nowhere"):
        result = run("push", directory, "you/patch", "--json")
        assert result.code == 2
        assert is_one_sentence(result), result.err


def test_push_to_what_is_no_repository_is_2(run: Run, patch: Path) -> None:
    result = run("push", patch, "not a repo", "--json")
    assert result.code == 2
    assert is_one_sentence(result) and "no name for a repository" in result.err
