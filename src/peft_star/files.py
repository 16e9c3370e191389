"""What is written: refused early, written completely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import CONFIG_NAME
from .sharing.card import LORA_DIR

if TYPE_CHECKING:
    pass


def check_output(path: Path, overwrite: bool, marker: str, inputs: tuple[str | Path | None, ...] = ()) -> None:
    """Refuse, before any work is done, an output that could not or should not be written at the end.

    Args:
        path: The output directory.
        overwrite: Whether it may be replaced.
        marker: The file by which an earlier output of the same kind is known. Nothing else is ever replaced: a
            mistyped `-o ~ --overwrite` must not cost a home directory.
        inputs: What the command reads, and the output must not hold.
    """
    path = path.expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; the output is a directory.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{path} is not empty; give --overwrite to replace it.")
        if not (path / marker).is_file():
            raise ValueError(
                f"{path} holds no {marker}, so --overwrite does not replace it; choose another directory."
            )
        folders = (item for item in sorted(path.iterdir()) if item.is_dir())
        folder = next((item.name for item in folders if not _is_twin(item)), None)
        if folder:
            raise ValueError(f"{path} also holds the directory {folder}, so --overwrite does not replace it.")
        for item in inputs:
            if item is not None and Path(item).exists() and Path(item).resolve().is_relative_to(path.resolve()):
                raise ValueError(f"{path} is or holds the input {item}; choose another directory for the output.")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {existing} is not a directory that you may write to.")


def _is_twin(path: Path) -> bool:
    """Whether a directory in a patch is its LoRA twin, which has to go when the patch does."""
    return (
        path.name == LORA_DIR and (path / CONFIG_NAME).is_file() and not any(item.is_dir() for item in path.iterdir())
    )


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` that takes its place when the block is done, and is gone when it fails."""
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = secrets.token_hex(4)
    temporary, old = (path.with_name(f".{path.name}.{kind}-{suffix}") for kind in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _apply_umask(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _apply_umask(directory: Path) -> None:
    """Give files the permissions that new files get here; safetensors makes its own readable by the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.expanduser().rglob("*") if path.is_file())


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write JSON to a temporary file that then takes the place of `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
