"""Running the command line in a test's own process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SOLVABLE = ("--lr", "0.05", "--neurons", "32", "--steps", "200")  # random weights need larger steps than real ones


class Result(NamedTuple):
    """What a command ended with: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


def is_one_sentence(result: Result) -> bool:
    return (
        result.out == ""
        and result.err.startswith("Error: ")
        and result.err.count("\n") == 1
        and "Traceback" not in result.err
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run_here(main: Callable[[list[str]], None], *args: object) -> int:
    """The exit code of a command in this process."""
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    return exit_.value.code if isinstance(exit_.value.code, int) else 0
