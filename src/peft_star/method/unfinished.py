"""What an adapter holds, to be put back: after an attempt that failed, or out of the file of a run that was killed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..engine.distributed import is_main_process
from ..failures import Row
from ..files import new_file
from ..models.fingerprint import fingerprint
from ..sharing.patch_files import DELTA, NEURONS, checksum
from .arguments import RepairArguments
from .callbacks import Journal, RepairCallback, RepairState
from .subject import Subject

OF_NO_CONCERN = ("disable_tqdm", "max_batch_tokens", "verify_generation")  # the patch does not depend on them


@dataclass(frozen=True)
class AdapterState:
    """An adapter's neurons (k) and deltas (k, d) by module, and its configuration."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    config: dict[str, Any]

    @classmethod
    def of(cls, subject: Subject) -> AdapterState:
        adapter, layers = subject.adapter, {}
        for name, layer in subject.layers().items():
            layers[name] = layer.star_neurons[adapter].cpu().clone(), layer.star_delta[adapter].detach().cpu().clone()
        # the ledger changes when all is done, and may be large
        held = {name: value for name, value in vars(subject.config).items() if name not in ("ledger", "loaded_ledger")}
        return cls(layers, copy.deepcopy({**held, "repaired": None}))

    @torch.no_grad()
    def put_back(self, subject: Subject, config: bool = True) -> None:
        """Make the adapter hold this again; without `config`, its configuration only as far as that says so."""
        adapter = subject.adapter
        subject.model.base_model.retarget(adapter, {name: neurons for name, (neurons, _) in self.layers.items()})
        for name, layer in subject.layers().items():
            neurons, delta = self.layers[name]
            layer.set_neurons(adapter, neurons, delta)
        if config:
            vars(subject.config).update(copy.deepcopy(self.config))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The neurons and deltas by name, as in a patch's file."""
        pairs = zip((NEURONS, DELTA), (0, 1))
        return {f"{name}.{kind}": held[at] for kind, at in pairs for name, held in self.layers.items()}


class Unfinished:
    """A file with what a repair has finished so far, from which the next repair of the same goes on.

    Args:
        path: The file. It is written after steps, at most every `seconds`, and never in part.
        resume: Whether a repair goes on from what the file holds, if that is of the same model, rows and settings.
        seconds: The least time between two writings.

    Attributes:
        resumed: Whether a repair has gone on from the file.
    """

    def __init__(self, path: str | Path, resume: bool = False, seconds: float = 10.0):
        self.path, self.resume, self.seconds, self.resumed = Path(path).expanduser(), resume, seconds, False
        self._last = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the repair is done."""
        self.path.unlink(missing_ok=True)

    def write(self, state: AdapterState, key: str, journal: Journal) -> None:
        """Keep a state. Whatever goes wrong, the repair is not lost to it."""
        if time.monotonic() - self._last < self.seconds or not is_main_process():
            return
        told = {"steps": journal.steps, "acts": journal.acts, "warnings": journal.warnings}
        with contextlib.suppress(Exception), new_file(self.path) as temporary:
            save_file(state.tensors(), temporary, metadata={"key": key, "journal": json.dumps(told)})
        self._last = time.monotonic()

    def put_back(self, subject: Subject, key: str, journal: Journal) -> bool:
        """Make the adapter hold what the file does, if it may and is of this repair; says whether it was."""
        if not self.resume or not self.path.is_file():
            return False
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != key:
                    return False
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                told = json.loads(metadata["journal"])
        except Exception:  # a file that cannot be read is none to go on from
            return False
        names = [name.removesuffix(f".{DELTA}") for name in tensors if name.endswith(f".{DELTA}")]
        layers = {name: (tensors[f"{name}.{NEURONS}"], tensors[f"{name}.{DELTA}"]) for name in names}
        AdapterState(layers, {}).put_back(subject, config=False)
        journal.steps, journal.acts = told["steps"], told["acts"]
        journal.warnings = [(row, sentence) for row, sentence in told["warnings"]]
        self.resumed = True
        return True


class Keeper(RepairCallback):
    """Writes the adapter into the file after each step."""

    def __init__(self, unfinished: Unfinished, subject: Subject, key: str, journal: Journal):
        self.unfinished, self.subject, self.key, self.journal = unfinished, subject, key, journal

    def on_step_end(self, args: RepairArguments, state: RepairState) -> None:
        self.unfinished.write(AdapterState.of(self.subject), self.key, self.journal)


def key_of(subject: Subject, args: RepairArguments, rows: Sequence[Sequence[Row]], start: AdapterState) -> str:
    """What tells one repair from another: the base's weights, the adapter at the start, the rows, and the settings."""
    settings = {name: value for name, value in args.to_dict().items() if name not in OF_NO_CONCERN}
    texts = [[(row.prompt_ids, row.completion_ids, row.focus, row.focus_starts) for row in part] for part in rows]
    config = {name: str(value) for name, value in sorted(start.config.items())}
    parts = [fingerprint(subject.base), checksum(start.tensors()), texts, settings, config]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
