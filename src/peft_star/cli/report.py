"""The command `peft-star report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import check_file_output, new_file
from ..loading import find_patch
from ..sharing.entries import Entry
from ..sharing.page import MAGIC, harm_told, patch_page
from ..sharing.recorded import log
from .app import Json, OnePatchRevision, Patch, Token, command, finish
from .console import escape, format_size, stderr_console


@command()
def report(
    patch: Patch,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="REPORT.html", help="The file to write.")],
    revision: OnePatchRevision = None,
    token: Token = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    as_json: Json = False,
) -> None:
    """Write what PATCH repaired, what it changed besides, and where it acts, as one HTML file. Needs no base model."""
    check_file_output(output, overwrite, MAGIC, (patch,))
    directory = find_patch(patch, revision=revision, token=token)
    name = patch if "/" not in patch.rstrip("/") else None
    page = patch_page(directory, name=name, ledger=[_line(entry) for entry in log(directory).entries])
    with new_file(output, overwrite) as path:
        path.write_text(page, encoding="utf-8")
    size = output.expanduser().stat().st_size
    if not as_json:
        stderr_console().print(f"Report written to {escape(str(output))} ({format_size(size)}).", soft_wrap=True)
    finish({"patch": patch, "output": str(output), "bytes": size}, as_json)


def _line(entry: Entry) -> dict[str, Any]:
    """What the page's time line says of an entry."""
    line: dict[str, Any] = {"time": entry.time, "entry": entry.id}
    line |= {"note": entry.note} if entry.note else {}
    if {"solved", "failures"} <= entry.summary.keys():
        line["failing tokens solved"] = f"{entry.summary['solved']} of {entry.summary['failures']}"
    line |= {"neurons changed": sum(entry.modules.values()), **harm_told(entry.harm)}
    if "norm" in entry.patch:
        line["norm of the patch"] = entry.patch["norm"]
    return line | ({"taken out": entry.reverted} if entry.reverted else {})
