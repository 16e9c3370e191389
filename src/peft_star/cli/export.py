"""The command `peft-star export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from peft import PeftConfig

from ..files import bytes_of
from ..loading import find_patch, read_patch_config
from ..sharing.gguf_base import check_gguf_output
from ..sharing.gguf_lora import patch_to_gguf
from ..sharing.lora import patch_to_lora
from ..sharing.patch_files import check_patch_output
from .app import Json, OnePatchRevision, Overwrite, Patch, Token, command, finish
from .console import escape, format_size, quiet, status, stderr_console

FORMS = ("lora", "gguf")


@command()
def export(
    patch: Patch,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUTPUT", help="Directory for the adapter; with --to gguf, the file."),
    ],
    to: Annotated[
        str, typer.Option("--to", help="The form: lora (for PEFT, vLLM) or gguf (for llama.cpp); both are exact.")
    ] = "lora",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --to gguf: the base model, of which no weights are read.",
            show_default="the one that PATCH names",
        ),
    ] = None,
    revision: OnePatchRevision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write PATCH in a form that needs no peft_star: a plain LoRA for PEFT and vLLM, which needs no base model, or one
    for llama.cpp in a .gguf file."""
    if to not in FORMS:
        raise ValueError(f"--to is {to!r}; the forms are: {', '.join(FORMS)}.")
    if base is not None and to != "gguf":
        raise ValueError(f"--base is of use with --to gguf alone; a {to} needs no base model.")
    directory = find_patch(patch, revision=revision, token=token)
    read_patch_config(directory)

    if to == "gguf":
        check_gguf_output(output, overwrite, inputs=(base,))
        with status("Exporting", as_json), quiet():
            written = patch_to_gguf(directory, output, base, overwrite=overwrite, token=token)
        size = output.expanduser().stat().st_size
    else:
        check_patch_output(output, overwrite, inputs=(directory,))
        with status("Exporting", as_json), quiet():
            patch_to_lora(directory, output, overwrite=overwrite)
            written = {"rank": PeftConfig.from_pretrained(str(output.expanduser())).r}
        size = bytes_of(output)
    if not as_json:
        stderr_console().print(
            f"Exported a LoRA of rank {written['rank']}: {escape(str(output))} ({format_size(size)}).", soft_wrap=True
        )
    finish({"patch": patch, "to": to, "output": str(output), **written, "bytes": size}, as_json)
