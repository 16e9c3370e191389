"""The command `peft-star check`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .. import CheckReport
from .. import check as run_check
from ..loading import load_patch
from ..sharing.entries import SOURCES
from ..sharing.recorded import log
from .app import (
    EXIT_UNSOLVED,
    AllowOtherBase,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Patch,
    PatchRevision,
    Revision,
    Token,
    command,
    finish,
    load_base,
)
from .console import SHOWN_ROWS, quiet, status, stderr_console, visible
from .patches import check_patches, find_patches


@command()
def check(
    model: Model,
    patch: Patch,
    generate: Annotated[bool, typer.Option("--no-generate", help="Check tokens only, generate nothing.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    token: Token = None,
    patch_revision: PatchRevision = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Run again what the ledger of PATCH holds (failures, retained and related rows) on MODEL, for CI.

    Exits with 0 when everything is as it was after its repair, and with 1 and a table when something regressed.
    """
    (found,) = find_patches([patch], revision=patch_revision, token=token)
    if not log(found.directory).standing:
        raise ValueError(f"{patch} has no ledger with a repair in it, so there is nothing to check.")
    base, tokenizer = load_base(model, as_json, dtype=dtype, device_map=device_map, revision=revision, token=token)
    check_patches(base, [found], allow_other_base, "checks")
    with status("Checking", as_json), quiet():
        patched = load_patch(base, found.directory)
        report = run_check(patched, tokenizer, generation=not generate, allow_other_base=allow_other_base)
    if not as_json:
        print_check(report, stderr_console())
    finish({"model": model, "patch": patch, **report.to_dict()}, as_json)
    if not report.ok:
        raise typer.Exit(EXIT_UNSOLVED)


def print_check(report: CheckReport, console: Console) -> None:
    """What regressed, and the totals."""
    if report.regressed:
        heads = ("entry", "rows", "prompt", "completion", "now says")
        table = Table(*heads, title="Regressed", title_justify="left")
        for row in report.regressed[:SHOWN_ROWS]:
            said = visible(row.said) if row.said else "(another text)"
            texts = visible(row.prompt[-40:]), visible(row.completion)
            table.add_row(row.entry, row.source, *texts, said)
        console.print(table)
        if len(report.regressed) > SHOWN_ROWS:
            console.print(f"... and {len(report.regressed) - SHOWN_ROWS} more, with --json.")
    figures = report.summary()
    kinds = [f"{figures[f'{kind}_regressed']} of {figures[kind]} {kind}" for kind in SOURCES if figures[kind]]
    told = f" ({', '.join(kinds)})" if kinds else ""
    mark = "green" if report.ok else "red"
    console.print(
        f"[{mark}]{len(report.regressed)} of {len(report.rows)} rows regressed[/]{told}, "
        f"of {len(report.entries)} repairs."
    )
    if report.unchecked:
        names = ", ".join(report.unchecked)
        console.print(f"Not checked: {len(report.unchecked)} entries that keep no rows ({names}).", soft_wrap=True)
