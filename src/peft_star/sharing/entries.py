"""The entries of a patch's ledger: one for each repair."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from typing import Any

import torch

from ..row_checks import validate_row
from .changes import RIGHT, WHOLE, Change, Changes, add, norm, pack, unpack
from .patch_files import checksum

KINDS = ("repair", "change outside of a repair")
REPAIR, OUTSIDE = KINDS
SOURCES = ("failures", "retain", "related")
# activations of failing tokens that are kept in the place of their rows: a part of the tensors of an entry
KEYS = "keys"
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class LedgerRow:
    """One row of a repair.

    Attributes:
        source: "failures", "retain" or "related".
        row: The row as it was given.
        tokens: How many tokens its completion has.
        wrong_before, wrong_after: Which of them, by number, were wrong teacher-forced before and after.
        generated_before, generated_after: Whether greedy generation gave the completion (None: not looked at).
    """

    source: str
    row: dict[str, Any]
    tokens: int
    wrong_before: list[int]
    wrong_after: list[int]
    generated_before: bool | None = None
    generated_after: bool | None = None

    @property
    def is_right(self) -> bool:
        """Whether it was right after its repair, by every check that was made."""
        return not self.wrong_after and self.generated_after is not False

    @property
    def key(self) -> str:
        """What tells its prompt from others."""
        return json.dumps(self.row["prompt"], sort_keys=True)


@dataclass(frozen=True)
class Entry:
    """One repair.

    Attributes:
        id: Eight hexadecimal digits.
        time: When it ended, in UTC, as ISO 8601 writes it.
        kind: One of `KINDS`.
        note: What its maker says of it.
        rows: Its rows, unless they were not to be kept.
        summary: The report's figures, before and after.
        harm: What it did to other text, by measure.
        patch: Of the patch behind it: `norm` (Frobenius, of all deltas), `neurons`, `layers`; and `change`, the norm
            of what the repair changed.
        modules: By module how many neurons the repair changed.
        arguments, config: The settings that differ from their defaults, and what the patch was allowed to touch.
        base_fingerprint: Of the weights that it was solved for.
        versions: Of the packages that it ran with.
        reverted: When it was taken out; "" while it stands.
        amended: When it was last solved again, because the revert of another entry had broken it; "": never.
        tensors: By module what [`pack`] makes of what it changed, with activations under `KEYS` if there are any.
    """

    id: str
    time: str
    kind: str = REPAIR
    note: str = ""
    rows: list[LedgerRow] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    harm: dict[str, float] = field(default_factory=dict)
    patch: dict[str, float] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    base_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    reverted: str = ""
    amended: str = ""
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        change: Mapping[str, Change],
        keys: Mapping[str, torch.Tensor] | None = None,
        behind: Mapping[str, Change] | None = None,
        **values: Any,
    ) -> Entry:
        """An entry that ends now, with an id of its own.

        Args:
            change: By module the neurons (k) and what was added to their deltas (k, d).
            behind: The patch behind it, by module.
            keys: By module activations (n, m) of the failing tokens, if these are kept.
            values: The other attributes.
        """
        tensors = _packed(change, behind)
        for name, part in (keys or {}).items():
            tensors.setdefault(name, {})[KEYS] = part.to(torch.bfloat16).cpu().contiguous()
        modules = {name: len(neurons) for name, (neurons, _) in change.items()}
        entry = cls("", now(), modules=modules, tensors=tensors, **values)
        text = json.dumps([entry.to_dict(), checksum(tensors_of([entry]))], sort_keys=True)
        return replace(entry, id=hashlib.sha256(text.encode()).hexdigest()[:8])

    @property
    def stands(self) -> bool:
        return not self.reverted

    def changes(self) -> Changes:
        """By module the neurons (k) that the repair changed, and what it added to their deltas (k, d)."""
        return {name: self.change_of(name) for name in self.modules}

    def change_of(self, name: str) -> Change:
        """What the repair changed in one of its modules."""
        return unpack({part: tensor for part, tensor in self.tensors[name].items() if part != KEYS})

    def outputs(self) -> dict[str, int]:
        """By module how many outputs (d) what the repair changed has; nothing is unpacked for it."""
        whole = {name: parts.get(WHOLE, parts.get(RIGHT)) for name, parts in self.tensors.items()}
        return {name: tensor.shape[1] for name, tensor in whole.items() if tensor is not None}

    def keys(self) -> dict[str, torch.Tensor]:
        """By module the activations (n, m) of its failing tokens, where they are kept."""
        return {name: parts[KEYS] for name, parts in self.tensors.items() if KEYS in parts}

    def amend(self, change: Mapping[str, Change], behind: Mapping[str, Change] | None = None) -> Entry:
        """The entry with something more that the patch holds for its rows; `behind`: the patch behind that."""
        changes = add([self.changes(), change])
        tensors = _packed(changes, behind)
        for name, part in self.keys().items():
            tensors.setdefault(name, {})[KEYS] = part
        modules = {name: len(neurons) for name, (neurons, _) in changes.items()}
        patch = {**self.patch, "change": norm(changes)}
        return replace(self, modules=modules, tensors=tensors, patch=patch, amended=now())

    def rows_of(self, source: str) -> list[LedgerRow]:
        return [row for row in self.rows if row.source == source]

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, as plain JSON types."""
        data = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("rows", "tensors")}
        return {**data, "rows": [asdict(row) for row in self.rows]}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def size_of(patch: Mapping[str, Change], change: Mapping[str, Change]) -> dict[str, float]:
    """An entry's `patch`: of the deltas by module behind it, and of what it changed."""
    neurons = {name: int((delta.abs().amax(dim=1) > 0).sum()) for name, (_, delta) in patch.items()}
    return {
        "norm": norm(patch),
        "change": norm(change),
        "neurons": sum(neurons.values()),
        "layers": sum(count > 0 for count in neurons.values()),
    }


def _packed(change: Mapping[str, Change], behind: Mapping[str, Change] | None) -> dict[str, dict[str, torch.Tensor]]:
    scales = {name: norm({name: part}) for name, part in (behind or {}).items()}
    return {name: pack(part, scales.get(name, 0.0)) for name, part in change.items()}


def tensors_of(entries: Iterable[Entry]) -> dict[str, torch.Tensor]:
    """The tensors of entries by `id/module/part`."""
    return {
        f"{entry.id}/{name}/{part}": tensor
        for entry in entries
        for name, parts in entry.tensors.items()
        for part, tensor in parts.items()
    }


def read_entry(data: Mapping[str, Any], tensors: Mapping[str, Any]) -> Entry:
    """An entry as a file of unknown origin has it, checked."""
    rows = [LedgerRow(**item) for item in data["rows"]]
    known = {item.name for item in fields(Entry)} - {"rows", "tensors"}
    values = {key: value for key, value in data.items() if key in known}
    entry = Entry(**values, rows=rows, tensors=tensors.get(data["id"], {}))
    for item in fields(entry):
        kind = _TYPES.get(str(item.type))
        if kind and not isinstance(getattr(entry, item.name), kind):
            raise ValueError(f"an entry's {item.name} is {type(getattr(entry, item.name)).__name__}")
    if len(entry.id) != 8 or not all(char in "0123456789abcdef" for char in entry.id) or entry.kind not in KINDS:
        raise ValueError("an entry has no id or no kind")
    for values in (entry.harm, entry.patch):
        if not all(type(value) in (int, float) and abs(value) <= LARGEST for value in values.values()):
            raise ValueError(f"a figure of entry {entry.id} is no number")
    for row in rows:
        _check_row(row, entry.id)
    for name, parts in entry.tensors.items():
        keys = parts.get(KEYS)
        if keys is not None and (keys.dtype != torch.bfloat16 or keys.dim() != 2 or not keys.isfinite().all()):
            raise ValueError(f"the activations of entry {entry.id} are no finite matrix in bfloat16")
        if name not in entry.modules and set(parts) != {KEYS}:
            raise ValueError(f"entry {entry.id} does not name {name}")
    for name, count in entry.modules.items():
        if len(entry.change_of(name)[0]) != count:
            raise ValueError(f"entry {entry.id} does not hold the neurons of {name} that it names")
    return entry


def _check_row(row: LedgerRow, entry: str) -> None:
    validate_row(row.row, f"a row of entry {entry}")
    wrong = [*row.wrong_before, *row.wrong_after]
    tokens = type(row.tokens) is int and all(type(token) is int and 0 <= token < row.tokens for token in wrong)
    if row.source not in SOURCES or not tokens:
        raise ValueError(f"a row of entry {entry} says nothing of its tokens")
    if not all(isinstance(value, bool | None) for value in (row.generated_before, row.generated_after)):
        raise ValueError(f"a row of entry {entry} does not say whether it was generated right")


_TYPES = {"str": str, "dict[str, Any]": dict, "dict[str, float]": dict, "dict[str, int]": dict, "dict[str, str]": dict}
