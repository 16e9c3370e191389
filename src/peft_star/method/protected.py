"""Protected patching: each failure is pushed as strongly as it needs, by what tells it from background text.

Algorithm 1 multiplies a prior's magnitude by the gradient's sign, entry by entry. That loses what the least squares
knew: which combination of neurons answers to this failure and to nothing else. Here the sign is taken one step
earlier. The semantic delta of failure i gets the signs of the gradient at its medium token,
t_i = −|s_Δ| ⊙ sign(∂L/∂o), and equation 2 is solved for these targets under a protection,

    min_W ‖V W − diag(c) T‖² + λ tr(Wᵀ (C + ε I) W),

with C the neurons' second moment on background text: the patch answers to what sets the failures' activations apart
from the background. The solution is P diag(c) T with a P (k, n) that does not depend on the strengths c (n), so
these are found by forward passes alone (see `search.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..engine.distributed import ALONE, Team
from ..engine.predictions import Predictions
from .objective import Task
from .solve import solve_prior
from .strengths import search_strengths
from .trace import Trace

# ε of the background's second moment, relative to its mean diagonal: neurons that the background never shows are
# not free
FLOOR = 0.1
# a search goes up to this many times the learning rate; at the default, a push then adds to a hidden state what has
# the semantic delta's own norm
REACH = 100


@dataclass
class SteeredLayer:
    """A patched layer: its delta (k, d), its neurons (k), and their activations (N, k) on this process's part of the
    background text."""

    name: str
    delta: nn.Parameter
    neurons: torch.Tensor
    background: torch.Tensor | None

    def factor(self, team: Team = ALONE) -> torch.Tensor | None:
        """Lower Cholesky factor (k, k) of C + ε I, float64."""
        if self.background is None:
            return None
        b = self.background.double()
        moment = team.sum(b.T @ b) / team.total(len(b))
        floor = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny) * FLOOR
        moment.diagonal().add_(floor)
        return torch.linalg.cholesky(moment)


@dataclass
class _Push:
    """One layer's part of a step: the delta becomes `origin + answer @ (c[:, None] * targets)`."""

    delta: nn.Parameter
    origin: torch.Tensor
    answer: torch.Tensor
    targets: torch.Tensor

    @torch.no_grad()
    def __call__(self, strengths: torch.Tensor) -> None:
        change = self.answer @ (strengths.to(self.targets)[:, None] * self.targets)
        self.delta.copy_(self.origin + change.to(self.origin.dtype))


def protected_answer(
    activations: torch.Tensor,
    factor: torch.Tensor | None,
    ridge: float,
    contexts: torch.Tensor | None = None,
    generalization: float = 0.0,
) -> torch.Tensor:
    """P (k, n), float64: how much of each neuron's delta answers to each failure.

    With V the `activations` (n, k) and C + ε I = L Lᵀ, the protection is a plain ridge on V L⁻ᵀ. To generalise, a
    failure's neurons are combined as for the average X = (V + w U) / (1 + w) with its `contexts` U (n, k), and mixed
    such that each push reaches its own failure whole and leaves the others alone: P = (C + ε I)⁻¹ Xᵀ B with V P = I.
    """
    v = activations.double()

    def whiten(rows: torch.Tensor) -> torch.Tensor:
        return rows if factor is None else torch.linalg.solve_triangular(factor, rows.T, upper=False).T

    if contexts is None:
        eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
        answer = solve_prior(whiten(v), eye, ridge)
    else:
        averaged = whiten((v + generalization * contexts.double()) / (1 + generalization))
        answer = averaged.T @ solve_prior(whiten(v) @ averaged.T, torch.eye(len(v)).to(v), ridge)
    return answer if factor is None else torch.linalg.solve_triangular(factor.T, answer, upper=True)


def steer_neurons(
    layers: Sequence[SteeredLayer],
    traced: Trace,
    task: Task,
    look: Callable[[], tuple[Predictions, float]],
    retrace: Callable[[torch.Tensor], Trace],
    semantics: Callable[[Trace, SteeredLayer], torch.Tensor],
    *,
    learning_rate: float,
    max_steps: int,
    ridge: float,
    generalization: float = 0.0,
    elsewhere: Callable[[Predictions], None] = lambda now: None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Predictions:
    """Patch the layers until the task is fulfilled, or `max_steps` gradients are used up.

    Each step pushes the failures, and the tokens that broke on the way, along their gradients' signs; its strengths
    are searched up to `learning_rate * REACH`.

    Args:
        layers: The patched layers.
        traced: The trace of the failures, at the deltas as they are.
        task: What has to be reached.
        look: Predictions (S) and the loss at the deltas as they are, by one forward.
        retrace: A trace of the given slots (n) at the deltas as they are.
        semantics: The semantic deltas (n, d) of a trace's tokens for a layer.
        learning_rate, max_steps, ridge, generalization: See [`RepairArguments`].
        elsewhere: Called when the task seems fulfilled; fills in the tokens that `look` leaves as they were.
        on_step: Called with the step, the failures solved, and the loss.

    Returns:
        [`Predictions`] (S) of the state that was kept: the last, or the best on the way by [`Task.score`].
    """
    factors = {layer.name: layer.factor(traced.team) for layer in layers}
    here = traced.predictions
    # whatever happens on the way, the deltas are those of a finished step afterwards
    best = None, [layer.delta.detach().clone() for layer in layers], here
    try:
        for step in range(1, max_steps + 1):
            pushes, descent = _pushes(layers, traced, factors, semantics, ridge, generalization)

            def pushed(strengths: torch.Tensor, pushes=pushes) -> tuple[Predictions, float]:
                for push in pushes:
                    push(strengths)
                return look()

            strengths, here, loss = search_strengths(pushed, here, task, traced.medium, descent, learning_rate * REACH)
            for push in pushes:
                push(strengths)
            if task.done(here):
                elsewhere(here)
            done, score = task.done(here), task.score(here)
            if best[0] is None or score > best[0] or done:
                best = score, [layer.delta.detach().clone() for layer in layers], here
            if on_step is not None:
                on_step(step, int(here.solved(task.margin)[task.medium].sum()), loss)
            if done or step == max_steps:
                break
            traced = retrace((task.medium | task.broken(here)).nonzero()[:, 0])
            here = traced.predictions
    finally:
        with torch.no_grad():
            for layer, kept in zip(layers, best[1]):
                layer.delta.copy_(kept)
    return best[2]


def _pushes(
    layers, traced: Trace, factors, semantics, ridge: float, generalization: float
) -> tuple[list[_Push], torch.Tensor]:
    """Every layer's push at the deltas as they are, and the slope (n) of each token's cross entropy, positive."""
    pushes, descent = [], torch.zeros(len(traced.medium))
    for layer in layers:
        gradient = traced.gradients(layer.name).double()
        targets = -semantics(traced, layer).abs().to(gradient.device) * gradient.sign()
        activations = traced.activations(layer.name, layer.neurons).to(gradient.device)
        contexts = traced.contexts(layer.name, layer.neurons)
        contexts = contexts if contexts is None else contexts.to(gradient.device)
        answer = protected_answer(activations, factors[layer.name], ridge, contexts, generalization)
        pushes.append(_Push(layer.delta, layer.delta.detach().clone(), answer, targets))
        descent -= (gradient * targets).sum(dim=1).float().cpu()
    return pushes, descent
