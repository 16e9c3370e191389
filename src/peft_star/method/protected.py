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

from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.predictions import Predictions
from ..models.names import plain_name
from .background import WINDOW, background_activations, moment_factor
from .best import Best
from .bystanders import Bystanders
from .history import earlier_keys
from .objective import Goal
from .semantics import traced_semantics
from .sensitivity import OwnReading, effects, natural_targets, read_own_texts
from .solve import answers_by_problem, protected_answer
from .strengths import search_strengths
from .subject import HeldLayer, Run
from .trace import Trace, trace

# the strengths' search goes up to this many times the learning rate, and further as a ridge weakens the answers; at
# the default, a push then adds to a hidden state what has the semantic delta's own norm
LIMIT = 100
# the ridge of the first steps, relative: so large that each failure is pushed by what all of them have in common, too,
# and not by small differences between them, which other text has as well; and how many steps. What is left then is
# pushed for itself
RIDGE, SHARED_STEPS = 10.0, 2
# so many steps try to give every failure the gap that it needs where it is served, once all are solved by the margin
WIDENING = 3
# by which factors a finished patch grows as long as nobody beside the failures is disturbed
GROWTH = (1.25, 1.6, 2.0, 2.5, 3.0)


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


def solve(
    run: Run, located: dict[str, torch.Tensor], traced: Trace, kept: Sequence[Batch] = ()
) -> tuple[list[HeldLayer], Protection]:
    """The located neurons in the adapter, and what they do where they are to answer to nothing: on background text, in
    the rows that are `kept`, at the failures of earlier repairs that kept no rows, and with `reach="problem"` beside
    the failures."""
    tokens, team = run.args.background, run.engine.team
    with run.journal.phase("solve", -(-tokens // WINDOW)):
        layers = run.subject.hold(located)
        ffns, neurons = run.probe(located).ffns, {layer.name: layer.neurons for layer in layers}
        bystanders = None
        if run.args.reach == "problem":
            said, failing = traced.predictions, traced.medium
            wrong = said.argmax[failing[~said.right[failing]]]
            bystanders = Bystanders.of(run.engine, traced.batches, failing, ffns, neurons, wrong)
        if not tokens:
            return layers, Protection([None] * len(layers), [None] * len(layers), bystanders)
        shown = background_activations(run.engine, run.subject.tokenizer, ffns, tokens, run.journal.advance)
        texts = run.own_texts().protected
        own = read_own_texts(run.engine, texts, run.subject.ffns(), run.journal.advance) if texts else OwnReading()
        beside = [bystanders] if bystanders else []
        if kept:
            beside.append(Bystanders.of(run.engine, kept, traced.medium, ffns, neurons))
        factors, keys = [], earlier_keys(run)
        for layer in layers:
            groups = [_of_neurons(shown.get(layer.name), layer.neurons)]
            if texts:
                groups.append(_of_neurons(own.activations.get(layer.name), layer.neurons))
            groups += [found.activations[layer.name].to(groups[0].device) for found in beside]
            if plain_name(layer.name) in keys:
                groups.append(_of_neurons(keys[plain_name(layer.name)], layer.neurons).to(groups[0]))
            factors.append(moment_factor(*groups, team=team))
    return layers, Protection(factors, [own.fisher.get(layer.name) for layer in layers], bystanders)


def _of_neurons(activations: torch.Tensor | None, neurons: torch.Tensor) -> torch.Tensor:
    """The columns (N, k) of activations (N, m); None where other processes have them all."""
    if activations is None:
        return torch.zeros(0, len(neurons), device=neurons.device)
    return activations.index_select(1, neurons.to(activations.device))


def patch(
    run: Run, goal: Goal, layers: Sequence[HeldLayer], protection: Protection, traced: Trace, best: Best
) -> None:
    """Push the failures until the task is fulfilled, or `max_steps` gradients are used up.

    Each step pushes the failures, and the tokens that broke on the way, towards their targets; its strengths are
    searched up to `learning_rate * LIMIT * (1 + ridge)`. Retained rows are looked at when all seems done; those that
    broke are watched from then on.
    """
    origins = [layer.delta.detach().clone() for layer in layers]
    for step in range(1, run.args.max_steps + 1):
        shared = step <= SHARED_STEPS
        ridge = max(run.args.ridge, RIDGE) if shared else run.args.ridge
        pushes, descent = make_pushes(run, layers, protection, traced, ridge, traced.problems() if shared else ())
        strengths, here, loss = search_strengths(
            partial(_look, run.engine, goal, pushes),
            traced.predictions,
            goal.task,
            traced.medium,
            descent,
            run.args.learning_rate * LIMIT * (1 + ridge),
        )
        for push in pushes:
            push(strengths)
        _estimate_costs(run, protection, pushes, strengths, traced.medium)
        if goal.task.done(here):
            here, broken = goal.look_at_the_rest(run.engine, here)
            goal = goal.watching(broken)
        best.offer(step, here, loss)
        if goal.task.done(here):
            if protection.bystanders is not None:
                reach_out(run, goal, layers, origins, protection.bystanders, best)
            return
        # gaps that cannot be had are not worth all of the steps
        if step == run.args.max_steps or step >= WIDENING and goal.task.done_by_margin(here):
            return
        at_stake = goal.task.at_stake(here).nonzero()[:, 0]
        names = [layer.name for layer in layers]
        traced = trace(run.engine, goal.batches, run.probe(names), at=at_stake, start=goal.before)


def _estimate_costs(
    run: Run,
    protection: Protection,
    pushes: Sequence[Push],
    strengths: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Add to the journal how far each push moves what is said in other text: to second order, and as if pushes and
    layers had nothing to do with each other, c² · Pᵀ(C + ε I)P · tᵀ F t."""
    costs = torch.zeros(len(slots), dtype=torch.float64)
    for push, factor, fisher in zip(pushes, protection.factors, protection.fisher):
        if factor is None or fisher is None:
            return
        answers = (factor.T @ push.answer).square().sum(dim=0)
        costs += strengths.double().square() * (answers * effects(push.targets, fisher)).cpu()
    for slot, cost in zip(slots.tolist(), costs.tolist()):
        run.journal.cost(slot, cost)


@torch.no_grad()
def reach_out(
    run: Run,
    goal: Goal,
    layers: Sequence[HeldLayer],
    origins: Sequence[torch.Tensor],
    bystanders: Bystanders,
    best: Best,
) -> None:
    """Let a patch that does its task grow by a factor, the largest of `GROWTH` that disturbs no bystander.

    In other contexts the neurons answer less than in the rows themselves, so a patch that just solves these does
    nothing there.
    """
    changes = [layer.delta.detach() - origin for layer, origin in zip(layers, origins)]

    def grow(factor: float) -> None:
        for layer, origin, change in zip(layers, origins, changes):
            layer.delta.copy_(origin + factor * change)

    largest = None
    for factor in GROWTH:
        grow(factor)
        if not bystanders.undisturbed(run.engine):
            break
        largest = factor
    if largest is not None:
        grow(largest)
        here, _ = goal.look(run.engine)
        here, _ = goal.look_at_the_rest(run.engine, here)
        if goal.task.done(here):
            best.keep(here)


def _look(engine: Engine, goal: Goal, pushes: Sequence[Push], strengths: torch.Tensor) -> tuple[Predictions, float]:
    for push in pushes:
        push(strengths)
    return goal.look(engine)


def make_pushes(
    run: Run,
    layers: Sequence[HeldLayer],
    protection: Protection,
    traced: Trace,
    ridge: float,
    problems: Sequence[str | None] = (),
) -> tuple[list[Push], torch.Tensor]:
    """Every layer's push at the deltas as they are, and the slope (n) of each token's cross entropy, positive.

    Failures of different `problems` (n) are told from each other, where these are given.
    """
    pushes, descent = [], torch.zeros(len(traced.medium))
    args, subject = run.args, run.subject
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
        if len(set(problems)) > 1:
            answer = answers_by_problem(activations, factor, ridge, problems, contexts, args.generalization)
        else:
            answer = protected_answer(activations, factor, ridge, contexts, args.generalization)
        pushes.append(Push(layer.delta, layer.delta.detach().clone(), answer, targets))
        descent -= (gradient * targets).sum(dim=1).float().cpu()
    return pushes, descent
