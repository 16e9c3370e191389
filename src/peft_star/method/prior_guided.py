"""Patching "buggy neurons": gradient descent with prior guidance (paper section 3.3, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..engine.batch import Batch
from .best import Best
from .objective import Goal, differentiate
from .semantics import traced_semantics
from .solve import solve_prior
from .subject import HeldLayer, Run
from .trace import Trace


class PriorGuidedSGD(torch.optim.Optimizer):
    """Gradient descent with prior guidance (Algorithm 1): the gradient's sign, the prior's magnitude.

    With gradient G and prior W_Δ of a parameter, `u = W_Δ ⊙ sign(G) ⊙ sign(W_Δ) = |W_Δ| ⊙ sign(G)` and the parameter
    becomes `W − lr · u`.

    The prior of a parameter is, in this order: `priors[param]`, its group's `"prior"` (groups of one parameter), or
    the attribute `param.star_prior` that [`prepare`] sets on the deltas of a STAR adapter. A parameter without a
    prior has magnitude 1 everywhere, which makes the update sign descent.

    Steps of constant size overshoot where failures pull against each other, and dawdle where they agree. As in Rprop
    (Riedmiller and Braun, 1993; `etas` of `torch.optim.Rprop`), each entry's step size is multiplied by `damping`
    when the sign of its gradient turns and by `growth` when it stays; with 1 and 1 it is Algorithm 1 to the letter.

    Args:
        params: Parameters or parameter groups, as for every PyTorch optimiser.
        lr (`float`): The factor η.
        damping (`float`): Factor of an entry's step size when its gradient's sign turns, in (0, 1].
        growth (`float`): Factor of an entry's step size when its gradient's sign stays, at least 1.
        priors (`Mapping[torch.Tensor, torch.Tensor]`, *optional*): Priors by parameter, each of its parameter's shape.

    Raises:
        ValueError: `lr` is not a positive number, `damping` is not in (0, 1], `growth` is less than 1, or a prior has
            another shape than its parameter.

    Example:

    ```python
    >>> peft_star.prepare(model, tokenizer, failures)  # locates neurons, solves priors
    >>> optimizer = PriorGuidedSGD((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    >>> trainer = Trainer(model, ..., optimizers=(optimizer, None))
    ```
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        priors: Mapping[torch.Tensor, torch.Tensor] | None = None,
        *,
        damping: float = 1.0,
        growth: float = 1.0,
    ):
        if not isinstance(lr, (int, float)) or not 0 < lr < float("inf"):
            raise ValueError(f"`lr` is {lr!r}; give a finite number greater than 0.")
        if not isinstance(damping, (int, float)) or not 0 < damping <= 1:
            raise ValueError(f"`damping` is {damping!r}; give a number greater than 0 and at most 1.")
        if not isinstance(growth, (int, float)) or not 1 <= growth < float("inf"):
            raise ValueError(f"`growth` is {growth!r}; give a finite number of at least 1.")
        super().__init__(params, {"lr": lr, "damping": damping, "growth": growth})
        for group in self.param_groups:
            own = group.pop("prior", None)
            if own is not None and len(group["params"]) != 1:
                raise ValueError("A parameter group with a 'prior' must hold exactly one parameter.")
            for param in group["params"]:
                prior = priors.get(param) if priors is not None else None
                self._set_prior(param, next((p for p in (prior, own) if p is not None), None))

    def _set_prior(self, param: torch.Tensor, prior: torch.Tensor | None) -> None:
        prior = prior if prior is not None else getattr(param, "star_prior", None)
        if prior is None:
            return
        if prior.shape != param.shape:
            raise ValueError(
                f"A prior of shape {tuple(prior.shape)} does not fit a parameter of {tuple(param.shape)}."
            )
        # Algorithm 1 reads nothing of the prior but its magnitude
        self.state[param]["prior"] = prior.detach().abs().to(param.device, param.dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of Algorithm 1; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(self._update(param, group).to(param.dtype), alpha=group["lr"])
        return loss

    def _update(self, param: torch.Tensor, group: dict) -> torch.Tensor:
        state = self.state[param]
        if "prior" not in state:
            self._set_prior(param, None)
        assert param.grad is not None  # or there is no step
        sign = param.grad.sign()
        update = sign * state["prior"] if "prior" in state else sign
        if (group["damping"], group["growth"]) != (1, 1):
            update = update * self._step_size(state, sign, group["damping"], group["growth"])
        return update

    @staticmethod
    def _step_size(state: dict, sign: torch.Tensor, damping: float, growth: float) -> torch.Tensor:
        if "sign" not in state:
            state["size"] = torch.ones_like(sign)
        else:
            agreement = sign * state["sign"]
            factor = torch.ones_like(sign).masked_fill_(agreement < 0, damping).masked_fill_(agreement > 0, growth)
            state["size"] = state["size"] * factor
        state["sign"] = sign
        return state["size"]


def _prior_of(delta: Any) -> torch.Tensor:
    """The prior that goes with a delta, as an attribute that torch knows nothing of."""
    return delta.star_prior


def solve(
    run: Run, located: dict[str, torch.Tensor], traced: Trace, kept: Sequence[Batch] = ()
) -> tuple[list[HeldLayer], list[torch.Tensor] | None]:
    """The located neurons in the adapter with their priors W_Δ as `star_prior`, and the first step's gradients
    ∂L/∂delta (k, d) by layer, out of the trace; None when it did not keep what they need.

    Neurons of earlier repairs, which the adapter also holds, get priors of zero: they stay as they are. `kept` is not
    read: Algorithm 1 protects nothing.
    """
    with run.journal.phase("solve", len(located)):
        layers = run.subject.hold(located)
        gradients = []
        for held in run.subject.layers().values():
            delta: Any = held.star_delta[run.subject.adapter]
            delta.star_prior = torch.zeros_like(delta)
        for layer in layers:
            wanted = located[layer.name].to(layer.neurons.device)
            decoder_layer = run.subject.decoder_of[layer.name]
            semantics = traced_semantics(run.subject.bases, traced, decoder_layer, run.args.norm)
            solved = solve_prior(traced.activations(layer.name, wanted), semantics, run.args.ridge)
            prior = _prior_of(layer.delta)
            # rows of the adapter are ascending, as `wanted` is
            prior[torch.isin(layer.neurons, wanted)] = solved.to(prior)
            gradients.append(traced.layers[layer.name].gradient(layer.neurons))
            run.journal.advance()
    kept_all = [gradient for gradient in gradients if gradient is not None]
    missing = len(kept_all) < len(gradients)
    return layers, None if any(run.engine.team.gather(missing)) else kept_all


def patch(
    run: Run,
    goal: Goal,
    layers: Sequence[HeldLayer],
    gradients: Sequence[torch.Tensor] | None,
    traced: Trace,
    best: Best,
) -> None:
    """Algorithm 1 on the located neurons' deltas, stopping as soon as every failure is solved and nothing is broken.

    A token of the same rows that was right and breaks on the way joins the loss until it is right again. Retained rows
    are looked at when the failures are solved; what broke in them then joins the next step's loss.
    """
    engine, args, task = run.engine, run.args, goal.task
    deltas = [layer.delta for layer in layers]
    with _trainable(deltas):
        optimizer = PriorGuidedSGD(deltas, lr=args.learning_rate, damping=args.damping, growth=args.growth)
        if gradients is None:
            differentiate(engine, goal.batches, task.medium)
        else:
            for delta, gradient in zip(deltas, gradients):
                # that of a process without a batch is a single zero
                delta.grad = gradient.to(delta.device, delta.dtype).expand_as(delta).contiguous()
        for step in range(1, args.max_steps + 1):
            engine.team.sum_gradients(deltas)
            optimizer.step()
            optimizer.zero_grad()
            last = step == args.max_steps
            here, loss = goal.look(engine, differentiate=not last)
            broken: tuple[Batch, ...] = ()
            if task.done(here):
                here, broken = goal.look_at_the_rest(engine, here)
            best.offer(step, here, loss)
            if task.done(here) or last:
                return
            if broken:  # of the failures' rows, which are all solved, no gradient has been taken
                differentiate(engine, [*broken, *goal.batches], task.at_stake(here))


@contextmanager
def _trainable(deltas: Sequence[nn.Parameter]) -> Iterator[None]:
    for delta in deltas:
        delta.requires_grad_(True)
    try:
        yield
    finally:
        for delta in deltas:
            delta.grad = None
            delta.requires_grad_(False)
