"""The report of an adapter's repair goes with the adapter: `save_pretrained` writes it, and this package's card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from peft import get_peft_model_state_dict

from ..report import RepairReport
from ..sharing.card import write_card
from ..sharing.patch_files import REPORT_NAME, checksum


class Repaired(NamedTuple):
    """What a repair reported of an adapter, and the checksum of the tensors that this is true of."""

    report: RepairReport
    adapter_name: str
    tensors_sha256: str


def remember_report(model: Any, adapter_name: str, report: RepairReport) -> None:
    """Keep the report of an adapter's repair with its configuration, which PEFT saves beside the tensors.

    Args:
        model: A `PeftModel`.
        adapter_name: The adapter.
        report: What its repair reported. It is of use as long as the adapter's tensors stay as they are now.
    """
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    model.peft_config[adapter_name].repaired = Repaired(report, adapter_name, checksum(tensors))


def save_report(directory: Path, repaired: Repaired) -> None:
    """Write the report of the patch that lies in `directory`, and the card in place of PEFT's generic one."""
    repaired.report.save(directory / REPORT_NAME)
    write_card(directory if repaired.adapter_name == "default" else directory.parent)
