"""The command `peft-star export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from peft import PeftConfig

from ..files import bytes_of
from ..loading import find_patch, read_patch_config
from ..sharing.lora import patch_to_lora
from ..sharing.patch_files import check_patch_output
from .app import Json, Overwrite, Patch, Token, command, finish
from .console import escape, format_size, quiet, status, stderr_console

FORMS = ("lora",)


@command()
def export(
    patch: Patch,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the adapter.")],
    to: Annotated[str, typer.Option("--to", help="The form: lora, exact and of one rank.")] = "lora",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a PATCH on the Hub.")] = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write PATCH in a form that needs no peft_star: a plain LoRA for PEFT, vLLM or llama.cpp. Needs no base model."""
    if to not in FORMS:
        raise ValueError(f"--to is {to!r}; the forms are: {', '.join(FORMS)}.")
    directory = find_patch(patch, revision=revision, token=token)
    read_patch_config(directory)
    check_patch_output(output, overwrite, inputs=(directory,))

    with status("Exporting", as_json), quiet():
        patch_to_lora(directory, output, overwrite=overwrite)
        config = PeftConfig.from_pretrained(output.expanduser())
    size = bytes_of(output)
    if not as_json:
        stderr_console().print(
            f"Exported a LoRA of rank {config.r}: {escape(str(output))} ({format_size(size)}).", soft_wrap=True
        )
    finish({"patch": patch, "to": to, "output": str(output), "rank": config.r, "bytes": size}, as_json)
