"""Semantic bases of the LM head and the semantic delta (paper sections 2.2 and 3.2, equation 1)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..models.quantized import read_weight

# float64 copies of the head are made of so many rows at a time: few enough to stay in a processor's cache
_CHUNK_ROWS, _CHUNK_BYTES = 1024, 1 << 26
# Of the Gram matrix only the blocks on and below the diagonal are computed.
_BLOCKS = 4
# V d² from which a factor is kept on disk. One core of a processor gets through about 60e9 a second, so 2e11 is about
# 3 s of work; to read a factor back is to hash the head, at about 1 GB/s. An accelerator is ten (consumer) to a
# thousand times (data centre) as fast in float64.
_WORTH_KEEPING, _WORTH_KEEPING_ACCELERATED = 2e11, 5e12
_FORMAT = "peft_star semantic bases 1"


class SemanticBases:
    """Rows of the pseudo-inverse of the LM head, for just the tokens that are asked for.

    With E (V, d) the head's weight, the semantic basis of token t is `s(t) = (EᵀE)⁻¹ E[t]` (row t of the
    pseudo-inverse of Eᵀ): the smallest representation whose logits are the projection of one-hot t onto what the head
    can express. The d x d Gram matrix is factored once, in float64 on the head's device; the V x d pseudo-inverse is
    never formed, nor a second copy of the head. Ties, biases, scales and soft-caps of the head do not enter: they act
    on the logits, behind E.

    The factor of a large head is kept on disk, see [`cache_dir`], and found again by a hash of the head.

    Args:
        weight (`torch.Tensor`): E, shape (V, d), of any floating-point type.
        rows (`Callable`): Gives E[index] for an index (n), where `weight` is not to be held in memory.

    Raises:
        ValueError: The weight holds NaN or infinite values.
    """

    def __init__(self, weight: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor] | None = None):
        weight = weight.detach()
        self._rows = rows or partial(_rows_of, weight)
        self._factor = _kept_factor(weight)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Semantic bases of `tokens` (n), float64 on the CPU, shape (n, d)."""
        unique, inverse = torch.unique(tokens.cpu(), return_inverse=True)
        rows = self._rows(unique).cpu().double()
        if "cholesky" in self._factor:
            bases = torch.cholesky_solve(rows.T, self._factor["cholesky"]).T
        else:
            values, vectors = self._factor["values"], self._factor["vectors"]
            bases = (rows @ vectors / values) @ vectors.T
        return bases[inverse]


def _rows_of(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return weight[index.to(weight.device)]


def _gram(weight: torch.Tensor) -> torch.Tensor:
    """EᵀE in float64, shape (d, d); only its lower triangle is meant."""
    d = weight.shape[1]
    device = "cpu" if weight.device.type == "mps" else weight.device  # which has no float64
    gram = torch.zeros(d, d, dtype=torch.float64, device=device)
    count, step = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (8 * d))), -(-d // _BLOCKS)
    for rows in weight.split(count):
        rows = rows.to(device).double()
        for start in range(0, d, step):
            gram[start:, start : start + step].addmm_(rows[:, start:].T, rows[:, start : start + step])
    return gram


def _factorise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The Gram matrix's Cholesky factor, or, when it is singular, the eigenpairs that are not noise; on the CPU."""
    gram = _gram(weight)
    # float32 products would save a quarter of the time, but put 4e-6 to 4e-5 of error into real heads' bases
    if not gram.diagonal().isfinite().all():
        raise ValueError("The LM head holds NaN or infinite values; repair a model whose weights are finite.")
    factor, info = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    # a pivot lost in rounding means a direction the head cannot see: leave it out instead of dividing by noise
    if info.item() == 0 and (diagonal.min() / diagonal.max()).square() > 1e-12:
        return {"cholesky": factor.cpu().contiguous()}
    del factor, diagonal
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[-1] * 1e-10
    return {"values": values[keep].cpu(), "vectors": vectors[:, keep].cpu().contiguous()}


def cache_dir() -> Path | None:
    """Where the factors of large heads are kept: `$PEFT_STAR_CACHE`, by default `$HF_HOME/peft_star`.

    A factor takes 8 d² bytes (134 MB for d = 4096). Any of the files can be deleted at any time. None: none are kept,
    because `PEFT_STAR_CACHE` is empty or 0.
    """
    setting = os.environ.get("PEFT_STAR_CACHE")
    if setting is None:
        return Path(HF_HOME) / "peft_star"
    return None if setting.strip() in ("", "0") else Path(setting).expanduser()


def head_digest(weight: torch.Tensor) -> str:
    """SHA-256 of a tensor's shape, data type and every byte, in hexadecimal."""
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} ".encode())
    rows = max(1, _CHUNK_BYTES // max(1, weight[:1].nbytes))
    for chunk in weight.detach().split(rows):
        digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _kept_factor(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The factor from disk, or computed and kept there if that is worth it."""
    directory = cache_dir()
    worth = _WORTH_KEEPING if weight.device.type in ("cpu", "mps") else _WORTH_KEEPING_ACCELERATED
    if directory is None or weight.numel() * weight.shape[1] < worth:
        return _factorise(weight)
    digest = head_digest(weight)
    path = directory / "semantics" / f"{digest}.safetensors"
    factor = _load_factor(path, digest)
    if factor is None:
        factor = _factorise(weight)
        _save_factor(path, digest, factor)
    return factor


def _metadata(digest: str, factor: dict[str, torch.Tensor]) -> dict[str, str]:
    sums = " ".join(f"{name}:{head_digest(factor[name])}" for name in sorted(factor))
    return {"format": _FORMAT, "head": digest, "factor": sums}


def _load_factor(path: Path, digest: str) -> dict[str, torch.Tensor] | None:
    """None if there is no such file, or another or a damaged one in its place."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if not metadata or metadata.get("head") != digest:
                return None
            factor = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return None
    return factor if metadata == _metadata(digest, factor) else None


def _save_factor(path: Path, digest: str, factor: dict[str, torch.Tensor]) -> None:
    """Keep a factor; where that cannot be done (no right to write, no space left), it is computed again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a directory of its own inside the same file system: whatever interrupts this, nothing half-written stays
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-", ignore_cleanup_errors=True) as directory:
            written = Path(directory, path.name)
            save_file(factor, written, metadata=_metadata(digest, factor))
            written.replace(path)
    except (OSError, SafetensorError):
        pass


_CACHE: WeakKeyDictionary[nn.Module, tuple[tuple, SemanticBases]] = WeakKeyDictionary()


def semantic_bases(model: nn.Module) -> SemanticBases:
    """The [`SemanticBases`] of a model's LM head, factored once per head.

    A head that is quantised, or that accelerate offloads (`device_map`, `cpu_offload`, `disk_offload`), is read when
    it is needed and not kept.

    Raises:
        ValueError: The model has no LM head, or one that cannot be read.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        raise ValueError(f"{type(model).__name__} has no LM head; a repair needs a causal language model.")
    if weight.is_meta or not _is_plain(weight):
        with _weight_of(head) as weight:
            return SemanticBases(weight, partial(_rows_of_head, head))
    key = (weight.data_ptr(), weight._version, weight.shape, weight.dtype)
    cached = _CACHE.get(head)
    if cached is None or cached[0] != key:
        cached = _CACHE[head] = (key, SemanticBases(weight))
    return cached[1]


def _is_plain(weight: torch.Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.ndim == 2


@contextmanager
def _weight_of(head: nn.Module, device: torch.device | None = None) -> Iterator[torch.Tensor]:
    """The head's weight (V, d) in floating point: brought to its execution device (or `device`) if it is offloaded,
    dequantised if it is quantised."""
    with align_module_device(head, device if head.weight.is_meta else None):
        weight = head.weight if _is_plain(head.weight) else read_weight(head)
        if weight is None or not weight.is_floating_point() or weight.ndim != 2:
            raise ValueError(
                "The LM head is quantised in a form that cannot be read; keep the head in floating point."
            )
        if weight.is_meta:
            raise ValueError(
                "The LM head's weight is not loaded (it is on the meta device); load the model with its weights."
            )
        yield weight.detach()


def _rows_of_head(head: nn.Module, index: torch.Tensor) -> torch.Tensor:
    with _weight_of(head, torch.device("cpu")) as weight:
        return _rows_of(weight, index)


def semantic_delta(
    bases: SemanticBases,
    argmax: torch.Tensor,
    expected: torch.Tensor,
    norm: str = "std",
    hidden_rms: torch.Tensor | None = None,
) -> torch.Tensor:
    """Equation 1: `s_Δ = norm(s(argmax) − s(expected))`, one row per failure.

    Args:
        bases: The head's semantic bases.
        argmax, expected (`torch.Tensor`): Token ids, shape (n).
        norm (`str`): `"std"`, `"rms"`, `"max"` or `"l2"`; see [`RepairArguments`].
        hidden_rms (`torch.Tensor`): Root mean square (n) of the hidden states that the patched layer hands on at the
            medium tokens; needed by `"rms"`.

    Returns:
        `torch.Tensor`: float64, shape (n, d).
    """
    delta = bases(argmax) - bases(expected)
    if norm == "std":
        return delta / delta.std(dim=-1, keepdim=True, correction=0)
    if norm == "max":
        return delta / delta.abs().amax(dim=-1, keepdim=True)
    if norm == "l2":
        return delta / delta.norm(dim=-1, keepdim=True)
    if norm == "rms":
        if hidden_rms is None:
            raise ValueError("norm 'rms' needs the medium tokens' `hidden_rms`.")
        return delta / delta.square().mean(dim=-1, keepdim=True).sqrt() * hidden_rms.to(delta)[:, None]
    raise ValueError(f"`norm` is {norm!r}; choose one of 'std', 'rms', 'max', 'l2'.")
