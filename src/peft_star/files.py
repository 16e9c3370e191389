"""Files and directories that are written completely or not at all, and outputs that are refused early."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # whether it is there is asked for

# of the numbers in temporary names
_DIGITS = 8


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
    recover(path)
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
    check_writable(path)


def check_file_output(path: Path, overwrite: bool, magic: bytes, inputs: tuple[str | Path | None, ...] = ()) -> None:
    """Refuse, before any work is done, an output file that could not or should not be written at the end.

    Args:
        path: The output file.
        overwrite: Whether it may be replaced.
        magic: The bytes that an earlier output of the same kind begins with. Nothing else is ever replaced.
        inputs: What the command reads, which is not replaced either.

    Raises:
        ValueError: One sentence that says why not.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a directory; the output is a file.")
    if path.exists():
        if not overwrite:
            raise ValueError(f"{path} is there already; give --overwrite to replace it.")
        for item in inputs:
            if item is not None and Path(item).expanduser().exists() and path.samefile(Path(item).expanduser()):
                raise ValueError(f"{path} is the input {item}; choose another file for the output.")
        with path.open("rb") as file:
            if file.read(len(magic)) != magic:
                raise ValueError(
                    f"{path} is another kind of file, so --overwrite does not replace it; choose another name."
                )
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse an output, a file or a directory, in a place where nothing may be written."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {existing} is not a directory that you may write to.")


def _is_part(folder: Path, part: str | None) -> bool:
    """Whether a directory in an output is the one that goes with it: it has the name and the marker, and no more."""
    if part is None or Path(part).parent != Path(folder.name):
        return False
    return (folder.parent / part).is_file() and not any(item.is_dir() for item in folder.iterdir())


class KeptElsewhere(OSError):
    """A finished directory could not take its place; the message says where it is kept."""


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """An empty directory beside `path` that takes its place when the block is done, and is gone when it fails.

    What killed runs of the same output left behind is brought back or swept first; see [`recover`].

    Args:
        path: The output directory.
        overwrite: Whether what lies there when the block is done may be replaced.

    Raises:
        KeptElsewhere: The finished directory could not take its place.
    """
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    with _beside(path, Path.mkdir) as temporary:
        old = path.with_name(f".{path.name}.old-{temporary.name[-_DIGITS:]}")
        try:
            yield temporary
            _apply_umask(temporary)
            _place(temporary, path, old, overwrite)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """An empty file beside `path` that takes its place when the block is done, and is gone when it fails.

    What killed runs of the same output left behind is swept first.

    Args:
        path: The output file.
        overwrite: Whether what lies there when the block is done may be replaced.

    Raises:
        KeptElsewhere: The finished file could not take its place.
    """
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_files(path)
    with _beside(path, Path.touch) as temporary:
        try:
            yield temporary
            if path.exists() and not overwrite:
                raise _kept(temporary, path, "has come to be meanwhile")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _sweep_files(path: Path) -> None:
    """Remove what runs that were killed while they wrote a file have left beside it."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.new-[0-9a-f]{{{_DIGITS}}}")
    with contextlib.suppress(OSError):
        for item in [item for item in path.parent.iterdir() if item.is_file() and pattern.fullmatch(item.name)]:
            handle = _claim(item)
            if handle is not None:
                item.unlink(missing_ok=True)
                os.close(handle)


def _place(temporary: Path, path: Path, old: Path, overwrite: bool) -> None:
    """Give a finished directory its name. Between the two renames a kill leaves what [`recover`] mends."""
    try:
        if overwrite and path.exists():
            path.rename(old)
        with contextlib.suppress(OSError):  # an empty directory is no output
            path.rmdir()
        temporary.rename(path)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        if not isinstance(error, OSError):
            raise
        why = "is not empty any more" if path.exists() else f"cannot be written ({error.strerror})"
        raise _kept(temporary, path, why) from error


def _kept(temporary: Path, path: Path, why: str) -> KeptElsewhere:
    """Give what is finished another name beside `path`, and say so."""
    kept = temporary.rename(path.with_name(f"{path.name}.kept-{secrets.token_hex(4)}"))
    return KeptElsewhere(f"{path} {why}; what was to be written there is kept in {kept}.")


def recover(path: Path) -> None:
    """Mend what runs that were killed while they wrote a directory have left beside it.

    When its name is free, because the kill came between the two renames of a swap, the new directory, which is
    complete by then, gets it, or else the old one. All else is swept. Directories of living runs are left alone.
    """
    path = path.expanduser().resolve()
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(new|old)-([0-9a-f]{{{_DIGITS}}})")
    with contextlib.suppress(OSError):
        found = [
            (match[2], match[1], item) for item in path.parent.iterdir() if (match := pattern.fullmatch(item.name))
        ]
        runs = {suffix: {kind: item for other, kind, item in found if other == suffix} for suffix, _, _ in found}
        for run in runs.values():
            handles = [_claim(item) for item in run.values()]
            if None not in handles:
                if "old" in run and not path.exists():
                    run.pop("new" if "new" in run else "old").rename(path)
                for item in run.values():
                    shutil.rmtree(item, ignore_errors=True)
            for handle in handles:
                if handle is not None:
                    os.close(handle)


def _claim(item: Path, wait: bool = False) -> int | None:
    """Keep other processes from taking a file or a directory for one that a killed run has left.

    Args:
        item: The file or directory.
        wait: Wait for another process's claim to end.

    Returns:
        A file descriptor; the claim ends when it is closed or its process ends. None: the item is gone, or another
        process has a claim, or claims cannot be made here (on Windows, and on some network drives), so that nothing is
        ever swept.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(item, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def _beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or directory beside `path`, made by `make`, with a claim to it for the time of the block, if claims
    can be made here; see [`_claim`]."""
    while True:
        item = path.with_name(f".{path.name}.new-{secrets.token_hex(_DIGITS // 2)}")
        make(item)
        handle = _claim(item, wait=True)
        # another process that sweeps may have been faster than the claim
        if item.exists():
            break
        if handle is not None:
            os.close(handle)
    try:
        yield item
    finally:
        if handle is not None:
            os.close(handle)


def _apply_umask(directory: Path) -> None:
    """Give files the permissions that new files get here; safetensors makes its own readable by the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def parse_json(text: str) -> Any:
    """What a JSON text of unknown origin says.

    Raises:
        ValueError: It is no JSON, or cannot be read; one line.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Where a key is there twice, readers differ in which of them counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:40]!r} is there twice")
        found[key] = value
    return found


def read_json(path: Path) -> Any:
    """What a JSON file of unknown origin says, in texts that can be written again.

    Raises:
        ValueError: As of [`parse_json`], or its text is none.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from None
    content = parse_json(text)
    if "\\ud" in text.lower():  # how JSON can hold half of a character, of which no file can be made
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            bad = ord(error.object[error.start])
            raise ValueError(f"it holds \\u{bad:04x}, half of a character") from None
    return content


def what_is_wrong(error: Exception) -> str:
    """In words why the content of a JSON file could not be taken: what Python says of it is for programmers."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if " object " in str(error) or str(error).startswith("unhashable"):
        return "it holds values of other kinds"
    return str(error)


def write_json(path: str | os.PathLike, content: Any, **style: Any) -> None:
    """Write JSON to a temporary file that then takes the place of `path`.

    Args:
        path: The file.
        content: What `json.dumps` takes.
        style: Settings of `json.dumps` in place of one space of indentation and letters as they are.
    """
    text = json.dumps(content, **{"indent": 1, "ensure_ascii": False, **style})
    with new_file(Path(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def bytes_of(directory: Path) -> int:
    """The size of all files in a directory and below."""
    return sum(path.stat().st_size for path in directory.expanduser().rglob("*") if path.is_file())
