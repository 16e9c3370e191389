"""The tokens beside the failures, in the same rows: what their neurons do, and what the model says there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.passes import completion_logits
from ..engine.predictions import Predictions
from ..engine.recording import recording_inputs

# tokens of a batch at which the model's words are watched: their logits are the cost
WATCHED = 512
# a word may lose this much of its probability; words that were nearly even with others may change places by less
LOSS = 0.07
# fewer words than these say nothing of what a patch disturbs
FEWEST = 20


@dataclass(frozen=True)
class Bystanders:
    """What neurons do at the tokens beside the failures, and what the model says at some `WATCHED` of each batch.

    Where the model says what is wrong at the failures, it is not held to that: there, too, it should say another word.

    Attributes:
        activations: Per second matrix those of the chosen neurons, shape (N, k), in this process's batches.
        batches: The rows, by what reads the model's words in them.
        said: The words (M), token ids.
        p: With which probabilities (M).
        held: To which of them (M) the model is held.
        patience: How many times `LOSS` a word may lose.
    """

    activations: dict[str, torch.Tensor]
    batches: dict[Batch, Batch]
    said: torch.Tensor
    p: torch.Tensor
    held: torch.Tensor
    patience: float = 1.0

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        engine: Engine,
        batches: Sequence[Batch],
        failing: torch.Tensor,
        ffns: dict[str, nn.Module],
        neurons: dict[str, torch.Tensor],
        wrong: torch.Tensor | None = None,
    ) -> Bystanders:
        """Read the model as it is, by one forward.

        Args:
            engine: Runs the pass.
            batches: The rows.
            failing: Slots of the failures.
            ffns: The second matrices by name.
            neurons: Of each the neurons (k) whose activations are wanted, int64.
            wrong: Token ids that are wrongly said at the failures; None: no words are wanted.
        """
        reading, masks, start = {}, {}, 0
        for batch in batches:
            mask = masks[batch] = _beside(batch, failing)
            rows, positions = mask.nonzero(as_tuple=True)
            step = max(1, -(-len(rows) // WATCHED) if wrong is not None else len(rows))
            rows, positions = rows[::step], positions[::step]
            slots = torch.arange(start, start + len(rows), device=rows.device)
            start += len(rows)
            read = replace(batch, rows=rows, positions=positions, expected=torch.zeros_like(rows), slots=slots)
            reading[read] = batch
        found = {name: [torch.zeros(0, len(chosen), device=chosen.device)] for name, chosen in neurons.items()}
        heard = Predictions.empty(start)
        for reader in engine.team.share(list(reading)):
            batch = reading[reader]
            with recording_inputs(ffns) as seen:
                _listen(engine, reader, batch, heard)
            for name, chosen in neurons.items():
                (values,) = seen[name]
                values = values[masks[batch].flatten().to(values.device)].index_select(1, chosen.to(values.device))
                found[name].append(values.to(found[name][0]))
        engine.team.join(heard, list(reading))
        # `expected` was any token: where it was not said, its rival was
        p = torch.where(heard.right, heard.p_expected, heard.p_expected - heard.margin)
        held = torch.ones_like(heard.right) if wrong is None else ~torch.isin(heard.argmax, wrong.cpu())
        activations = {name: torch.cat(parts) for name, parts in found.items()}
        return cls(activations, reading, heard.argmax, p, held)

    def undisturbed(self, engine: Engine) -> bool:
        """Whether the model as it is now says its words hardly less surely; not where they are too few to tell."""
        if self.held.sum() < FEWEST:
            return False
        return bool((self.p - self._heard(engine) <= LOSS * self.patience)[self.held].all())

    def as_now(self, engine: Engine, patience: float) -> Bystanders:
        """The same, as surely as the model says them now."""
        return self if self.held.sum() < FEWEST else replace(self, p=self._heard(engine), patience=patience)

    @torch.no_grad()
    def _heard(self, engine: Engine) -> torch.Tensor:
        """The words' probabilities (M) in the model as it is now."""
        now = Predictions.empty(len(self.said))
        for reader in engine.team.share(list(self.batches)):
            words = replace(reader, expected=self.said[reader.slots.cpu()].to(reader.rows.device))
            _listen(engine, words, self.batches[reader], now)
        engine.team.join(now, list(self.batches))
        return now.p_expected


def _beside(batch: Batch, failing: torch.Tensor) -> torch.Tensor:
    """Which of the batch's tokens (B, T) are neither padding nor in front of a failing token."""
    mask = batch.tokens.clone()
    at = torch.isin(batch.slots, failing.to(batch.slots.device))
    mask[batch.rows[at], batch.positions[at]] = False
    return mask


def _listen(engine: Engine, reader: Batch, batch: Batch, into: Predictions) -> None:
    """Read what the model says in the batch where the `reader` has its tokens."""
    with engine.replay(batch):
        into.read(reader, completion_logits(engine.model, reader))
