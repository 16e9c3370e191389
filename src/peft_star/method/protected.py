"""Protected patching: each failure is pushed as strongly as it needs, by what tells it from background text.

Algorithm 1 multiplies a prior's magnitude by the gradient's sign, entry by entry. That loses what the least squares
knew: which combination of neurons answers to this failure and to nothing else. Here the sign is taken one step
earlier. The semantic delta of failure i gets the signs of the gradient at its medium token,
t_i = −|s_Δ| ⊙ sign(∂L/∂o), and equation 2 is solved for these targets under a protection,

    min_W ‖V W − diag(c) T‖² + λ tr(Wᵀ (C + ε I) W),

with C the neurons' second moment on background text: the patch answers to what sets the failures' activations apart
from the background. The solution is P diag(c) T with a P (k, n) that does not depend on the strengths c (n), so
these are found by forward passes alone (see `strengths.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..engine.engine import Engine
from ..engine.predictions import Predictions
from .background import WINDOW, background_activations, moment_factor
from .best import Best
from .objective import Goal
from .semantics import traced_semantics
from .solve import protected_answer
from .strengths import search_strengths
from .subject import HeldLayer, Run
from .trace import Trace, trace

# a search goes up to this many times the learning rate; at the default, a push then adds to a hidden state what has
# the semantic delta's own norm
REACH = 100


@dataclass
class Push:
    """One layer's part of a step: the delta becomes `origin + answer @ (c[:, None] * targets)`."""

    delta: nn.Parameter
    origin: torch.Tensor
    answer: torch.Tensor
    targets: torch.Tensor

    @torch.no_grad()
    def __call__(self, strengths: torch.Tensor) -> None:
        change = self.answer @ (strengths.to(self.targets)[:, None] * self.targets)
        self.delta.copy_(self.origin + change.to(self.origin.dtype))


def solve(run: Run, located: dict[str, torch.Tensor], traced: Trace) -> tuple[list[HeldLayer], list]:
    """The located neurons in the adapter, and what they do on background text: per layer [`moment_factor`] (k, k), or
    None where nothing is protected."""
    tokens, team = run.args.background, run.engine.team
    with run.journal.phase("solve", -(-tokens // WINDOW)):
        layers = run.subject.hold(located)
        if not tokens:
            return layers, [None] * len(layers)
        ffns = run.probe(located).ffns
        shown = background_activations(run.engine, run.subject.tokenizer, ffns, tokens, run.journal.advance)
        factors = []
        for layer in layers:
            if layer.name in shown:
                activations = shown[layer.name].index_select(1, layer.neurons.to(shown[layer.name].device))
            else:  # other processes read the background
                activations = torch.zeros(0, len(layer.neurons), device=layer.neurons.device)
            factors.append(moment_factor(activations, team))
    return layers, factors


def patch(run: Run, goal: Goal, layers: Sequence[HeldLayer], factors: Sequence, traced: Trace, best: Best) -> None:
    """Push the failures until the task is fulfilled, or `max_steps` gradients are used up.

    Each step pushes the failures, and the tokens that broke on the way, along their gradients' signs; its strengths
    are searched up to `learning_rate * REACH`. Retained rows are looked at when all seems done; those that broke are
    watched from then on.
    """
    for step in range(1, run.args.max_steps + 1):
        pushes, descent = make_pushes(run, layers, factors, traced)
        strengths, here, loss = search_strengths(
            partial(_look, run.engine, goal, pushes),
            traced.predictions,
            goal.task,
            traced.medium,
            descent,
            run.args.learning_rate * REACH,
        )
        for push in pushes:
            push(strengths)
        if goal.task.done(here):
            here, broken = goal.look_at_the_rest(run.engine, here)
            goal = goal.watching(broken)
        best.offer(step, here, loss)
        if goal.task.done(here) or step == run.args.max_steps:
            return
        at_stake = goal.task.at_stake(here).nonzero()[:, 0]
        names = [layer.name for layer in layers]
        traced = trace(run.engine, goal.batches, run.probe(names), at=at_stake, start=goal.before)


def _look(engine: Engine, goal: Goal, pushes: Sequence[Push], strengths: torch.Tensor) -> tuple[Predictions, float]:
    for push in pushes:
        push(strengths)
    return goal.look(engine)


def make_pushes(
    run: Run, layers: Sequence[HeldLayer], factors: Sequence, traced: Trace
) -> tuple[list[Push], torch.Tensor]:
    """Every layer's push at the deltas as they are, and the slope (n) of each token's cross entropy, positive."""
    pushes, descent = [], torch.zeros(len(traced.medium))
    args, subject = run.args, run.subject
    for layer, factor in zip(layers, factors):
        gradient = traced.gradients(layer.name).double()
        semantics = traced_semantics(subject.bases, traced, subject.decoder_of[layer.name], args.norm)
        targets = -semantics.abs().to(gradient.device) * gradient.sign()
        activations = traced.activations(layer.name, layer.neurons).to(gradient.device)
        contexts = None
        if args.generalization > 0:
            contexts = traced.contexts(layer.name, layer.neurons).to(gradient.device)
        answer = protected_answer(activations, factor, args.ridge, contexts, args.generalization)
        pushes.append(Push(layer.delta, layer.delta.detach().clone(), answer, targets))
        descent -= (gradient * targets).sum(dim=1).float().cpu()
    return pushes, descent
