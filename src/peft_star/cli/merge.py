"""The command `peft-star merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import bytes_of, check_output, new_directory
from ..loading import load_patch
from ..sharing.gguf_base import check_gguf_output
from ..sharing.gguf_merge import GgufMerge
from .app import (
    AllowOtherBase,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Overwrite,
    PatchRevision,
    Revision,
    Token,
    command,
    finish,
    load_base,
)
from .console import escape, format_size, quiet, status, stderr_console
from .patches import check_patches, find_patches


@command()
def merge(
    model: Model,
    patches: Annotated[list[str], typer.Argument(metavar="PATCH...", help="Patches, applied in this order.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            help="Directory for the merged model; or, of a .gguf MODEL, a file whose name ends with .gguf.",
        ),
    ],
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    token: Token = None,
    patch_revision: PatchRevision = None,
    allow_other_base: AllowOtherBase = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write MODEL with PATCHes merged into its weights, as a full model that needs neither peft nor peft_star."""
    found = find_patches(patches, revision=patch_revision, token=token)
    to_gguf = output.suffix.lower() == ".gguf"
    if to_gguf:
        check_gguf_output(output, overwrite, "model", inputs=(model,))
        merging = GgufMerge.read(model, [patch.directory for patch in found])
    else:
        check_output(output, overwrite, "config.json", inputs=(model, *(patch.directory for patch in found)))
    base, tokenizer = load_base(model, as_json, dtype=dtype, device_map=device_map, revision=revision, token=token)

    # before the first merge: a merged patch is a change of the base, too
    check_patches(base, found, allow_other_base, "merges")
    if to_gguf:
        with status("Saving", as_json), quiet():
            merging.write(output, dtype=None if dtype == "auto" else base.dtype, overwrite=overwrite)
        size = output.expanduser().stat().st_size
    else:
        for number, patch in enumerate(found):
            patched = load_patch(base, patch.directory, f"patch{number}")
            base = patched.merge_and_unload(safe_merge=True)
        with status("Saving", as_json), new_directory(output, overwrite) as temporary, quiet():
            base.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        size = bytes_of(output)
    if not as_json:
        count = f"{len(patches)} patch{'es' if len(patches) > 1 else ''}"
        stderr_console().print(f"Merged {count}: {escape(str(output))} ({format_size(size)}).", soft_wrap=True)
    finish({"model": model, "patches": patches, "output": str(output), "bytes": size}, as_json)
