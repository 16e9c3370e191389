"""The command `peft-star report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import check_file_output, new_file
from ..loading import find_patch
from ..sharing.page import MAGIC, patch_page
from .app import Json, Patch, Token, command, finish
from .console import escape, format_size, stderr_console


@command()
def report(
    patch: Patch,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="REPORT.html", help="The file to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a PATCH on the Hub.")] = None,
    token: Token = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    as_json: Json = False,
) -> None:
    """Write what PATCH repaired, what it changed besides, and where it acts, as one HTML file. Needs no base model."""
    check_file_output(output, overwrite, MAGIC, (patch,))
    directory = find_patch(patch, revision=revision, token=token)
    page = patch_page(directory, name=patch if "/" not in patch.rstrip("/") else None)
    with new_file(output, overwrite) as path:
        path.write_text(page, encoding="utf-8")
    size = output.expanduser().stat().st_size
    if not as_json:
        stderr_console().print(f"Report written to {escape(str(output))} ({format_size(size)}).", soft_wrap=True)
    finish({"patch": patch, "output": str(output), "bytes": size}, as_json)
