"""What was found out about a model, kept on disk: read there again, or computed again where that cannot be done."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import new_file

T = TypeVar("T")

_VERSION = "peft_star cache 1"
# what reading says of a file that is not there, is of another kind, or is damaged; torch says RuntimeError of one that
# goes away while it is opened
_UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, RuntimeError)


@dataclass(frozen=True)
class Form:
    """How a thing is written.

    Attributes:
        suffix: What its file's name ends in.
        read: Gives the thing, from a file that is to hold what belongs to a digest, or raises one of `_UNREADABLE`.
        write: Writes the thing to a file, with the digest where the form has room for it.
    """

    suffix: str
    read: Callable[[Path, str], Any]
    write: Callable[[Path, str, Any], Any]


def cache_dir() -> Path | None:
    """Where what was found out about a model is kept: `$PEFT_STAR_CACHE`, by default `$HF_HOME/peft_star`.

    Factors of large heads (8 d² bytes, 134 MB for d = 4096), what a model says by itself, and what that depends on.
    Any of the files can be deleted at any time. None: none are kept, because `PEFT_STAR_CACHE` is empty or 0.
    """
    setting = os.environ.get("PEFT_STAR_CACHE")
    if setting is None:
        return Path(HF_HOME) / "peft_star"
    return None if setting.strip() in ("", "0") else Path(setting).expanduser()


def kept(
    folder: str,
    of: str | None,
    compute: Callable[[], T],
    form: Form,
    whole: Callable[[T], bool] = lambda found: True,
    *,
    gather: Callable[[bool], Sequence[bool]] = lambda found: [found],
    writes: bool = True,
) -> T:
    """What lies on disk, or else what is computed, and kept there for the next time.

    Several processes may do so at once: each file takes its place when it is complete. Where it cannot be written (no
    right to, no space left), it is computed again next time.

    Args:
        folder: The folder of the cache, a name for things of this kind.
        of: All that the thing depends on, as a text: two that differ are kept side by side. None: it cannot be told,
            so nothing is kept.
        compute: Computes it.
        form: `JSON`, or `TENSORS`, which also tells where a bit has changed on disk.
        whole: Whether what was read can be it. It may raise `ValueError` and `TypeError` on what has another form.
        gather: What the processes that compute it together have each, such as [`Team.gather`]. They all compute it
            when one of them has not found it.
        writes: Whether this process is the one of them that writes.
    """
    directory = cache_dir()
    path: Path | None = None
    found: Any = None
    if directory is not None and of is not None:
        digest = hashlib.sha256(of.encode()).hexdigest()
        path = directory / folder / f"{digest}{form.suffix}"
        try:
            found = form.read(path, digest)
            found = found if whole(found) else None
        except _UNREADABLE:
            found = None
    if not all(gather(found is not None)):
        found = compute()
        if path is not None and writes:
            try:
                with new_file(path) as unfinished:
                    form.write(unfinished, digest, found)
            except (OSError, SafetensorError):
                pass
    return found


def _read_json(path: Path, digest: str) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, digest: str, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _read_tensors(path: Path, digest: str) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if not metadata or metadata.get("of") != digest:
            raise ValueError("it is of something else")
        found = {name: file.get_tensor(name) for name in file.keys()}
    if metadata != _metadata(digest, found):
        raise ValueError("it is damaged")
    return found


def _write_tensors(path: Path, digest: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata=_metadata(digest, tensors))


def _metadata(digest: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    sums = (f"{zlib.crc32(tensors[name].view(torch.uint8).numpy().data):08x}" for name in sorted(tensors))
    return {"format": _VERSION, "of": digest, "sums": " ".join(sums)}


JSON = Form(".json", _read_json, _write_json)
TENSORS = Form(".safetensors", _read_tensors, _write_tensors)
