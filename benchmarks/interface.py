"""What every repair method of the benchmarks offers, so that all are run, timed, judged and undone in the same way."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft_star import RepairArguments
from peft_star.engine.batch import Batch, make_batches
from peft_star.engine.engine import Engine
from peft_star.engine.passes import teacher_forced
from peft_star.failures import Row, encode_rows
from peft_star.models.inputs import input_device

MAX_BATCH_TOKENS = RepairArguments.max_batch_tokens
MODES = ("multiple", "single")


@dataclass
class Outcome:
    """What a method did to some rows, measured by passes of the benchmark's own, which are not timed.

    Attributes:
        model: What to run as long as the patch is on: the base itself, or the `PeftModel` around it.
        seconds: Wall-clock time of the whole repair, an adapter's creation included.
        failures: Tokens that were wrong before (teacher-forced).
        solved: Of these the ones that are right now.
        right: Tokens that were right before.
        broken: Of these the ones that are wrong now.
        forward_backwards, forwards: Passes of one batch with and without differentiation.
        steps: Updates of the patch.
        details: What else a method has to say, as JSON types.
    """

    model: nn.Module
    seconds: float
    failures: int
    solved: int
    right: int
    broken: int
    forward_backwards: int
    forwards: int
    steps: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        return self.solved == self.failures and not self.broken

    def to_dict(self) -> dict[str, Any]:
        """All but the model, as JSON types."""
        return {key: value for key, value in vars(self).items() if key != "model"} | {"success": self.success}


class Passes:
    """Counts the passes through the LM head, and how many of them were differentiated."""

    def __init__(self) -> None:
        self.total = self.differentiated = 0

    @contextmanager
    def counting(self, base: nn.Module) -> Iterator[None]:
        def backward(gradient: torch.Tensor) -> None:
            self.differentiated += 1

        def forward(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            self.total += 1
            if output.requires_grad:
                output.register_hook(backward)

        handle = base.get_output_embeddings().register_forward_hook(forward)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def frozen(base: nn.Module) -> Iterator[None]:
    """Evaluation mode and no trainable parameter; flags and modes are back as they were afterwards."""
    training = {module: module.training for module in base.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
    base.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


def now(device: torch.device) -> float:
    """The clock, read when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def padded(rows: Sequence[Row], base: nn.Module) -> list[Batch]:
    """The rows in batches, each a sequence of its own. Sharing prefixes is how a repair of the package is fast, not
    what the other methods do, nor how a patch is judged."""
    return make_batches(rows, MAX_BATCH_TOKENS, input_device(base))


@dataclass
class Problem:
    """What a method is given: the engine of the plain model, and rows as text and as tokens."""

    engine: Engine
    tokenizer: Any
    rows: Sequence[dict[str, Any]]
    encoded: list[Row]
    margin: float
    mode: str

    @property
    def base(self) -> nn.Module:
        return self.engine.model


@dataclass
class Applied:
    """What a method hands back while its patch is on."""

    model: nn.Module
    steps: int
    details: dict[str, Any] = field(default_factory=dict)


class Method(ABC):
    """One way to repair a model.

    Attributes:
        name: Its name in `methods.METHODS`.
        settings: Every hyper-parameter, as JSON types; results carry them.
        modes: The modes that differ for this method; it accepts all of `MODES`.
    """

    modes: tuple[str, ...] = MODES

    def __init__(self, name: str, **settings: Any):
        self.name, self.settings = name, settings

    @contextmanager
    def patched(
        self,
        base: nn.Module,
        tokenizer,
        rows: Sequence[dict[str, Any]],
        *,
        margin: float = 0.01,
        mode: str = "multiple",
    ) -> Iterator[Outcome]:
        """Let `base` behave as repaired; on leaving, all of it is bit-exactly as it was.

        Args:
            base: A plain transformers causal LM.
            tokenizer: Its tokenizer.
            rows: Prompt-completion rows; every token of a completion that the model gets wrong is a failure.
            margin: A token is solved when its probability exceeds that of every other token by more than this.
            mode: `"multiple"`: all failures together; `"single"`: one after the other.

        Yields:
            [`Outcome`]

        Raises:
            ValueError: Unknown mode, or a malformed row.
        """
        if mode not in MODES:
            raise ValueError(f"`mode` is {mode!r}; choose one of {', '.join(map(repr, MODES))}.")
        device, passes, engine = input_device(base), Passes(), Engine(base, MAX_BATCH_TOKENS)
        encoded = encode_rows(rows, tokenizer)
        batches = padded(encoded, base)
        with frozen(base):
            before = teacher_forced(engine, batches)
            with passes.counting(base):
                start, cpu = now(device), time.process_time()
                with self.apply(Problem(engine, tokenizer, rows, encoded, margin, mode)) as applied:
                    seconds, cpu = now(device) - start, time.process_time() - cpu
                    counts = passes.differentiated, passes.total - passes.differentiated
                    after = teacher_forced(engine, batches)
                    yield Outcome(
                        applied.model,
                        seconds,
                        failures=int((~before.right).sum()),
                        solved=int((~before.right & after.right).sum()),
                        right=int(before.right.sum()),
                        broken=int((before.right & ~after.right).sum()),
                        forward_backwards=counts[0],
                        forwards=counts[1],
                        steps=applied.steps,
                        details={
                            "cpu_seconds": cpu,
                            "solved_by_margin": int((~before.right & after.solved(margin)).sum()),
                            **applied.details,
                        },
                    )

    @abstractmethod
    def apply(self, problem: Problem):
        """A context manager that repairs, yields [`Applied`], and undoes everything on leaving, whatever happens."""
