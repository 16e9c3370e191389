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
from functools import partial

import torch

from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.predictions import Predictions
from ..models.names import plain_name
from .background import WINDOW, background_activations, moment_factor
from .best import Best
from .bystanders import Bystanders
from .growth import Growth, grow
from .history import earlier_keys
from .objective import Goal
from .pushes import Protection, Push, make_pushes
from .sensitivity import OwnReading, effects, read_own_texts
from .strengths import search_strengths
from .subject import HeldLayer, Run
from .trace import Trace, trace

# the strengths' search goes up to this many times the learning rate, and further as a ridge weakens the answers; at
# the default, a push then adds to a hidden state what has the semantic delta's own norm
LIMIT = 100
# how many steps push failures by what they have in common; what is left then is pushed for itself
SHARED_STEPS = 2
# so many steps try to give every failure the gap that it needs where it is served, once all are solved by the margin
WIDENING = 3


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
    growth = None if protection.bystanders is None else Growth.of(layers, traced, protection.bystanders)
    shared_steps = SHARED_STEPS
    for step in range(1, run.args.max_steps + 1):
        foretold = growth is not None and bool(growth.recurring)
        pushes, replies = make_pushes(run, layers, protection, traced, step <= shared_steps, foretold)
        strengths, here, loss = search_strengths(
            partial(_look, run.engine, goal, pushes),
            traced.predictions,
            goal.task,
            traced.medium,
            replies.descent,
            run.args.learning_rate * LIMIT * (1 + replies.ridge),
        )
        for push in pushes:
            push(strengths)
        if growth is not None:
            growth.add(pushes, replies, strengths, traced.medium)
        _estimate_costs(run, protection, pushes, strengths, traced.medium)
        if goal.task.done(here):
            here, broken = goal.look_at_the_rest(run.engine, here)
            goal = goal.watching(broken)
        best.offer(step, here, loss)
        if goal.task.done(here) and growth is not None:
            here = grow(run, goal, layers, growth, here)
            best.keep(here)
            # it grows once; what broke by that is pushed for itself
            growth, shared_steps = None, 0
        if goal.task.done(here):
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


def _look(engine: Engine, goal: Goal, pushes: Sequence[Push], strengths: torch.Tensor) -> tuple[Predictions, float]:
    for push in pushes:
        push(strengths)
    return goal.look(engine)
