"""The command `peft-star stack`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from ..files import bytes_of
from ..sharing.combine import stack as stack_patches
from .app import Json, Overwrite, PatchOutput, PatchRevision, Token, command, finish
from .console import escape, format_size, quiet, stderr_console


@command()
def stack(
    a: Annotated[str, typer.Argument(metavar="A", help="A patch's directory, or its Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another patch for the same base model.")],
    output: PatchOutput,
    patch_revision: PatchRevision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write patches A and B as one, with the repairs of both, and show where they pull the same neurons apart.

    Needs no base model; `peft-star check MODEL PATCH` says whether all repairs hold together.
    """
    with quiet():
        found = stack_patches(a, b, output, overwrite=overwrite, revision=patch_revision, token=token)
    apart = [layer for layer in found if layer.apart]
    if not as_json:
        console = stderr_console()
        table = Table("module", "neurons A", "B", "shared", "cosine", "opposed", "", box=None, pad_edge=False)
        for layer in found:
            cosine = "" if layer.cosine is None else f"{layer.cosine:+.3f}"
            counts = map(str, (layer.neurons_a, layer.neurons_b, layer.shared))
            table.add_row(
                escape(layer.name), *counts, cosine, str(layer.opposed), "[yellow]apart[/]" if layer.apart else ""
            )
        if found:
            console.print(table)
        else:
            console.print("The two have no layer in common.")
        if apart:
            console.print(
                f"[yellow]Warning:[/] the two pull the same neurons apart in {len(apart)} of {len(found)} layers; "
                "`peft-star check MODEL PATCH` says what still holds.",
                soft_wrap=True,
            )
        size = format_size(bytes_of(output))
        console.print(f"Patch saved to {escape(str(output))} ({size}).", soft_wrap=True)
    layers = [{**asdict(layer), "apart": layer.apart} for layer in found]
    finish({"a": a, "b": b, "patch": str(output), "layers": layers, "apart": len(apart)}, as_json)
