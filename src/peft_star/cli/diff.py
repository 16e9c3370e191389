"""The command `peft-star diff`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..sharing.combine import diff as diff_patches
from .app import Json, PatchRevision, Token, command, finish
from .console import escape, stderr_console, visible


@command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A patch's directory, or its Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another patch.")],
    patch_revision: PatchRevision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show how patch B differs from patch A: repairs that only one of them has, neurons and deltas. Needs no base
    model."""
    found = diff_patches(a, b, revision=patch_revision, token=token)
    if not as_json:
        console = stderr_console()
        for name, entries in ((a, found.only_a), (b, found.only_b)):
            for entry in entries:
                about = f" {visible(entry.note)}" if entry.note else ""
                solved = visible(f"{entry.summary.get('solved', 0)} failing tokens solved")
                console.print(f"Only in {escape(name)}: {entry.id} {visible(entry.time)}, {solved}{about}")
        if found.both:
            console.print(f"Repairs in both: {len(found.both)}")
        table = Table(
            "module", "only A", "only B", "changed", "norm A", "norm B", "of A - B", box=None, pad_edge=False
        )
        for layer in found.layers:
            norms = (f"{value:.4g}" for value in (layer.norm_a, layer.norm_b, layer.norm_difference))
            table.add_row(escape(layer.name), *map(str, (layer.only_a, layer.only_b, layer.changed)), *norms)
        console.print(table)
        if found.same:
            console.print("Both compute the same.")
    finish({"a": a, "b": b, **found.to_dict()}, as_json)
