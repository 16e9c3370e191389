"""The command `peft-star inspect`."""

from __future__ import annotations

from rich.table import Table

from ..files import bytes_of
from ..loading import REPORT_NAME, find_patch, read_patch_config, read_patch_modules
from ..report import RepairReport
from ..sharing.ledger import Ledger
from ..sharing.patch_files import LEDGER_CHECKSUM
from .app import Json, OnePatchRevision, Patch, Token, command, finish
from .console import escape, format_size, print_report, stderr_console


@command()
def inspect(
    patch: Patch,
    revision: OnePatchRevision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what PATCH touches and what its repair reported. Needs no base model."""
    directory = find_patch(patch, revision=revision, token=token)
    config = read_patch_config(directory)
    modules, others = read_patch_modules(directory)
    report = RepairReport.load(directory / REPORT_NAME) if (directory / REPORT_NAME).is_file() else None
    size = bytes_of(directory)
    ledger = Ledger.read(directory, config.get(LEDGER_CHECKSUM))
    repairs = len(ledger.standing) if ledger else 0
    result = {
        "patch": patch,
        "base_model": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "neurons": sum(len(module["neurons"]) for module in modules),
        "parameters": sum(len(module["neurons"]) * module["outputs"] for module in modules),
        "bytes": size,
        "modules": modules,
        "modules_to_save": others,
        "config": config,
        "repairs": repairs,
        "report": report.to_dict() if report else None,
    }
    if not as_json:
        console = stderr_console()
        console.print(f"[bold]{escape(patch)}[/], a STAR patch of {format_size(size)}", soft_wrap=True)
        console.print(f"Base model: {escape(str(result['base_model']))}", soft_wrap=True)
        console.print(
            f"{len(modules)} layers, {result['neurons']} neurons, {result['parameters']} parameters"
            + (f"; also saved: {escape(', '.join(others))}" if others else "")
        )
        if repairs:
            console.print(f"Repairs in its ledger: {repairs} (`peft-star log` shows them)")
        table = Table("module", "neurons", "outputs", "norm", "largest", box=None, pad_edge=False)
        for module in modules:
            table.add_row(
                escape(module["name"]),
                str(len(module["neurons"])),
                str(module["outputs"]),
                f"{module['norm']:.4g}",
                f"{module['max']:.4g}",
            )
        console.print(table)
        if report:
            print_report(report, console, layers=False)
        else:
            console.print("No repair report.")
    finish(result, as_json)
