"""Fixtures for the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_star.cli import main
from support.command_line import SOLVABLE, Result, Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def failures(write_rows: Callable[..., Path]) -> Path:
    return write_rows("failures.jsonl", ("a b", "cd"), ("xyz", "!"))


@pytest.fixture(scope="session")
def patch(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch that the command made for the tiny model. Not to be written to."""
    directory = tmp_path_factory.mktemp("patches")
    rows = directory / "failures.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "cd"}\n')
    with pytest.raises(SystemExit) as exit_:
        main(["repair", str(tiny_dir), str(rows), "-o", str(directory / "patch"), *SOLVABLE])
    assert exit_.value.code in (0, None)
    return directory / "patch"


@pytest.fixture(scope="session")
def twice(patch: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That patch after a second repair. Not to be written to."""
    directory = tmp_path_factory.mktemp("twice")
    rows = directory / "failures.jsonl"
    rows.write_text('{"prompt": "xyz", "completion": "!"}\n')
    words = ["--adapter", str(patch), "--note", "the second"]
    with pytest.raises(SystemExit) as exit_:
        main(["repair", str(tiny_dir), str(rows), "-o", str(directory / "patch"), *words, *SOLVABLE])
    assert exit_.value.code in (0, None)
    return directory / "patch"
