"""What commands show on standard error: messages, progress and a report's tables."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich import markup
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from .. import RepairArguments, RepairCallback, RepairReport, RepairState
from ..engine.distributed import is_main_process
from ..report import PROBLEM_COLUMNS
from ..text import harmless, one_line

SHOWN_ROWS = 20


def is_main() -> bool:
    """Whether this process is the one that speaks, of those that a launcher such as `torchrun` has started.

    Also before they have found each other, and after they have parted, when only the launcher's variables tell.
    """
    return is_main_process() and (int(os.environ.get("WORLD_SIZE", 1)) == 1 or int(os.environ.get("RANK", 0)) == 0)


def stderr_console(always: bool = False) -> Console:
    """Standard error as it is now; a console that looks it up later would write into what `quiet` throws away.

    Of several processes only the main one speaks, unless `always`.
    """
    return Console(file=sys.stderr, highlight=False, quiet=not (always or is_main()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep other libraries' progress bars and warnings off the terminal; exceptions still say what went wrong."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def status(message: str, as_json: bool = False) -> Iterator[None]:
    """A spinner on a terminal, one plain line elsewhere, nothing with `--json`."""
    console = stderr_console()
    if as_json:
        yield
    elif console.is_terminal:
        with console.status(escape(message)):
            yield
    else:
        console.print(escape(message), soft_wrap=True)
        yield


class PlainProgress(RepairCallback):
    """A line for each step."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_step_end(self, args: RepairArguments, state: RepairState) -> None:
        solved = f"{state.num_solved}/{state.num_failures} failing tokens solved"
        self.console.print(f"step {state.step}: {solved}, loss {state.loss:.4g}")


class BarProgress(RepairCallback):
    """A bar for the current phase: those of "single" mode come back for each failure."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: Any = None

    def on_phase_begin(self, args: RepairArguments, state: RepairState) -> None:
        self.task = self.progress.add_task(state.phase, total=state.total or None, note="")

    def on_progress(self, args: RepairArguments, state: RepairState) -> None:
        self.progress.update(self.task, completed=state.done)

    def on_step_end(self, args: RepairArguments, state: RepairState) -> None:
        note = f"{state.num_solved}/{state.num_failures} solved, loss {state.loss:.3g}"
        self.progress.update(self.task, note=note)

    def on_phase_end(self, args: RepairArguments, state: RepairState) -> None:
        self.progress.remove_task(self.task)


@contextlib.contextmanager
def progress(as_json: bool) -> Iterator[RepairCallback]:
    """A callback that shows a repair's progress on standard error: bars on a terminal, lines elsewhere, or nothing."""
    console = stderr_console()
    if as_json:
        yield RepairCallback()
    elif not console.is_terminal:
        yield PlainProgress(console)
    else:
        note = TextColumn("{task.fields[note]}")
        columns = TextColumn("{task.description:<8}"), BarColumn(), note, TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as bars:
            yield BarProgress(bars)


def print_report(report: RepairReport, console: Console, layers: bool = True) -> None:
    """The report as tables: failing tokens before and after, the problems, what broke, the totals."""
    labels = report.labels()
    if report.failures:
        table = Table(
            "row", "context", "expected", "before", "after", "", title="Failing tokens", title_justify="left"
        )
        for item in report.failures[:SHOWN_ROWS]:
            table.add_row(
                visible(labels["failures", item.row]),
                visible(item.context),
                visible(item.expected),
                visible(item.before),
                visible(item.after),
                "[green]solved[/]" if item.solved else "[red]not solved[/]",
            )
        console.print(table)
        if len(report.failures) > SHOWN_ROWS:
            console.print(f"... and {len(report.failures) - SHOWN_ROWS} more, in the report.")
    else:
        console.print("No failing token: the model already says all of this.")
    going_on = [row for row in report.rows if row.goes_on is not None]
    if going_on:
        table = Table("row", "completion", "goes on with", title="Behind the completions", title_justify="left")
        for row in going_on[:SHOWN_ROWS]:
            table.add_row(visible(row.label), visible(row.completion), visible(row.goes_on or ""))
        console.print(table)
        if len(going_on) > SHOWN_ROWS:
            console.print(f"... and {len(going_on) - SHOWN_ROWS} more, in the report.")
    if report.tells_problems:
        table = Table("problem", *PROBLEM_COLUMNS, title="Problems", title_justify="left")
        for problem in report.problems[:SHOWN_ROWS]:
            table.add_row(visible(problem.title), *problem.cells(), problem.places(visible))
        console.print(table)
        if len(report.problems) > SHOWN_ROWS:
            console.print(f"... and {len(report.problems) - SHOWN_ROWS} more, in the report.")
    for problem in report.problems:
        for text in problem.warnings:
            about = f" ({visible(problem.name)})" if problem.name else ""
            console.print(f"[yellow]Warning{about}:[/] {visible(text)}", soft_wrap=True)
    for text in report.warnings:
        console.print(f"[yellow]Warning:[/] {visible(text)}", soft_wrap=True)
    if report.broken:
        table = Table("in", "row", "context", "expected", "now", title="Broken tokens", title_justify="left")
        for token in report.broken[:SHOWN_ROWS]:
            label = labels[token.source, token.row]
            table.add_row(*map(visible, (token.source, label, token.context, token.expected, token.after)))
        console.print(table)
    figures = report.summary()
    table = Table(box=None, show_header=False, pad_edge=False)
    mark = "green" if figures["success"] else "red"
    table.add_row("failing tokens solved", f"[{mark}]{figures['solved']} of {figures['failures']}[/]")
    rows = figures["rows"]
    table.add_row("rows right", f"{figures['rows_exact_before']} -> {figures['rows_exact_after']} of {rows}")
    for name, seen in figures.get("served", {}).items():
        right = f"{seen['rows_exact_before']} -> {seen['rows_exact_after']} of {rows}"
        table.add_row(f"rows right served as {visible(name)}", right)
    if report.arguments.get("verify_generation") and "rows_generated_exact_after" in figures:
        generated = f"{figures['rows_generated_exact_before']} -> {figures['rows_generated_exact_after']} of {rows}"
        table.add_row("rows generated right", generated)
    if "own_texts" in figures:
        kept = f"{figures['own_texts_unchanged']} of {figures['own_texts']}"
        table.add_row("the model's own texts unchanged", f"[red]{kept}[/]" if report.too_harmful else kept)
    if figures["retained_rows"]:
        table.add_row("retained rows broken", f"{figures['retained_rows_broken']} of {figures['retained_rows']}")
    if "earlier_rows" in figures:
        broken = f"{figures['earlier_rows_broken']} of {figures['earlier_rows']}"
        table.add_row("earlier repairs' rows broken", broken)
    if "related_rows" in figures:
        carried = f"{figures['related_fixed']} and {figures['related_broken']} of {figures['related_rows']}"
        table.add_row("related rows fixed, broken", carried)
    table.add_row("tokens broken", str(figures["tokens_broken"]))
    if layers:
        table.add_row("patched", f"{figures['neurons']} neurons in {figures['layers']} layers")
    if report.entry:
        table.add_row("entry", visible(report.entry))
    phases = ", ".join(f"{visible(name)} {seconds:.1f}" for name, seconds in report.seconds.items())
    table.add_row("steps", str(figures["steps"]))
    if phases:
        table.add_row("seconds", f"{figures['seconds']:.1f} ({phases})")
    console.print(table)
    if report.interrupted:
        console.print("[yellow]The repair was interrupted before it was done.[/]")


def escape(text: str) -> str:
    """A text of any origin as a terminal may be given it, without markup and without characters that move or turn what
    is written. Line ends and tabs stay."""
    return markup.escape(harmless(text))


def visible(text: str) -> str:
    """A piece of text on one line, its line ends and the spaces around it shown."""
    return markup.escape(one_line(text))


def format_size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
