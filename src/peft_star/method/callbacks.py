"""What a repair tells while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from ..engine.distributed import is_main_process
from .arguments import RepairArguments

PHASES = ("failures", "trace", "locate", "solve", "patch", "verify")


@dataclass
class RepairState:
    """Where a repair stands.

    Attributes:
        phase: One of `PHASES`.
        done, total: Work units of the current phase; `total` 0 when it cannot be told.
        step, max_steps: Steps of the current set of failures.
        num_failures, num_solved: Failing tokens found and solved so far.
        loss: Cross entropy summed over the failing tokens at the last forward pass.
        seconds: Seconds by phase.
    """

    phase: str = ""
    done: int = 0
    total: int = 0
    step: int = 0
    max_steps: int = 0
    num_failures: int = 0
    num_solved: int = 0
    loss: float = float("nan")
    seconds: dict[str, float] = field(default_factory=dict)


class RepairCallback:
    """Override what you want to hear of; every method gets the arguments and the current [`RepairState`]."""

    def on_repair_begin(self, args: RepairArguments, state: RepairState) -> None: ...

    def on_phase_begin(self, args: RepairArguments, state: RepairState) -> None: ...

    def on_progress(self, args: RepairArguments, state: RepairState) -> None: ...

    def on_step_end(self, args: RepairArguments, state: RepairState) -> None: ...

    def on_phase_end(self, args: RepairArguments, state: RepairState) -> None: ...

    def on_repair_end(self, args: RepairArguments, state: RepairState) -> None: ...


class ProgressCallback(RepairCallback):
    """One tqdm bar for each phase."""

    bar: tqdm | None = None

    def on_phase_begin(self, args: RepairArguments, state: RepairState) -> None:
        self.bar = tqdm(total=state.total or None, desc=state.phase, leave=False)

    def on_progress(self, args: RepairArguments, state: RepairState) -> None:
        if self.bar is not None:
            self.bar.update(state.done - self.bar.n)

    def on_step_end(self, args: RepairArguments, state: RepairState) -> None:
        if self.bar is not None:
            self.bar.set_postfix(solved=f"{state.num_solved}/{state.num_failures}", loss=f"{state.loss:.3g}")

    def on_phase_end(self, args: RepairArguments, state: RepairState) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Journal:
    """Keeps the state, times the phases and calls the callbacks.

    Attributes:
        state: The [`RepairState`] that callbacks see.
        steps: Steps taken in all.
        solved_before: Failures that were solved before those that are being patched.
        occlusion: What was last measured of the layers, for the report.
        acts: Where the patch acts, for the report: dicts of a failures' `row` (its index), `how` ("focus", "found
            focus" or "failing position"), the `tokens` (positions in the row's tokens) and the `layers` (module
            names).
        costs: By slot of a failing token an estimate of how far its push moves other text, see `protected.py`.
        warnings: What a reader should know of a failures' row: its index, and a sentence.
    """

    def __init__(self, args: RepairArguments, callbacks: Sequence[RepairCallback] | None):
        self.args, self.state = args, RepairState(max_steps=args.max_steps)
        self.steps, self.solved_before = 0, 0
        self.occlusion: dict[str, Any] = {}
        self.acts: list[dict[str, Any]] = []
        self.costs: dict[int, float] = {}
        self.warnings: list[tuple[int, str]] = []
        self.callbacks = list(callbacks or ())
        if not args.disable_tqdm and is_main_process():
            self.callbacks.append(ProgressCallback())

    def begin_again(self) -> None:
        """What was told of the patch so far is no longer so."""
        self.state.num_solved = self.solved_before = 0
        self.acts.clear()
        self.costs.clear()
        self.warnings.clear()

    def told(self) -> Callable[[], None]:
        """What puts back, later on, all that is told of the patch as it is now."""
        solved, solved_before = self.state.num_solved, self.solved_before
        acts, costs, warnings = list(self.acts), dict(self.costs), list(self.warnings)

        def tell() -> None:
            self.state.num_solved, self.solved_before = solved, solved_before
            self.acts, self.costs, self.warnings = list(acts), dict(costs), list(warnings)

        return tell

    def call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state)

    @contextmanager
    def phase(self, name: str, total: int = 0) -> Iterator[None]:
        self.state.phase, self.state.done, self.state.total = name, 0, total
        start = time.perf_counter()
        self.call("on_phase_begin")
        try:
            yield
        finally:
            self.state.seconds[name] = self.state.seconds.get(name, 0.0) + time.perf_counter() - start
            self.call("on_phase_end")

    def cost(self, slot: int, amount: float) -> None:
        """Add to what the push of a failing token costs."""
        self.costs[slot] = self.costs.get(slot, 0.0) + amount

    def advance(self, amount: int = 1) -> None:
        self.state.done += amount
        self.call("on_progress")

    def step(self, step: int, solved: int, loss: float) -> None:
        """A step of the current set of failures is finished, with `solved` of them solved."""
        self.state.step, self.state.num_solved, self.state.loss = step, self.solved_before + solved, loss
        self.steps += 1
        self.advance()
        self.call("on_step_end")
