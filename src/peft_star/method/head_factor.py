"""The factor of the Gram matrix EᵀE of an LM head, by which semantic bases are solved, and its file on disk."""

from __future__ import annotations

import hashlib

import torch

from ..cache import TENSORS, cache_dir, kept

# float64 copies of the head are made of so many rows at a time: few enough to stay in a processor's cache
_CHUNK_ROWS, _CHUNK_BYTES = 1024, 1 << 26
# Of the Gram matrix only the blocks on and below the diagonal are computed.
_BLOCKS = 4
# V d² from which a factor is kept on disk. One core of a processor gets through about 60e9 a second, so 2e11 is about
# 3 s of work; to read a factor back is to hash the head, at about 1 GB/s. An accelerator is ten (consumer) to a
# thousand times (data centre) as fast in float64.
_WORTH_KEEPING, _WORTH_KEEPING_ACCELERATED = 2e11, 5e12


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


def head_digest(weight: torch.Tensor) -> str:
    """SHA-256 of a tensor's shape, data type and every byte, in hexadecimal."""
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} ".encode())
    rows = max(1, _CHUNK_BYTES // max(1, weight[:1].nbytes))
    for chunk in weight.detach().split(rows):
        digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def gram_factor(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a head's weight E (V, d): `{"cholesky": L (d, d)}` with L Lᵀ = EᵀE, or the eigenpairs `{"values", "vectors"}`
    that are not noise; float64, on the CPU. From disk, or computed and kept there if that is worth it.

    Raises:
        ValueError: The weight holds NaN or infinite values.
    """
    worth = _WORTH_KEEPING if weight.device.type in ("cpu", "mps") else _WORTH_KEEPING_ACCELERATED
    if cache_dir() is None or weight.numel() * weight.shape[1] < worth:
        return _factorise(weight)
    return kept("semantics", head_digest(weight), lambda: _factorise(weight), TENSORS)
