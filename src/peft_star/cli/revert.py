"""The command `peft-star revert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import RevertReport
from .. import revert as run_revert
from ..files import bytes_of
from ..loading import check_fit, load_patch
from ..models.fingerprint import check_base
from ..sharing.patch_files import check_patch_output
from ..sharing.recorded import Recorded, output_of, rewriting
from .app import (
    EXIT_UNSOLVED,
    DeviceMap,
    Dtype,
    Json,
    Overwrite,
    Patch,
    PatchRevision,
    Token,
    command,
    finish,
    load_base,
)
from .check import print_check
from .console import escape, format_size, quiet, status, stderr_console


@command()
def revert(
    patch: Patch,
    entry: Annotated[str, typer.Argument(metavar="ENTRY", help="An entry's id or its number, as `log` shows them.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Directory for the new patch.", show_default="PATCH itself"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model, on which the other repairs are looked at and solved again where they broke.",
            show_default="the one that PATCH names, if it lies on this machine",
        ),
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Take ENTRY out without a look at the others.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    patch_revision: PatchRevision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Take one repair out of PATCH and leave the others solved.

    What the repair changed is taken off exactly; its entry stays in the ledger, marked. Exits with 1 when another
    repair does not hold without it.
    """
    if base and no_base:
        raise ValueError("--base and --no-base exclude each other; give one of them.")
    found = Recorded.read(patch, revision=patch_revision, token=token)
    chosen = found.ledger.find(entry)
    target = output_of(found, patch, output)
    overwrite = overwrite or target == found.directory
    check_patch_output(target, overwrite)
    without = found.without(chosen)
    base = None if no_base else base or _base_at_hand(found)
    report = None
    if base is None:
        without.write(target, overwrite=overwrite)
    else:
        model, tokenizer = load_base(base, as_json, dtype=dtype, device_map=device_map, token=token)
        check_fit(model, found.directory, patch)
        check_base(model, found.patch.config)
        with status("Taking it out", as_json), quiet():
            patched = load_patch(model, found.directory)
            report = run_revert(patched, tokenizer, chosen.id)
            with rewriting(found, target, overwrite=overwrite) as temporary:
                patched.save_pretrained(str(temporary), save_embedding_layers=False)
    if not as_json:
        _tell(chosen.id, report, target)
    result: dict[str, Any] = {"patch": patch, "entry": chosen.id, "output": str(target), "base": base}
    finish({**result, "report": report.to_dict() if report else None}, as_json)
    if report is not None and not report.ok:
        raise typer.Exit(EXIT_UNSOLVED)


def _base_at_hand(found: Recorded) -> str | None:
    """The base model that a patch names, where that is a path on this machine."""
    name = found.patch.config.get("base_model_name_or_path")
    try:
        return name if name and Path(name).expanduser().exists() else None
    except (OSError, RuntimeError):  # no name that a path can have
        return None


def _tell(entry: str, report: RevertReport | None, target: Path) -> None:
    console = stderr_console()
    console.print(f"Took out {entry}: {escape(str(target))} ({format_size(bytes_of(target))}).", soft_wrap=True)
    if report is None:
        console.print(
            "[yellow]Nobody has looked at the other repairs:[/] give --base MODEL, or run `peft-star check`."
        )
        return
    console.print(f"Its tokens that fail again: {report.fail_again} of {report.failures}.")
    if report.broken:
        console.print(f"Rows of other repairs that broke: {report.broken}; solved again: {len(report.solved_again)}.")
    print_check(report.check, console)
