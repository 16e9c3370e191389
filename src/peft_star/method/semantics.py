"""Semantic bases of the LM head and the semantic delta (paper sections 2.2 and 3.2, equation 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch import nn

from ..models.inputs import head_of
from ..models.quantized import read_weight
from .head_factor import gram_factor
from .trace import Trace


class SemanticBases:
    """Rows of the pseudo-inverse of the LM head, for just the tokens that are asked for.

    With E (V, d) the head's weight, the semantic basis of token t is `s(t) = (EᵀE)⁻¹ E[t]` (row t of the
    pseudo-inverse of Eᵀ): the smallest representation whose logits are the projection of one-hot t onto what the head
    can express. The d x d Gram matrix is factored once, in float64 on the head's device; the V x d pseudo-inverse is
    never formed, nor a second copy of the head. Ties, biases, scales and soft-caps of the head do not enter: they act
    on the logits, behind E.

    The factor of a large head is kept on disk, see `head_factor.py`, and found again by a hash of the head.

    Args:
        weight (`torch.Tensor`): E, shape (V, d), of any floating-point type.
        rows (`Callable`): Gives E[index] for an index (n), where `weight` is not to be held in memory.

    Raises:
        ValueError: The weight holds NaN or infinite values.
    """

    def __init__(self, weight: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor] | None = None):
        weight = weight.detach()
        self._rows = rows or partial(_rows_of, weight)
        self._factor = gram_factor(weight)

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


def traced_semantics(bases: SemanticBases, traced: Trace, decoder_layer: str, norm: str) -> torch.Tensor:
    """Equation 1 for the n tokens of a trace, as a patch of an FFN in this decoder layer needs it: float64, (n, d)."""
    predictions, medium = traced.predictions, traced.medium
    rival, expected = predictions.rival[medium], predictions.expected[medium]
    return semantic_delta(bases, rival, expected, norm, traced.hidden_rms[decoder_layer])


_CACHE: WeakKeyDictionary[nn.Module, tuple[tuple, SemanticBases]] = WeakKeyDictionary()


def semantic_bases(model: nn.Module) -> SemanticBases:
    """The [`SemanticBases`] of a model's LM head, factored once per head.

    A head that is quantised, or that accelerate offloads (`device_map`, `cpu_offload`, `disk_offload`), is read when
    it is needed and not kept.

    Raises:
        ValueError: The model has no LM head, or one that cannot be read.
    """
    head: Any = head_of(model) if hasattr(model, "get_output_embeddings") else None
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
def _weight_of(head: Any, device: torch.device | None = None) -> Iterator[torch.Tensor]:
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
