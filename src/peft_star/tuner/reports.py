"""The report of an adapter's repair goes with the adapter: `save_pretrained` writes it, and this package's card."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..report import RepairReport
from ..sharing.card import write_card
from ..sharing.patch_files import REPORT_NAME


class Repaired(NamedTuple):
    """What a repair reported of an adapter, and the checksum of the tensors that this is true of."""

    report: RepairReport
    adapter_name: str
    tensors_sha256: str


def save_report(directory: Path, repaired: Repaired) -> None:
    """Write the report of the patch that lies in `directory`, and the card in place of PEFT's generic one."""
    repaired.report.save(directory / REPORT_NAME)
    write_card(directory if repaired.adapter_name == "default" else directory.parent)
