"""The methods that STAR is compared with: SGD, LoRA, SHiRA, MINT and a logit bias.

All see the same loss (cross entropy summed over the failing tokens and over right tokens of the rows that broke on the
way) and stop by the same rule: every failing token solved by the margin and no right token broken. When the steps run
out, the best state on the way is kept: most failures solved, then fewest tokens broken. In `single` mode the failures
come one after the other, and those that a later patch undid are taken up again, in at most three rounds.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn

from interface import Applied, Method, Problem, padded
from peft_star import RepairArguments
from peft_star.engine.batch import Batch, completion_offsets
from peft_star.engine.engine import Engine
from peft_star.engine.passes import completion_logits, teacher_forced
from peft_star.engine.predictions import Predictions
from peft_star.failures import Row
from peft_star.method.objective import Goal, Task
from peft_star.method.semantics import semantic_bases, semantic_delta
from peft_star.models.structure import find_second_matrices

ROUNDS = RepairArguments.max_rounds


@dataclass(frozen=True)
class Unseen(Task):
    """The task of a first pass, before anybody knows what fails: those of the tokens `medium` that turn out wrong."""

    def at_stake(self, now: Predictions) -> torch.Tensor:
        return self.medium & ~now.right


def goal_of(batches: Sequence[Batch], before: Predictions, only: torch.Tensor, margin: float) -> Goal:
    """To solve what fails among the tokens `only` (mask of S), and to break nothing."""
    task = Task.of((only & ~before.right).nonzero()[:, 0], before, margin)
    return Goal(tuple(batches), (), task, before)


def first_look(engine: Engine, batches: Sequence[Batch], only: torch.Tensor, margin: float) -> tuple[Goal, float]:
    """One forward-backward that finds the failures among the tokens `only` (mask of S), and accumulates the gradient
    of their loss. Returns the goal and this loss."""
    unseen = Unseen(only, torch.zeros_like(only), margin)
    start = Goal(tuple(batches), (), unseen, Predictions.empty(len(only)))
    before, loss = start.look(engine, differentiate=True)
    return goal_of(batches, before, only, margin), loss


def rank(goal: Goal, now: Predictions) -> tuple[int, int]:
    """Larger is better: failures solved, then tokens left whole; of equal states the baselines keep the first."""
    solved, whole, _ = goal.task.score(now)
    return solved, whole


def first_of(wanting: torch.Tensor, task: Task) -> int:
    """The first failure among the tokens `wanting` (mask of S), or else the first of them."""
    failures = wanting & task.medium
    return int((failures if failures.any() else wanting).nonzero()[0])


class Baseline(Method):
    """A method that patches in place: `install` makes room for the patch, `solve` fills it."""

    @abstractmethod
    def install(self, base: nn.Module):
        """A context manager that yields the patch (with `.model`, what to run) and removes it on leaving."""

    @abstractmethod
    def solve(self, patch: Any, batches: list[Batch], only: torch.Tensor, margin: float) -> int:
        """Solve those failures among the tokens `only` (mask of S) that the model makes now; returns the steps."""

    @contextmanager
    def apply(self, problem: Problem) -> Iterator[Applied]:
        with self.install(problem.base) as patch:
            one_by_one = problem.mode == "single" or "multiple" not in self.modes
            steps = (self._single if one_by_one else self._multiple)(patch, problem)
            yield Applied(patch.model, steps)

    def _multiple(self, patch, problem: Problem) -> int:
        batches = padded(problem.encoded, problem.base)
        everything = torch.ones(sum(map(len, batches)), dtype=torch.bool)
        return self.solve(patch, batches, everything, problem.margin)

    def _single(self, patch, problem: Problem) -> int:
        batches = padded(problem.encoded, problem.base)
        before = teacher_forced(problem.engine, batches)
        steps, solved = 0, 0
        for _ in range(ROUNDS):
            for row, start in zip(problem.encoded, completion_offsets(problem.encoded)):
                steps += self._one_by_one(patch, row, ~before.right[start : start + len(row.completion_ids)], problem)
            now = teacher_forced(problem.engine, batches)
            improved = int(now.right[~before.right].sum())
            if now.right.all() or improved <= solved:
                break
            solved = improved
        return steps

    def _one_by_one(self, patch, row: Row, failing: torch.Tensor, problem: Problem) -> int:
        batches, steps = padded([row], problem.base), 0
        for position in failing.nonzero()[:, 0].tolist():
            only = torch.zeros_like(failing)
            only[position] = True
            steps += self.solve(patch, batches, only, problem.margin)
        return steps


class Tuned:
    """Parameters that an optimiser may move."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]):
        self.model, self.parameters = model, parameters


class Descent(Baseline):
    """Gradient descent on some parameters by one of PyTorch's optimisers."""

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        return kinds[self.settings["optimizer"]](parameters, lr=self.settings["learning_rate"], weight_decay=0.0)

    def solve(self, patch: Tuned, batches: list[Batch], only: torch.Tensor, margin: float) -> int:
        engine, optimizer = Engine(patch.model), self.optimizer(patch.parameters)
        goal, _ = first_look(engine, batches, only, margin)
        if not goal.task.medium.any():
            return 0
        best, kept, step = None, None, 0
        for step in range(1, self.settings["max_steps"] + 1):
            optimizer.step()
            optimizer.zero_grad()
            last = step == self.settings["max_steps"]
            now, _ = goal.look(engine, differentiate=not last)
            if goal.task.done(now):
                kept = None
                break
            if best is None or rank(goal, now) > best:
                best = rank(goal, now)
                kept = None if last else [parameter.detach().clone() for parameter in patch.parameters]
        optimizer.zero_grad()
        if kept is not None:
            with torch.no_grad():
                for parameter, value in zip(patch.parameters, kept):
                    parameter.copy_(value)
        return step


class FullSGD(Descent):
    """Plain SGD on every FFN's second matrix (paper section 4.1)."""

    @contextmanager
    def install(self, base: nn.Module) -> Iterator[Tuned]:
        modules = list(find_second_matrices(base).values())
        originals = [module.weight for module in modules]
        try:
            for module, weight in zip(modules, originals):
                module.weight = nn.Parameter(weight.detach().clone())
            yield Tuned(base, [module.weight for module in modules])
        finally:
            for module, weight in zip(modules, originals):
                module.weight = weight


class Adapter(Descent):
    """One of PEFT's adapters, trained by an optimiser."""

    def config(self, base: nn.Module) -> PeftConfig:
        rank, targets = self.settings["rank"], self.settings["target_modules"]
        if targets == "ffn-second":
            targets = list(find_second_matrices(base))
        if self.settings["adapter"] == "lora":
            # twice the rank is the usual choice; the learning rate is what was searched over
            return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=targets)
        return ShiraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets, random_seed=self.settings["seed"])

    @contextmanager
    def install(self, base: nn.Module) -> Iterator[Tuned]:
        torch.manual_seed(self.settings["seed"])
        model = get_peft_model(base, self.config(base)).eval()
        try:
            yield Tuned(model, [parameter for parameter in model.parameters() if parameter.requires_grad])
        finally:
            model.unload()


class Columns:
    """Neurons of FFNs' second matrices, edited in place; `originals` holds what they were."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = find_second_matrices(model)
        self.originals: dict[tuple[str, int], torch.Tensor] = {}

    def column(self, name: str, neuron: int) -> torch.Tensor:
        module = self.modules[name]
        # transformers' Conv1D keeps its weight transposed
        return module.weight[:, neuron] if isinstance(module, nn.Linear) else module.weight[neuron]

    def add(self, name: str, neuron: int, delta: torch.Tensor) -> None:
        column = self.column(name, neuron)
        self.originals.setdefault((name, neuron), column.clone())
        column += delta.to(column)

    def state(self) -> dict[tuple[str, int], torch.Tensor]:
        return {key: self.column(*key).clone() for key in self.originals}

    @torch.no_grad()
    def restore(self, state: dict[tuple[str, int], torch.Tensor]) -> None:
        for key, original in self.originals.items():
            self.column(*key).copy_(state.get(key, original))


class Mint(Baseline):
    """MINT (Gu et al. 2023, "Neuron Patching"; the paper's sections 1, 4.1 and 5.1): one neuron at a time.

    For one failure, Input x Gradient proposes `candidates` neurons over all FFNs; the patch of neuron j moves the
    representation at the medium token along the semantic delta, `v_j · w = factor · norm(s(expected) − s(argmax))`;
    a forward pass simulates each, and the one with the lowest loss is kept. Again until the failure is solved, no
    candidate helps, or `max_patches` neurons are patched.
    """

    modes = ("single",)

    @contextmanager
    def install(self, base: nn.Module) -> Iterator[Columns]:
        columns = Columns(base)
        try:
            yield columns
        finally:
            columns.restore(columns.originals)

    @torch.no_grad()
    def solve(self, patch: Columns, batches: list[Batch], only: torch.Tensor, margin: float) -> int:
        engine = Engine(patch.model)
        with self._activations(patch) as activations:
            goal, loss = first_look(engine, batches, only, margin)
        now, best, kept, step = goal.before, None, None, 0
        while not goal.task.done(now) and step < self.settings["max_patches"]:
            chosen = self._best_candidate(patch, goal, now, loss, activations)
            if chosen is None:
                break
            name, neuron, delta, now = chosen
            patch.add(name, neuron, delta)
            step += 1
            if best is None or rank(goal, now) > best:
                best, kept = rank(goal, now), patch.state()
            if goal.task.done(now):
                break
            with self._activations(patch) as activations:
                now, loss = goal.look(engine, differentiate=True)
        if kept is not None:
            patch.restore(kept)
        return step

    @contextmanager
    def _activations(self, patch: Columns) -> Iterator[dict[str, torch.Tensor]]:
        """Record each FFN's v (1, T, m), ready to receive its gradient."""
        activations: dict[str, torch.Tensor] = {}

        def record(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple) -> tuple:
                v = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
                v.retain_grad()
                activations[name] = v
                return (v, *args[1:])

            return hook

        handles = [module.register_forward_pre_hook(record(name)) for name, module in patch.modules.items()]
        try:
            yield activations
        finally:
            for handle in handles:
                handle.remove()

    def _best_candidate(
        self, patch: Columns, goal: Goal, now: Predictions, loss: float, activations: dict[str, torch.Tensor]
    ) -> tuple[str, int, torch.Tensor, Predictions] | None:
        """The neuron whose simulated patch lowers the loss most: (FFN, neuron, delta, predictions), or None."""
        (batch,), target = goal.batches, first_of(goal.task.wanting(now), goal.task)
        position = int(batch.positions[target])
        values = {name: v[0, position].detach() for name, v in activations.items()}
        scores = {name: (values[name] * v.grad[0, position]).abs() for name, v in activations.items()}
        ends = torch.tensor([score.numel() for score in scores.values()]).cumsum(0)
        top = torch.cat(list(scores.values())).topk(self.settings["candidates"]).indices.tolist()
        steer = -semantic_delta(semantic_bases(patch.model), now.argmax[[target]], now.expected[[target]])[0]
        best = None
        for index in top:
            layer = int(torch.searchsorted(ends, index, right=True))
            name = list(scores)[layer]
            neuron = index - int(ends[layer]) + scores[name].numel()
            delta = (self.settings["factor"] * steer / values[name][neuron].double()).float()
            column = patch.column(name, neuron)
            before = column.clone()
            column += delta.to(column)
            simulated, simulated_loss = goal.look(Engine(patch.model))
            column.copy_(before)
            if simulated_loss < loss:
                best, loss = (name, neuron, delta, simulated), simulated_loss
        return best


class Bias:
    """A constant (V) added to the model's logits."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.values: torch.Tensor | None = None

    def hook(self, module: nn.Module, args: tuple, output):
        if self.values is not None:
            output.logits = output.logits + self.values.to(output.logits)
        return output


class LogitBias(Baseline):
    """The trivial patch: a constant added to the logit of each expected token, the smallest that solves the failures.

    With the logits z of a position, the other tokens' largest M and their log-sum-exp A, token t is ahead by the
    margin m when `exp(z_t + b) (1 − m) > exp(M) + m exp(A)`, so the smallest b is known in closed form. Several
    failures are solved by raising one token after the other until nothing changes, which ends at the smallest
    solution where there is one. A failure that cannot be solved beside those before it is left out (A before B in one
    place, B before A in another), and so is a right token that broke on the way and cannot be mended beside them.
    """

    SLACK = 1e-4  # in logits, above the rounding of another batch's shape

    @contextmanager
    def install(self, base: nn.Module) -> Iterator[Bias]:
        bias = Bias(base)
        handle = base.register_forward_hook(bias.hook)
        try:
            yield bias
        finally:
            handle.remove()

    @torch.no_grad()
    def solve(self, patch: Bias, batches: list[Batch], only: torch.Tensor, margin: float) -> int:
        predictions = Predictions.empty(len(only))
        logits: dict[int, torch.Tensor] = {}
        for batch in batches:
            found = completion_logits(patch.model, batch).float()
            predictions.read(batch, found)
            logits |= zip(batch.slots.tolist(), found)
        task = goal_of(batches, predictions, only, margin).task
        values = torch.zeros_like(found[0])
        demands: list[tuple[int, torch.Tensor]] = []
        tried = torch.zeros_like(only)
        while (wanting := task.wanting(predictions) & ~tried).any():
            slot = first_of(wanting, task)
            tried[slot] = True
            demand = int(predictions.expected[slot]), logits[slot]
            raised = self._raise([*demands, demand], values, margin)
            if raised is None:
                continue
            demands, values = [*demands, demand], raised
            for batch in batches:
                predictions.read(batch, torch.stack([logits[s] for s in batch.slots.tolist()]) + values)
        patch.values = values if patch.values is None else patch.values + values
        return len(demands)

    def _raise(
        self, demands: list[tuple[int, torch.Tensor]], values: torch.Tensor, margin: float
    ) -> torch.Tensor | None:
        """Raise the biases (V) until each demand's token is ahead at its logits; None when they still grow at last."""
        values = values.clone()
        for _ in range(self.settings["max_sweeps"]):
            before = values.clone()
            for token, logits in demands:
                others = (logits + values).double()
                others[token] = -math.inf
                # log(exp(M) + m exp(A))
                needed = torch.logaddexp(others.max(), others.logsumexp(0) + math.log(margin or 1e-300))
                bias = needed.item() - math.log1p(-margin) - logits[token].item() + self.SLACK
                values[token] = max(values[token].item(), bias)
            if torch.equal(before, values):
                return values
        return None
