"""The command line as a whole: what holds for every command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

import peft_star
from peft_star.cli import app as cli_app
from support.command_line import Run, is_one_sentence

COMMANDS = [
    "repair",
    "inspect",
    "log",
    "check",
    "report",
    "compare",
    "evaluate",
    "diff",
    "revert",
    "stack",
    "merge",
    "export",
    "push",
    "demo",
]


def test_help_and_version_from_a_shell() -> None:
    result = subprocess.run([sys.executable, "-m", "peft_star", "--version"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout == f"peft-star {peft_star.__version__}\n"


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert command in result.out
        assert run(command, "--help").code == 0


def test_help_shows_the_commands_in_their_order(run: Run) -> None:
    lines = run("--help").out.splitlines()
    first_words = [line.strip("│ ").split(" ")[0] for line in lines]
    assert [word for word in first_words if word in COMMANDS] == COMMANDS


@pytest.mark.parametrize("module", ["app", "evaluate", "export"])
def test_any_module_can_be_imported_first(module: str) -> None:
    code = (
        f"import peft_star.cli.{module}, peft_star.cli.app as c; "
        "print(*[command.callback.__name__ for command in c.app.registered_commands])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == COMMANDS, result.stderr


@pytest.mark.parametrize("args", [("nonsense",), ("repair",), ("repair", "m", "f.jsonl"), ("merge", "m", "-o", "x")])
def test_wrong_usage_is_2(run: Run, args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.code == 2
    assert result.out == ""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make a command of the name `failing` that raises."""
    monkeypatch.setattr(cli_app.app, "registered_commands", [*cli_app.app.registered_commands])

    def make(error: BaseException) -> None:
        @cli_app.command()
        def failing() -> None:
            raise error

    return make


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("Two\nlines."), 2, "Error: Two lines.\n"),
        (OSError(), 2, "Error: OSError\n"),
        (ImportError("No module named 'x[y]'"), 2, "Error: No module named 'x[y]'\n"),
        (KeyboardInterrupt(), 130, "Error: Interrupted; nothing was written.\n"),
    ],
)
def test_errors_end_in_one_sentence(
    run: Run, failing: Callable[[BaseException], None], error: BaseException, code: int, message: str
) -> None:
    failing(error)
    result = run("failing")
    assert (result.code, result.err) == (code, message)
    assert is_one_sentence(result)


def test_errors_of_the_package_keep_their_traceback(
    run: Run, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(KeyError("a mistake of ours"))
    with pytest.raises(KeyError):
        cli_app.main(["failing"])
    failing(ValueError("looked into"))
    monkeypatch.setenv("PEFT_STAR_DEBUG", "1")
    with pytest.raises(ValueError):
        cli_app.main(["failing"])
