"""What several commands do with patches: find, check, save, push."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from ..files import bytes_of, new_directory
from ..loading import REPORT_NAME, check_fit, find_patch, read_patch_config
from ..models.fingerprint import check_base
from ..report import RepairReport
from ..sharing.card import PLOT_NAME, write_card
from ..sharing.hub import push
from .console import quiet, status, stderr_console


@dataclass(frozen=True)
class FoundPatch:
    """A patch on this machine.

    Attributes:
        name: What the user calls it: a directory, or a Hub id.
        directory: Where its files are.
        config: Its configuration.
    """

    name: str
    directory: Path
    config: dict[str, Any]


def find_patches(names: list[str], *, revision: str | None = None, token: str | None = None) -> list[FoundPatch]:
    """Find each patch, download it if need be, and read its configuration."""
    directories = [find_patch(name, revision=revision, token=token) for name in names]
    return [FoundPatch(name, directory, read_patch_config(directory)) for name, directory in zip(names, directories)]


def check_patches(base: Any, patches: list[FoundPatch], allow_other_base: bool, does: str) -> None:
    """Raise ValueError unless every patch fits this base and was solved for its weights; `does`: what is done then."""
    for patch in patches:
        check_fit(base, patch.directory, patch.name)
        try:
            check_base(base, patch.config, allow_mismatch=allow_other_base)
        except ValueError as error:
            raise ValueError(f"{patch.name}: {error} (--allow-other-base {does} it all the same.)") from error


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
        write_card(temporary, report, command=command)
    return bytes_of(path)


def push_patch(directory: Path, repo: str, as_json: bool, **kwargs: Any) -> str:
    """Push a patch and return its address; `kwargs` are those of [`push`]."""
    with status(f"Pushing to {repo}", as_json), quiet():
        url = push(directory, repo, **kwargs)
    if not as_json:
        stderr_console().print(f"Pushed to {escape(url)}", soft_wrap=True)
    return url
