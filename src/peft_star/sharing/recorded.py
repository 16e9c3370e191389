"""A patch on disk with its ledger: read, changed entry by entry, and written again, all without its base model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..files import new_directory
from ..models.names import PEFT_PREFIX
from .card import write_card
from .changes import Changes, difference, norm, subtract
from .download import files_of, find_patch
from .entries import Entry
from .ledger import Ledger
from .lora import patch_to_lora
from .patch_files import (
    CARD_NAME,
    CHECKSUM,
    CONFIG_NAME,
    DELTA,
    INDEX_DTYPE,
    LEDGER_CHECKSUM,
    LEDGER_NAME,
    LEDGER_WEIGHTS,
    LORA_DIR,
    NEURONS,
    PLOT_NAME,
    REPORT_NAME,
    TIMES_NAME,
    WEIGHTS_NAME,
    Patch,
    check_patch_output,
    checksum,
    is_own,
    read_tensors,
    write_adapter,
)


@dataclass(frozen=True)
class Recorded:
    """A patch and its ledger.

    Attributes:
        name: What the user calls it: a directory, or a Hub id.
        directory: Where its files are.
        patch: The patch.
        ledger: Its ledger; an empty one where it has none.
    """

    name: str
    directory: Path
    patch: Patch
    ledger: Ledger

    @classmethod
    def read(cls, patch: str | Path, *, revision: str | None = None, token: str | None = None) -> Recorded:
        """Read a patch, a directory or a Hub id, with its ledger.

        Raises:
            FileNotFoundError, OSError: As of [`find_patch`].
            ValueError: It is no patch, or it or its ledger is damaged.
        """
        directory = find_patch(patch, revision=revision, token=token)
        read = Patch.read(directory)
        ledger = Ledger.read(directory, read.config.get(LEDGER_CHECKSUM)) or Ledger()
        outputs = {name: delta.shape[1] for name, delta in read.deltas.items()}
        ledger.check_outputs(outputs, str(directory / LEDGER_NAME))
        return cls(str(patch), directory, read, ledger)

    @property
    def deltas(self) -> Changes:
        """By module its neurons (k), ascending, and its deltas (k, d), in the data type of the file."""
        found = {}
        for name, neurons in self.patch.neurons.items():
            neurons, order = neurons.long().sort()
            found[name] = neurons, self.patch.deltas[name][order]
        return found

    def unaccounted(self) -> float:
        """The norm of what the patch holds beside the sum of its ledger's entries, relative to its own."""
        whole = norm(self.deltas)
        return norm(difference(self.deltas, self.ledger.total())) / whole if whole else 0.0

    def without(self, entry: Entry) -> Recorded:
        """The patch with what an entry changed taken off, exactly, and the entry marked in the ledger.

        Raises:
            ValueError: The entry has been taken out already.
        """
        ledger = self.ledger.revert(entry)
        deltas = subtract(self.deltas, entry.changes(), ledger.kept_neurons())
        return self.changed(deltas, ledger)

    def changed(self, deltas: Changes, ledger: Ledger, **config: Any) -> Recorded:
        """The patch with other deltas and another ledger; `config`: values of its configuration."""
        counts = {name: len(neurons) for name, (neurons, _) in deltas.items()}
        same = len(set(counts.values())) == 1
        sizes = {"num_neurons": max(counts.values()), "neurons_per_module": None if same else counts}
        neurons = {name: neurons.to(INDEX_DTYPE) for name, (neurons, _) in deltas.items()}
        patch = replace(
            self.patch,
            config={**self.patch.config, **sizes, **config},
            neurons=neurons,
            deltas={name: delta for name, (_, delta) in deltas.items()},
        )
        return replace(self, patch=patch, ledger=ledger)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors as a patch's file holds them, by names as in the base model."""
        own = {f"{name}.{NEURONS}": neurons.contiguous() for name, neurons in self.patch.neurons.items()}
        own |= {f"{name}.{DELTA}": delta.contiguous() for name, delta in self.patch.deltas.items()}
        others = read_tensors(self.directory / WEIGHTS_NAME) if self.patch.others else {}
        return own | {key.removeprefix(PEFT_PREFIX): value for key, value in others.items() if not is_own(key)}

    def write(self, output: str | Path, *, overwrite: bool = False, inputs: tuple[Any, ...] = ()) -> Path:
        """Write the patch with its ledger and card; see [`rewriting`]."""
        with rewriting(self, output, overwrite=overwrite, inputs=inputs) as temporary:
            write_recorded(temporary, self.patch.config, self.tensors(), self.ledger)
        return Path(output)


@contextmanager
def rewriting(
    source: Recorded, output: str | Path, *, overwrite: bool = False, inputs: tuple[Any, ...] = ()
) -> Iterator[Path]:
    """A new directory for another state of a patch, which takes the place of the output when it is complete.

    It gets the patch's card, a LoRA twin if the patch has one and, when the patch's own directory is the output, the
    files there that are no patch's. The report of the last repair does not go along: it tells of another state.

    Args:
        source: The patch as it was.
        output: The directory, which may be the patch's own.
        overwrite: Whether a patch that lies there may be replaced.
        inputs: What the output must not be or hold.

    Raises:
        ValueError, OSError: As of [`check_patch_output`] and [`new_directory`].
    """
    output, directory = Path(output).expanduser(), source.directory
    check_patch_output(output, overwrite, inputs=inputs)
    twin = (directory / LORA_DIR / CONFIG_NAME).is_file() or bool(source.patch.config.get("lora_twin"))
    # a card that somebody wrote is kept
    kept = [path for path in files_of(directory) if path.name == CARD_NAME]
    if output.resolve() == directory.resolve():
        own = {CONFIG_NAME, WEIGHTS_NAME, REPORT_NAME, TIMES_NAME, PLOT_NAME, LEDGER_NAME, LEDGER_WEIGHTS}
        kept = [path for path in files_of(directory) if path.name not in own]
    with new_directory(output, overwrite) as temporary:
        for path in kept:
            if path.is_file():
                shutil.copyfile(path, temporary / path.name)
        yield temporary
        write_card(temporary)
        if twin:
            patch_to_lora(temporary, temporary / LORA_DIR, overwrite=True)


def log(patch: str | Path, *, revision: str | None = None, token: str | None = None) -> Ledger:
    """The ledger of a patch, a directory or a Hub id: the repairs that made it. No base model is needed.

    Raises:
        FileNotFoundError, ValueError, OSError: As of [`Recorded.read`].
    """
    return Recorded.read(patch, revision=revision, token=token).ledger


def revert_patch(
    patch: str | Path,
    entry: str,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Entry:
    """Take one repair out of a patch on disk: its change of the deltas is taken off, exactly.

    No base model is needed, so nobody has looked at what the others do without it: see [`revert`], which solves again
    those that it breaks, and [`check`].

    Args:
        patch: A directory or a Hub id.
        entry: The entry's id, the beginning of it, or its number in the log.
        out: The directory to write; by default the patch's own, whose ledger keeps the entry as taken out.
        overwrite: Whether a patch that `out` already holds may be replaced.
        revision, token: For a Hub id.

    Returns:
        The entry.

    Raises:
        FileNotFoundError, OSError: As of [`Recorded.read`].
        ValueError: There is no such entry, it was taken out already, or `out` cannot be written.
    """
    found = Recorded.read(patch, revision=revision, token=token)
    output = output_of(found, patch, out)
    chosen = found.ledger.find(entry)
    found.without(chosen).write(output, overwrite=overwrite or output == found.directory)
    return chosen


def output_of(found: Recorded, patch: str | Path, out: str | Path | None) -> Path:
    """Where another state of a patch goes: `out`, or the patch's own directory.

    Raises:
        ValueError: The patch is one of the Hub's, and no directory is given.
    """
    if out is not None:
        return Path(out).expanduser()
    if not Path(patch).expanduser().is_dir():
        raise ValueError(f"{patch} is on the Hub; name a directory for the patch without the entry.")
    return found.directory


def write_recorded(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], ledger: Ledger
) -> None:
    """Write a patch's tensors, ledger and configuration into a directory, with their checksums."""
    marks = {CHECKSUM: checksum(tensors), LEDGER_CHECKSUM: ledger.write(directory) if len(ledger) else None}
    write_adapter(directory, {**config, **marks}, tensors)
