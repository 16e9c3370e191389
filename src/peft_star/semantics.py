"""Semantic bases of the LM head and the semantic delta (paper section 2.2, 3.2 and equation 1)."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from .quantized import read_weight

CHUNK = 8192


class SemanticBases:
    """Rows of the pseudo-inverse of the LM head, for just the tokens that are asked for.

    With E (V, d) the head's weight, the semantic basis of token t is `s(t) = (EᵀE)⁻¹ E[t]` (row t of the
    pseudo-inverse of Eᵀ): the smallest representation whose logits are the projection of one-hot t onto what the head
    can express. The d x d Gram matrix is factored once; the V x d pseudo-inverse is never formed. Ties, biases, scales
    and soft-caps of the head do not enter: they act on the logits, behind E.

    Args:
        weight (`torch.Tensor`): E, shape (V, d).
    """

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.detach()
        gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
        for rows in self.weight.split(CHUNK):
            rows = rows.double()
            gram.addmm_(rows.T, rows)
        self._cholesky, self._eigen = None, None
        factor, info = torch.linalg.cholesky_ex(gram)
        diagonal = factor.diagonal()
        # a pivot lost in rounding means a direction the head cannot see: leave it out instead of dividing by noise
        if info.item() == 0 and (diagonal.min() / diagonal.max()).square() > 1e-12:
            self._cholesky = factor
        else:
            values, vectors = torch.linalg.eigh(gram)
            keep = values > values[-1] * 1e-10
            self._eigen = values[keep], vectors[:, keep]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Semantic bases of `tokens` (n), float64, shape (n, d)."""
        unique, inverse = torch.unique(tokens.to(self.weight.device), return_inverse=True)
        rows = self.weight[unique].double()
        if self._cholesky is not None:
            bases = torch.cholesky_solve(rows.T, self._cholesky).T
        else:
            values, vectors = self._eigen
            bases = (rows @ vectors / values) @ vectors.T
        return bases[inverse]


_CACHE: WeakKeyDictionary[nn.Module, tuple[tuple, SemanticBases]] = WeakKeyDictionary()


def semantic_bases(model: nn.Module) -> SemanticBases:
    """The [`SemanticBases`] of a model's LM head, factored once per head.

    Raises:
        ValueError: The model has no LM head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        raise ValueError(f"{type(model).__name__} has no LM head; a repair needs a causal language model.")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.ndim != 2:
        weight = read_weight(head)
        if weight is None or not weight.is_floating_point() or weight.ndim != 2:
            raise ValueError(
                "The LM head is quantised in a form that cannot be read; keep the head in floating point."
            )
        return SemanticBases(weight)
    key = (weight.data_ptr(), weight._version, weight.shape, weight.dtype)
    cached = _CACHE.get(head)
    if cached is None or cached[0] != key:
        cached = _CACHE[head] = (key, SemanticBases(weight))
    return cached[1]


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
