"""Files and directories that are written completely or not at all, and outputs that are refused early."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_output(
    path: Path,
    overwrite: bool,
    marker: str,
    inputs: tuple[str | Path | None, ...] = (),
    part: str | None = None,
) -> None:
    """Refuse, before any work is done, an output that could not or should not be written at the end.

    Args:
        path: The output directory.
        overwrite: Whether it may be replaced.
        marker: The file by which an earlier output of the same kind is known. Nothing else is ever replaced: a
            mistyped `-o ~ --overwrite` must not cost a home directory.
        inputs: What the command reads, and the output must not hold.
        part: The marker of the one directory in the output that belongs to it and goes with it, such as
            "lora/adapter_config.json". Any other directory may be somebody else's.

    Raises:
        ValueError: One sentence that says why not.
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
        folder = next((item.name for item in folders if not _is_part(item, part)), None)
        if folder:
            raise ValueError(f"{path} also holds the directory {folder}, so --overwrite does not replace it.")
        for item in inputs:
            if item is not None and Path(item).exists() and Path(item).resolve().is_relative_to(path.resolve()):
                raise ValueError(f"{path} is or holds the input {item}; choose another directory for the output.")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {existing} is not a directory that you may write to.")


def _is_part(folder: Path, part: str | None) -> bool:
    """Whether a directory in an output is the one that goes with it: it has the name and the marker, and no more."""
    if part is None or Path(part).parent != Path(folder.name):
        return False
    return (folder.parent / part).is_file() and not any(item.is_dir() for item in folder.iterdir())


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


def write_json(path: str | os.PathLike, content: Any, **style: Any) -> None:
    """Write JSON to a temporary file that then takes the place of `path`.

    Args:
        path: The file.
        content: What `json.dumps` takes.
        style: Settings of `json.dumps` in place of one space of indentation and letters as they are.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(content, **{"indent": 1, "ensure_ascii": False, **style})
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def bytes_of(directory: Path) -> int:
    """The size of all files in a directory and below."""
    return sum(path.stat().st_size for path in directory.expanduser().rglob("*") if path.is_file())
