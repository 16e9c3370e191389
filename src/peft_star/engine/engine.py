"""The engine: a model and the ways in which its passes over rows are made fast. It knows no patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

from ..failures import Row
from ..models.inputs import input_device
from .batch import Batch, make_batches
from .distributed import ALONE, Team
from .replay import Replay


@dataclass(frozen=True)
class Engine:
    """What every pass needs.

    Attributes:
        model: A causal LM.
        max_batch_tokens: Tokens of one batch, padding included.
        team: The processes that batches are dealt out to.
        replay: Context around the forward of a batch that may be repeated, see [`Replay`].
    """

    model: nn.Module
    max_batch_tokens: int = 2048
    team: Team = ALONE
    replay: Callable[[Batch], AbstractContextManager] = nullcontext

    def forget(self) -> None:
        """Drop what was recorded of the lower layers, because they have changed."""
        if isinstance(self.replay, Replay):
            self.replay.drop()

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        """The rows in batches for this model, such that each process gets one."""
        limit = self.team.limit(self.max_batch_tokens, rows)
        return make_batches(rows, limit, input_device(self.model), self.model)
