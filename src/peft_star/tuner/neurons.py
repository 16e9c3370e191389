"""The neurons of an adapter in one module: how many, which before any repair, and where their indices are held."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict

from ..sharing.patch_files import INDEX_DTYPE, check_neurons
from .config_checks import AUTO_NEURONS

# what [`count_of`] says of a module, in the words of its configuration
TOO_MANY_NEURONS = (
    "{amount} neurons were requested for the module {what}, which has only {total}; set `num_neurons` in the "
    "StarConfig to at most {total}, or to a share in (0, 1]."
)


def count_of(
    amount: int | float | str,
    total: int,
    what: str,
    too_many: str = "{amount} {what} were asked for, but there are {total}; ask for at most {total}.",
) -> int:
    """Turn a count (int) or a share (float in (0, 1]) of `total` into a count; a share is rounded, but at least 1.

    Args:
        amount: The count or the share, or "auto": 64, or as many as there are.
        total: How many there are.
        what: What is counted, for the message.
        too_many: The message, with `{amount}`, `{total}` and `{what}`.

    Raises:
        ValueError: More than there are.
    """
    if isinstance(amount, str):
        return min(AUTO_NEURONS, total)
    if isinstance(amount, float):
        return min(total, max(1, round(amount * total)))
    if amount > total:
        raise ValueError(too_many.format(amount=amount, total=total, what=what))
    return amount


def spread_neurons(num_neurons: int, in_features: int) -> torch.Tensor:
    """Return `num_neurons` indices (k,) spread evenly over `range(in_features)`: the selection before any repair.

    The range is cut into k parts of equal size, and the middle of each part is taken.
    """
    odd = 2 * torch.arange(num_neurons, dtype=torch.int64) + 1
    return (odd * in_features // (2 * num_neurons)).to(INDEX_DTYPE)


class NeuronDict(BufferDict):
    """The indices of the adapters of one layer, persistent, and checked when a loader puts them in place.

    transformers' `load_adapter` assigns tensors one by one, without asking PEFT; an index out of range would bring
    down the device in the next forward pass.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(persistent=True)
        self.in_features = in_features

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and name in self._buffers and not value.is_meta:
            value = check_neurons(value, self.in_features, f"adapter {name!r}")
        super().__setattr__(name, value)
