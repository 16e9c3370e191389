"""Margins as wide as the arithmetic that will serve a repair needs them, and a look at it in that arithmetic.

What serves a model rounds otherwise than what repaired it: in another data type, or to llama.cpp's 8-bit integers
before each product. A gap between two logits that is smaller than what rounding moves them by is no repair there. So
each precision computes the rows once before the repair. How far a token's gap moves then says how wide it must be, and
how it stands after the patch says whether that was enough (not in the paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.arithmetic import ARITHMETICS, BF16, FP16, FP32, Arithmetic, computes_in_other_types, predict_in
from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.predictions import Predictions
from .gguf_products import products_of

# a gap is made so many times as wide as rounding is seen to move it, and is wide enough at so many times
AIMED, ENOUGH = 5.5, 4.0
# for how many of a token's own movements the mean square of all counts
PRIOR = 2.0
# rounds in which what does not hold is pushed further
ROUNDS = 3

Under = Mapping[str, Predictions]


@dataclass(frozen=True)
class Serving:
    """The arithmetics that a repair is to hold in, other than the model's own, by the names that the user gave.

    Each has an engine of its own, since what is replayed of lower layers is computed in it as well.
    """

    engines: Mapping[str, tuple[Arithmetic, Engine]]

    def __bool__(self) -> bool:
        return bool(self.engines)

    def look(self, batches: Sequence[Batch], into: Predictions) -> dict[str, Predictions]:
        """By arithmetic what the model says in it at the batches' tokens, in copies of `into` (S)."""
        return {
            name: predict_in(engine, arithmetic, batches, into.copy())
            for name, (arithmetic, engine) in self.engines.items()
        }

    def forget(self) -> None:
        """Drop what was recorded of the lower layers, because they have changed."""
        for _, engine in self.engines.values():
            engine.forget()


def arithmetics(model: Any, names: Sequence[str]) -> dict[str, Arithmetic]:
    """What the names of `RepairArguments.serve` stand for, but for what the model computes in anyway.

    The base's own arithmetic is that of its `.gguf` file. Of a base in a short type it is float32 ("fp32"): engines
    that compute in one short type differ from each other about as much as from it, and the model beside itself would
    show nothing. Of a quantised base there is none: what its layers are given must be of their type.
    """
    found, dtype = {}, model.get_input_embeddings().weight.dtype
    for name in names:
        arithmetic = _own(model, dtype) if name == "base" else ARITHMETICS[name]
        if arithmetic is not None and (arithmetic.dtype != dtype or arithmetic.blocks):
            found[arithmetic.name if name == "base" else name] = arithmetic
    return found


def _own(model: Any, dtype: torch.dtype) -> Arithmetic | None:
    products = products_of(model)
    if products is None and dtype in (BF16.dtype, FP16.dtype) and computes_in_other_types(model):
        return FP32
    return products


def movements(*looks: tuple[Predictions, Under]) -> torch.Tensor | None:
    """How far rounding moves the gap between the logits of each of some tokens (n) and of its rival: a standard
    deviation in the arithmetic that moves it most. None: there is none but the model's own.

    What rounding does to one token differs from patch to patch, and from engine to engine of one type, like a draw
    from a distribution. So with a token's own movements, one in each look, go `PRIOR` of the mean size of all.

    Args:
        looks: What was said in the model's own arithmetic and in the others.
    """
    most = None
    for name in looks[0][1]:
        draws = torch.stack([(under[name].gap - here.gap).square() for here, under in looks])
        moved = ((draws.sum(dim=0) + PRIOR * draws.mean()) / (len(looks) + PRIOR)).sqrt()
        most = moved if most is None else torch.maximum(most, moved)
    return most


def needed_gaps(*looks: tuple[Predictions, Under]) -> torch.Tensor | None:
    """How far apart the logits of each token (n) and of its rival should be to hold in every arithmetic."""
    moved = movements(*looks)
    return None if moved is None else AIMED * moved
