"""Patching "buggy neurons": gradient descent with prior guidance (paper section 3.3, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..engine.batch import Batch
from ..engine.distributed import ALONE, Team
from ..engine.passes import completion_logits, loss_at
from ..engine.predictions import Predictions
from .objective import Task


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
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
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


def patch_neurons(
    model: nn.Module,
    batches: Sequence[Batch],
    deltas: Sequence[nn.Parameter],
    gradients: Sequence[torch.Tensor] | None,
    medium: torch.Tensor,
    before: Predictions,
    *,
    learning_rate: float,
    damping: float,
    growth: float,
    max_steps: int,
    margin: float,
    replay: Callable[[Batch], AbstractContextManager] = nullcontext,
    team: Team = ALONE,
    retain: Callable[[], Sequence[tuple[Batch, torch.Tensor]]] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Predictions:
    """Algorithm 1 on the located neurons' deltas, stopping as soon as every failure is solved and nothing is broken.

    A token of the same rows that was right and breaks on the way joins the loss until it is right again. When the
    steps run out, the best state on the way is kept: most failures solved, then fewest tokens broken.

    Args:
        model: The causal LM; nothing but `deltas` needs a gradient.
        batches: The rows; their slots index `before` (S).
        deltas: The patched layers' deltas, each with a `star_prior`.
        gradients: ∂L/∂delta of the trace, for a first step without another pass; None: computed.
        medium: Slots (n) of the failures.
        before: [`Predictions`] (S) without the patch. Its tokens that are right, apart from `medium`, must stay so.
        learning_rate, damping, growth, max_steps, margin: See [`RepairArguments`].
        replay: Context around the forwards of a batch, see [`Replay`].
        team: The processes that the batches are dealt out to.
        retain: Called once the failures are solved; gives retained batches with a mask (N) of tokens that broke.
        on_step: Called with the step, the failures solved, and the loss.

    Returns:
        [`Predictions`] (S) of the state that was kept.
    """
    optimizer = PriorGuidedSGD(deltas, lr=learning_rate, damping=damping, growth=growth)
    task = Task.of(medium, before, margin)
    optimizer.zero_grad()
    if gradients is None:
        forward_backward(model, batches, task, replay, team=team)
    else:
        for delta, gradient in zip(deltas, gradients):
            delta.grad = gradient.to(delta.device, delta.dtype)
    best = None
    for step in range(1, max_steps + 1):
        team.sum_gradients(deltas)
        optimizer.step()
        optimizer.zero_grad()
        here, loss = forward_backward(
            model, batches, task, replay, team=team, skip_solved=True, backward=step < max_steps
        )
        done, harmed = task.done(here), 0
        hurt = []
        if done and retain is not None:
            hurt = [(batch, mask) for batch, mask in retain() if mask.any()]
            harmed = sum(int(mask.sum()) for _, mask in hurt)
            done = not hurt
        score = task.score(here, harmed)
        if best is None or score > best[0] or done:
            best = score, [delta.detach().clone() for delta in deltas], here
        if on_step is not None:
            on_step(step, int(here.solved(margin)[medium].sum()), loss)
        if done or step == max_steps:
            break
        if hurt:
            masks = dict(hurt)
            for batch in team.share(list(masks)):
                loss_at(completion_logits(model, batch), batch, masks[batch]).backward()
            forward_backward(model, batches, task, replay, team=team)
    optimizer.zero_grad()
    with torch.no_grad():
        for delta, kept in zip(deltas, best[1]):
            delta.copy_(kept)
    return best[2]


def forward_backward(
    model: nn.Module,
    batches: Sequence[Batch],
    task: Task,
    replay: Callable[[Batch], AbstractContextManager],
    *,
    team: Team = ALONE,
    elsewhere: Predictions | None = None,
    skip_solved: bool = False,
    backward: bool = True,
) -> tuple[Predictions, float]:
    """What the model says now, and the loss over the failures and the broken tokens; its gradient is accumulated, that
    of this process's batches.

    `skip_solved`: a batch whose failures are all solved and whose other tokens are whole is not differentiated: it has
    nothing to ask for, and comes back when a later step undoes it. `elsewhere`: predictions at the slots that no batch
    holds.
    """
    predictions = Predictions.empty(len(task.medium)) if elsewhere is None else Predictions.join(elsewhere)
    total = 0.0
    for batch in team.share(batches):
        slots = batch.slots.cpu()
        with torch.set_grad_enabled(backward), replay(batch):
            logits = completion_logits(model, batch)
        predictions.read(batch, logits.detach())
        chosen = (task.medium | task.broken(predictions))[slots]
        if chosen.any():
            with torch.set_grad_enabled(backward):
                loss = loss_at(logits, batch, chosen)
            total += loss.item()
            if backward and not (skip_solved and not task.wanting(predictions)[slots].any()):
                loss.backward()
    team.join(predictions, batches)
    return predictions, team.total(total)
