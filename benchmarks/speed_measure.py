"""What speed.py measures: seconds and passes of repairs, and of the floor beside them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from interface import MAX_BATCH_TOKENS, Applied, Method, Passes, Problem, frozen, now
from methods import METHODS, Star, make_method
from peft_star import RepairArguments, RepairCallback, StarConfig
from peft_star.engine.batch import Batch
from peft_star.engine.engine import Engine
from peft_star.engine.passes import completion_logits, loss_at, teacher_forced
from peft_star.engine.recording import recording
from peft_star.failures import encode_rows
from peft_star.method.callbacks import PHASES
from peft_star.method.semantics import semantic_bases
from peft_star.models.inputs import input_device
from peft_star.models.structure import find_second_matrices

FLOOR = "floor"
CLOCKS = {"cpu": "CPU s", "wall": "wall s"}
OTHER = "other"

Seconds = dict[str, float]
Record = dict[str, Any]


class Stopwatch:
    """Seconds on both clocks since it was made or last read."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last = self._read()

    def _read(self) -> Seconds:
        return {"wall": now(self._device), "cpu": time.process_time()}

    def lap(self) -> Seconds:
        last, self._last = self._last, self._read()
        return {clock: self._last[clock] - last[clock] for clock in last}


class PhaseMeter(RepairCallback):
    """Seconds and passes of each of a repair's phases."""

    def __init__(self, device: torch.device):
        self.device, self.passes = device, Passes()
        self.phases: dict[str, dict[str, float]] = {}

    def _passes(self) -> tuple[int, int]:
        return self.passes.differentiated, self.passes.total - self.passes.differentiated

    def on_phase_begin(self, args: RepairArguments, state) -> None:
        self._before, self._watch = self._passes(), Stopwatch(self.device)

    def on_phase_end(self, args: RepairArguments, state) -> None:
        spent = self._watch.lap()
        counts = (after - before for before, after in zip(self._before, self._passes()))
        spent |= zip(("forward_backwards", "forwards"), counts)
        known = self.phases.setdefault(state.phase, dict.fromkeys(spent, 0))
        for name, value in spent.items():
            known[name] += value


class MeteredStar(Star):
    """`get_peft_model` (its `install`) and `repair`, with the repair's phases."""

    def of_all_layers(self) -> MeteredStar:
        """A repair of one step that patches every layer which this method may choose."""
        config = self._config | {"neuron_pattern": "layer-wise"}
        if config.get("layer_selection", StarConfig.layer_selection) == "occlusion":
            config["layer_selection"] = "all"
        return MeteredStar(self.name, **config, **self._arguments | {"max_steps": 1})

    @contextmanager
    def apply(self, problem: Problem) -> Iterator[Applied]:
        meter = PhaseMeter(input_device(problem.base))
        with meter.passes.counting(problem.base), super().apply(problem, [meter]) as applied:
            yield replace(applied, details={"phases": meter.phases})


def method_of(name: str, config: dict[str, Any], arguments: dict[str, Any]) -> Method:
    """The method of this name; the settings are for STAR and its variants, which keep what makes them variants."""
    factory = METHODS[name]
    return (
        MeteredStar(name, **{**config, **arguments, **factory.keywords}) if factory.func is Star else make_method(name)
    )


@contextmanager
def lapped(install: Callable, laps: dict[str, Seconds], base: nn.Module) -> Iterator[Any]:
    """A method's `install` that says in `laps` how long it took to make room for the patch, and to take it off."""
    watch = Stopwatch(input_device(base))
    with ExitStack() as stack:
        patch = stack.enter_context(install(base))
        laps["setup"] = watch.lap()
        yield patch
        watch.lap()
    laps["removal"] = watch.lap()


def input_gradients(base: nn.Module, batch: Batch, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The full forward-backward: the gradient of the loss at the tokens `chosen` (mask of N) with respect to the input
    of every FFN's second matrix, in order of depth; each of its input's shape, (B, T, m) in most models."""
    with recording(find_second_matrices(base), {}) as seen, torch.enable_grad():
        loss = loss_at(completion_logits(base, batch), batch, chosen)
    return torch.autograd.grad(loss, list(seen.v.values()))


class Study:
    """Times methods and floors on one model."""

    def __init__(self, base: nn.Module, tokenizer, margin: float, mode: str):
        self.base, self.tokenizer, self.margin, self.mode = base, tokenizer, margin, mode
        self.device, self.engine = input_device(base), Engine(base, MAX_BATCH_TOKENS)

    def failing(self, row: dict[str, str]) -> tuple[Batch, torch.Tensor]:
        """The row as a batch, and its failing tokens (mask of N)."""
        (batch,) = self.engine.batches(encode_rows([row], self.tokenizer))
        with frozen(self.base):
            return batch, ~teacher_forced(self.engine, [batch]).right

    def floor(self, row: dict[str, str]) -> Record:
        batch, failing = self.failing(row)
        record: Record = {"failures": int(failing.sum()), "tokens": batch.input_ids.shape[1]}
        if record["failures"]:
            gc.collect()
            with frozen(self.base):
                watch = Stopwatch(self.device)
                input_gradients(self.base, batch, failing)
                record["forward_backward"] = watch.lap()
                with torch.no_grad():
                    completion_logits(self.base, batch)
                record["forward"] = watch.lap()
        return record

    def patched(self, row: dict[str, str], method: Method) -> Record:
        laps: dict[str, Seconds] = {}
        install = method.install
        method.install = partial(lapped, install, laps)
        gc.collect()
        try:
            with method.patched(self.base, self.tokenizer, [row], margin=self.margin, mode=self.mode) as outcome:
                found = outcome.to_dict()
        finally:
            method.install = install
        details = found.pop("details")
        whole = {"wall": found.pop("seconds"), "cpu": details["cpu_seconds"]}
        seconds = {clock: whole[clock] - laps["setup"][clock] for clock in whole}
        phases = {"phases": details["phases"]} if "phases" in details else {}
        return {"seconds": seconds, **laps, **found, **phases}

    def warm_up(self, rows: dict[str, list[dict[str, str]]], methods: dict[str, Method]) -> dict[str, Any]:
        """Do what is done once for each model (and process), and say how long it took.

        Raises:
            SystemExit: There is nothing to repair.
        """
        row = next((row for items in rows.values() for row in items if self.failing(row)[1].any()), None)
        if row is None:
            raise SystemExit("The model gets every token of these rows right; take other rows, or more of them.")
        self.floor(row)
        watch = Stopwatch(self.device)
        semantic_bases(self.base)
        once: dict[str, Any] = {"semantic bases": watch.lap(), "first repair": {}}
        for name, method in methods.items():
            if isinstance(method, MeteredStar):
                first, second = (phase_seconds(self.patched(row, method)) for _ in range(2))
                once["first repair"][name] = {
                    phase: {clock: first[phase][clock] - second[phase][clock] for clock in CLOCKS} for phase in second
                }
                # another row may choose layers whose background activations this row did not need
                self.patched(row, method.of_all_layers())
        return once

    def units(
        self, rows: dict[str, list[dict[str, str]]], methods: dict[str, Method], repeats: int, mint_rows: int | None
    ) -> Iterator[tuple[str, Callable[[], Record]]]:
        """What is to be done, by key: round-robin over the tasks, floor and methods in turn on each row."""
        turn = 0
        for number in range(max(map(len, rows.values()))):
            for task, items in rows.items():
                if number >= len(items):
                    continue
                todo = {FLOOR: self.floor} | {name: partial(self.patched, method=m) for name, m in methods.items()}
                if mint_rows is not None and number >= mint_rows:
                    todo.pop("mint", None)
                for repeat in range(repeats):
                    if repeat:
                        todo.pop("mint", None)
                    names = list(todo)
                    start = turn % len(names)
                    for name in names[start:] + names[:start]:
                        yield f"{task}/{number}/{name}/{repeat}", partial(todo[name], items[number])
                    turn += 1


def phase_seconds(record: Record) -> dict[str, Seconds]:
    """Seconds of a repair by phase, with those that lie in none of them."""
    phases = {name: record["phases"].get(name, dict.fromkeys(CLOCKS, 0.0)) for name in PHASES}
    spent = {name: {clock: phases[name][clock] for clock in CLOCKS} for name in PHASES}
    spent[OTHER] = {c: record["seconds"][c] - sum(phase[c] for phase in spent.values()) for c in CLOCKS}
    return spent
