"""The command `peft-star log`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..sharing.entries import OUTSIDE, Entry
from ..sharing.governor import HARM, Curve, curves, warnings_of
from ..sharing.ledger import Ledger
from ..sharing.recorded import Recorded
from .app import Json, OnePatchRevision, Patch, Token, command, finish
from .console import escape, stderr_console, visible

# of the rest of a patch that is told, relative to its norm
TOLD = 1e-3


@command()
def log(
    patch: Patch,
    rows: Annotated[bool, typer.Option("--rows", help="Also show each repair's rows.")] = False,
    revision: OnePatchRevision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show the repairs that made PATCH: what each solved, changed and harmed, and how the patch grows. Needs no base
    model."""
    found = Recorded.read(patch, revision=revision, token=token)
    ledger, beside = found.ledger, found.unaccounted()
    warnings = warnings_of(ledger)
    if not as_json:
        console = stderr_console()
        if not ledger:
            why = "it was made before there were ledgers, or by hand."
            console.print(f"{escape(patch)} has no ledger: {why}", soft_wrap=True)
        else:
            print_log(ledger, console)
            if rows:
                print_rows(ledger, console)
            print_curves(curves(ledger), console)
        if ledger and beside > TOLD:
            console.print(
                f"[yellow]Warning:[/] {beside:.1%} of the patch is no entry's: it was changed outside of a repair.",
                soft_wrap=True,
            )
        for text in warnings:
            console.print(f"[yellow]Warning:[/] {visible(text)}", soft_wrap=True)
    result = {"patch": patch, "entries": [entry.to_dict() for entry in ledger.entries], "unaccounted": beside}
    grown = [
        {"measure": curve.measure, "entries": curve.ids, "values": curve.values, "pace": curve.pace()}
        for curve in curves(ledger)
    ]
    finish({**result, "curves": grown, "warnings": warnings}, as_json)


def print_log(ledger: Ledger, console: Console) -> None:
    """A line for each entry."""
    measures = [name for name in HARM if any(name in entry.harm for entry in ledger.entries)]
    told = [Column(head, no_wrap=True) for head in ("", "entry", "time (UTC)", "solved")]
    table = Table(
        *told, "neurons", "norm", *(name.split("_")[0] for name in measures), "note", box=None, pad_edge=False
    )
    for number, entry in enumerate(ledger.entries, start=1):
        figures = entry.summary
        note = " ".join(part for part in (entry.note, state_of(entry)) if part)
        harm = [f"{entry.harm[name]:.4g}" if name in entry.harm else "" for name in measures]
        cells = (
            str(number),
            entry.id,
            visible(entry.time[:16].replace("T", " ")),
            _of(figures, "solved", "failures"),
            str(sum(entry.modules.values())),
            f"{entry.patch.get('norm', 0.0):.4g}",
            *harm,
            visible(note) if note else "",
        )
        table.add_row(*cells, style=None if entry.stands else "strike dim")
    console.print(table)


def state_of(entry: Entry) -> str:
    """What else has to be known of an entry, in brackets."""
    parts = [OUTSIDE] if entry.kind == OUTSIDE else []
    parts += ["no rows kept"] if entry.kind != OUTSIDE and not entry.rows else []
    parts += [f"solved again {entry.amended}"] if entry.amended else []
    parts += [f"taken out {entry.reverted}"] if entry.reverted else []
    return f"({', '.join(parts)})" if parts else ""


def print_rows(ledger: Ledger, console: Console) -> None:
    """A line for each row of the standing entries."""
    table = Table("entry", "rows", "prompt", "completion", "right", box=None, pad_edge=False)
    for entry in ledger.standing:
        for row in entry.rows:
            prompt, completion = (_text(row.row[name]) for name in ("prompt", "completion"))
            right = f"{row.tokens - len(row.wrong_after)} of {row.tokens}"
            table.add_row(entry.id, row.source, visible(prompt[-60:]), visible(completion[:60]), right)
    console.print(table)


def print_curves(found: list[Curve], console: Console) -> None:
    """How the patch grew, a line for each measure."""
    for curve in found:
        pace = curve.pace()
        told = "" if pace is None else f", {pace:.1f} times as fast as its load"
        first, last = curve.values[0], curve.values[-1]
        console.print(f"{visible(curve.measure)} {curve.sparkline()} {first:.4g} -> {last:.4g}{told}", soft_wrap=True)


def _of(figures: dict[str, Any], part: str, whole: str) -> str:
    return visible(f"{figures[part]} of {figures[whole]}") if part in figures and whole in figures else ""


def _text(value: Any) -> str:
    """A prompt or a completion, of which one of chat messages is shown by its last message."""
    return value if isinstance(value, str) else value[-1]["content"]
