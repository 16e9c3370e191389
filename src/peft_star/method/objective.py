"""What a patch has to reach: every failure solved by the margin, and nothing that was right wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..engine.predictions import Predictions


@dataclass
class Task:
    """The failures `medium` and the tokens `right_before`, masks over the S completion tokens; no token is in both."""

    medium: torch.Tensor
    right_before: torch.Tensor
    margin: float

    @classmethod
    def of(cls, medium: torch.Tensor, before: Predictions, margin: float) -> Task:
        """The task of solving the slots `medium` (n), starting from the predictions `before` (S)."""
        is_medium = torch.zeros_like(before.right)
        is_medium[medium] = True
        return cls(is_medium, before.right & ~is_medium, margin)

    def broken(self, now: Predictions) -> torch.Tensor:
        return self.right_before & ~now.right

    def wanting(self, now: Predictions) -> torch.Tensor:
        """Tokens that are not as they should be: failures not solved by the margin, and broken ones."""
        return self.medium & ~now.solved(self.margin) | self.broken(now)

    def done(self, now: Predictions) -> bool:
        return not self.wanting(now).any()

    def score(self, now: Predictions, harmed: int = 0) -> tuple[int, int, int]:
        """Ranks states: most failures right, then fewest tokens broken (`harmed`: elsewhere), then most solved."""
        return (
            int(now.right[self.medium].sum()),
            -int(self.broken(now).sum()) - harmed,
            int(now.solved(self.margin)[self.medium].sum()),
        )

    def shortfall(self, now: Predictions) -> torch.Tensor:
        """By how much the logit gap of each of the S tokens falls short of what the margin needs (below 0: enough).

        With s = p(expected) + p(rival), the margin is s · tanh(gap / 2). Where s is still too small for the margin, a
        gap is aimed at with which both would hold enough of the probability.
        """
        enough = min((1 + self.margin) / 2, 2 * self.margin)
        share = (2 * now.p_expected - now.margin).clamp(min=max(enough, 1e-6))
        return 2 * torch.atanh(self.margin / share) - now.gap
