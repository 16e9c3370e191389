"""What commands show: sizes, pieces of text, progress."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from peft_star import RepairArguments, RepairCallback, RepairState
from peft_star.cli import console
from peft_star.cli.console import BarProgress, PlainProgress, format_size, is_main, progress, visible


def test_sizes_are_readable() -> None:
    assert [format_size(size) for size in (0, 999, 1500, 2_219_440, 5 * 10**9)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.2 MB",
        "5.0 GB",
    ]


def test_text_is_shown_on_one_line() -> None:
    assert visible("  a\nb\t ") == "··a\\nb\\t·"
    assert visible("") == "(none)"
    assert visible("[red]") == "\\[red]"


@pytest.mark.parametrize(
    ("variables", "main"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"WORLD_SIZE": "1", "RANK": "1"}, True),
    ],
)
def test_one_process_speaks(variables: dict[str, str], main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_main() is main


STATE = RepairState(phase="patch", total=10, done=3, step=2, num_failures=4, num_solved=1, loss=1.25)


def test_progress_is_a_line_a_step_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(as_json=False) as callback:
        assert isinstance(callback, PlainProgress)
        callback.on_phase_begin(RepairArguments(), STATE)
        callback.on_step_end(RepairArguments(), STATE)
    assert capsys.readouterr().err == "step 2: 1/4 failing tokens solved, loss 1.25\n"


def test_progress_is_nothing_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(as_json=True) as callback:
        assert type(callback) is RepairCallback
        callback.on_step_end(RepairArguments(), STATE)
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(console, "stderr_console", lambda: terminal)
    with progress(as_json=False) as callback:
        assert isinstance(callback, BarProgress)
        for _ in range(2):  # a phase comes back
            callback.on_phase_begin(RepairArguments(), STATE)
            callback.on_progress(RepairArguments(), STATE)
            callback.on_step_end(RepairArguments(), STATE)
            (task,) = callback.progress.tasks
            assert (task.description, task.total, task.completed) == ("patch", 10, 3)
            assert task.fields["note"] == "1/4 solved, loss 1.25"
            callback.on_phase_end(RepairArguments(), STATE)
        assert callback.progress.tasks == []
