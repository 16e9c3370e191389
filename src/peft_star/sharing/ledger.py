"""The ledger of a patch: what each repair was about, what it changed, and what it left behind.

It lies beside the patch in two files: `repair_ledger.json` holds the entries, and `repair_ledger.safetensors` what
each of them changed in the patch's deltas, so that any can be taken out again. The entries that stand add up to the
patch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch

from ..files import read_json, what_is_wrong, write_json
from ..models.names import plain_name
from .changes import Changes, total
from .entries import Entry, LedgerRow, now, read_entry, tensors_of
from .patch_files import LEDGER_NAME, LEDGER_WEIGHTS, checksum, is_module_name, read_tensors

VERSION = 1


@dataclass(frozen=True)
class Ledger:
    """The entries of a patch, in the order in which they were made."""

    entries: tuple[Entry, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def standing(self) -> list[Entry]:
        """The entries that were not taken out."""
        return [entry for entry in self.entries if entry.stands]

    def with_entry(self, entry: Entry) -> Ledger:
        """The ledger with one entry more."""
        return Ledger((*self.entries, entry))

    def find(self, name: str) -> Entry:
        """The entry of an id, of the beginning of one (four digits or more), or of a number in the order of the log
        (from 1).

        Raises:
            ValueError: There is none, or more than one; one sentence.
        """
        if len(name) < 4:
            number = int(name) if name.isdecimal() and name.isascii() else 0
            found = list(self.entries[number - 1 : number]) if number else []
        else:
            found = [entry for entry in self.entries if entry.id.startswith(name)]
        if len(found) != 1:
            what = "no entry" if not found else f"{len(found)} entries"
            raise ValueError(f"The ledger has {what} {name!r}; `peft-star log` lists them.")
        return found[0]

    def replaced(self, entry: Entry) -> Ledger:
        """The ledger with another state of the entry of this id."""
        return Ledger(tuple(entry if other.id == entry.id else other for other in self.entries))

    def revert(self, entry: Entry) -> Ledger:
        """The ledger with an entry taken out, which stays in it as such.

        Raises:
            ValueError: It has been taken out already.
        """
        if not entry.stands:
            raise ValueError(f"The entry {entry.id} was taken out already, at {entry.reverted}.")
        return self.replaced(replace(entry, reverted=now()))

    def total(self) -> Changes:
        """The sum of what the standing entries changed, which is the patch, by module."""
        names = dict.fromkeys(name for entry in self.standing for name in entry.modules)
        # a module at a time: whole deltas of hundreds of entries would not fit into memory
        return {name: total(e.change_of(name) for e in self.standing if name in e.modules) for name in names}

    def kept_neurons(self) -> dict[str, torch.Tensor]:
        """By module the neurons (k) that standing entries changed."""
        found: dict[str, list[torch.Tensor]] = {}
        for entry in self.standing:
            for name in entry.modules:
                found.setdefault(name, []).append(entry.tensors[name]["neurons"].long())
        return {name: torch.cat(parts).unique() for name, parts in found.items()}

    def standing_rows(self, *sources: str) -> list[tuple[Entry, LedgerRow]]:
        """The rows of the standing entries that hold: of rows with the same prompt, those of the last entry."""
        last = {row.key: entry.id for entry in self.standing for row in entry.rows if row.source == "failures"}
        return [
            (entry, row)
            for entry in self.standing
            for row in entry.rows
            if row.source in sources and last.get(row.key, entry.id) == entry.id
        ]

    def write(self, directory: Path) -> str:
        """Write the ledger's files and return the checksum by which a patch's configuration names them."""
        tensors = tensors_of(self.entries)
        safetensors.torch.save_file(tensors, directory / LEDGER_WEIGHTS, metadata={"format": "pt"})
        content = {
            "version": VERSION,
            "tensors_sha256": checksum(tensors),
            "entries": [entry.to_dict() for entry in self.entries],
        }
        write_json(directory / LEDGER_NAME, content)
        return _sha256(directory / LEDGER_NAME)

    @classmethod
    def read(cls, directory: Path, expected: str | None) -> Ledger | None:
        """The ledger of the patch in a directory, or None where there is none.

        Args:
            directory: The patch's directory.
            expected: What the patch's configuration says that [`write`] returned; None: the patch has no ledger.

        Raises:
            ValueError: It is damaged, or that of another patch; one sentence.
        """
        path = directory / LEDGER_NAME
        if expected is None or not path.is_file():
            return None
        if not is_ledger(directory, expected):
            raise ValueError(f"{path} is damaged: it is not what was saved with this patch (its checksum differs).")
        try:
            data = read_json(path)
            if data["version"] != VERSION:
                raise ValueError(f"this version of peft_star reads ledgers of version {VERSION}")
            tensors = read_tensors(directory / LEDGER_WEIGHTS)
            if checksum(tensors) != data["tensors_sha256"]:
                raise ValueError("its tensors are not those that were saved")
            parts = _sorted(tensors)
            entries = tuple(read_entry(item, parts) for item in data["entries"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({what_is_wrong(error)}).") from None
        ids = {entry.id for entry in entries}
        if len(ids) < len(entries) or not parts.keys() <= ids:
            raise ValueError(f"{path} cannot be read (its entries and its tensors do not belong together).")
        ledger = cls(entries)
        ledger.check_outputs({}, str(path))
        return ledger

    def check_outputs(self, outputs: Mapping[str, int], what: str) -> None:
        """Refuse changes that cannot be added up.

        Args:
            outputs: By module the number of outputs, where it is known.
            what: What is refused, for the message.

        Raises:
            ValueError: One sentence.
        """
        known = dict(outputs)
        for entry in self.entries:
            for name, found in entry.outputs().items():
                if found != known.setdefault(name, found):
                    raise ValueError(
                        f"{what} cannot be read (entry {entry.id} changes {found} outputs of {name}, which has "
                        f"{known[name]})."
                    )

    @classmethod
    def joined(cls, ledgers: Sequence[Ledger | None]) -> Ledger:
        """The entries of several patches, in the order of their times; one that several share is there once."""
        entries = {entry.id: entry for ledger in ledgers if ledger for entry in ledger.entries}
        return cls(tuple(sorted(entries.values(), key=lambda entry: entry.time)))


def is_ledger(directory: Path, expected: str | None) -> bool:
    """Whether the ledger of this checksum lies in a directory."""
    path = directory / LEDGER_NAME
    return expected is not None and path.is_file() and _sha256(path) == expected


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sorted(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        entry, name, part = key.split("/") if key.count("/") == 2 else ("", "", "")
        if not is_module_name(name) or plain_name(name) != name:
            raise ValueError("a tensor names no module")
        found.setdefault(entry, {}).setdefault(name, {})[part] = tensor
    return found
