"""How llama.cpp rounds what it multiplies with the matrices of a `.gguf` file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from torch import nn

from ..engine.arithmetic import BLOCK, Arithmetic
from ..sharing.gguf_base import read_gguf

# the K-quants and their kin come with activations in blocks of this size, all other integer types in those of BLOCK
SUPER_BLOCK = 256
_REAL = ("F64", "F32", "F16", "BF16")


def products_of(model: nn.Module) -> Arithmetic | None:
    """The arithmetic of the `.gguf` file that a model was loaded from: its matrices are unpacked already, but their
    inputs llama.cpp rounds to 8 bits. None: it was loaded from no such file, or from one of real numbers."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    path = Path(name).expanduser()
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return None
    blocks = _blocks(path, path.stat().st_mtime_ns)
    return Arithmetic("base", blocks=blocks) if blocks else None


@lru_cache
def _blocks(path: Path, changed: int) -> tuple[tuple[int, int], ...]:
    """By the number of inputs of the file's matrices the size of the blocks that their inputs are rounded in."""
    found: dict[int, int] = {}
    for tensor in read_gguf(path).tensors:
        kind, shape = tensor.tensor_type.name, tensor.shape
        if len(shape) > 1 and kind not in _REAL:
            size = BLOCK if kind[-2:] in ("_0", "_1") or kind == "IQ4_NL" else SUPER_BLOCK
            features = int(shape[0])
            # of several types the one that rounds more
            found[features] = max(size, found.get(features, 0))
    return tuple(sorted(found.items()))
