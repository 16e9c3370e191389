"""The pushes of one step: what is added to each layer's delta for each failure, up to its strength, under protection.

The formulas are told in `protected.py` and `solve.py`; nothing of it is the paper's but the semantic delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .bystanders import Bystanders
from .semantics import traced_semantics
from .sensitivity import natural_targets
from .solve import answers_by_problem, held_out_answers
from .subject import HeldLayer, Run
from .trace import Trace

# the ridge where failures are pushed together, relative: so large that each is pushed by what all of them have in
# common, too, and not by small differences between them, which other text has as well
RIDGE = 10.0


@dataclass
class Push:
    """One layer's part of a step: the delta becomes `origin + answer @ (c[:, None] * targets)`."""

    delta: nn.Parameter
    origin: torch.Tensor
    answer: torch.Tensor
    targets: torch.Tensor

    @torch.no_grad()
    def __call__(self, strengths: torch.Tensor) -> None:
        self.delta.copy_(self.origin + self.change(strengths))

    def change(self, strengths: torch.Tensor) -> torch.Tensor:
        """What it adds to the delta (k, d)."""
        change = self.answer @ (strengths.to(self.targets)[:, None] * self.targets)
        return change.to(self.origin.dtype)


@dataclass(frozen=True)
class Protection:
    """What the pushes are to leave alone.

    Attributes:
        factors: Per layer [`moment_factor`] (k, k), or None where nothing is protected.
        fisher: Per layer the Fisher information (d, d) of its output, or None where nothing is protected.
        bystanders: What is said beside the failures, where it limits how far a repair reaches.
    """

    factors: Sequence[torch.Tensor | None]
    fisher: Sequence[torch.Tensor | None]
    bystanders: Bystanders | None = None


@dataclass
class Replies:
    """What the pushes of one step do to the n tokens that are pushed, to first order and for strengths of 1.

    Attributes:
        ridge: With which the pushes were solved.
        descent: By how much each lowers its own token's cross entropy, if the token answers to it whole, shape (n).
        own: By how much push j (columns) lowers the cross entropy at token i (rows), float64, shape (n, n); zero
            where nobody asks.
        held_out: The same, had the pushes been solved without i's row, float64, shape (n, n).
    """

    ridge: float
    descent: torch.Tensor
    own: torch.Tensor
    held_out: torch.Tensor

    @classmethod
    def none(cls, count: int, ridge: float) -> Replies:
        """Those of `count` pushes that do nothing."""
        own, held_out = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
        return cls(ridge, torch.zeros(count), own, held_out)


def make_pushes(
    run: Run, layers: Sequence[HeldLayer], protection: Protection, traced: Trace, shared: bool, foretold: bool
) -> tuple[list[Push], Replies]:
    """Every layer's push at the deltas as they are, and what each does to the failures.

    Args:
        shared: Whether failures are pushed by what they have in common, those of each problem told from the others'.
        foretold: Whether it is asked what each push does to every failure, and would without the failure's row.
    """
    args, subject, rows = run.args, run.subject, traced.rows()
    numbers = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    ridge = max(args.ridge, RIDGE) if shared else args.ridge
    problems = [row.problem if shared else None for row in rows]
    pushes, replies = [], Replies.none(len(rows), ridge)
    for layer, factor, fisher in zip(layers, protection.factors, protection.fisher):
        gradient = traced.gradients(layer.name).double()
        semantics = traced_semantics(subject.bases, traced, subject.decoder_of[layer.name], args.norm)
        semantics = semantics.to(gradient.device)
        if fisher is None:
            targets = -semantics.abs() * gradient.sign()
        else:
            targets = natural_targets(gradient, fisher, semantics.norm(dim=1))
        activations = traced.activations(layer.name, layer.neurons).to(gradient.device)
        contexts = None
        if args.generalization > 0:
            contexts = traced.contexts(layer.name, layer.neurons).to(gradient.device)
        answer = answers_by_problem(activations, factor, ridge, problems, contexts, args.generalization)
        pushes.append(Push(layer.delta, layer.delta.detach().clone(), answer, targets))
        replies.descent -= (gradient * targets).sum(dim=1).float().cpu()
        if foretold:
            slopes = -(gradient @ targets.T)
            replies.own += (slopes * (activations.double() @ answer)).cpu()
            held_out = held_out_answers(activations, factor, ridge, problems, [numbers[row] for row in rows])
            replies.held_out += (slopes * held_out).cpu()
    return pushes, replies
