"""What the commands that make a patch do with it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import bytes_of, new_directory
from ..loading import REPORT_NAME
from ..sharing.card import PLOT_NAME, write_card
from .console import quiet

if TYPE_CHECKING:
    from ..report import RepairReport


def save_patch(model: Any, report: RepairReport, path: Path, command: str | None = None) -> int:
    """Write a patch with its report and card, complete or not at all, and return its size in bytes.

    `command` is what made the patch, for the card.
    """
    with new_directory(path) as temporary:
        with quiet():
            model.save_pretrained(temporary)
        report.save(temporary / REPORT_NAME)
        with contextlib.suppress(ImportError):  # matplotlib is an extra
            report.plot(temporary / PLOT_NAME)
        write_card(temporary, command=command)
    return bytes_of(path)
