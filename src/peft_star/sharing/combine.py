"""Two patches beside each other: where they differ, where they pull the same neurons apart, and both as one."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.fingerprint import matches
from .changes import Change, Changes, add, difference
from .entries import Entry
from .ledger import Ledger
from .lora import recorded_widths
from .recorded import Recorded

# two patches pull a layer's neurons apart where the cosine of their deltas there is below this, and these neurons hold
# at least this share of the smaller of the two deltas (both in squares)
APART, MATTERS = -0.1, 0.01


@dataclass(frozen=True)
class Overlap:
    """What two patches do to one layer.

    Attributes:
        name: The module.
        neurons_a, neurons_b, shared: How many neurons each of them holds, and both.
        norm_a, norm_b: The Frobenius norms of their deltas.
        cosine: Of the two deltas at the shared neurons, taken as one vector each; None: none are shared.
        share: Which share of the smaller delta, in squares, these neurons hold.
        opposed: How many of the shared neurons are pulled in opposite directions (cosine below `APART`).
    """

    name: str
    neurons_a: int
    neurons_b: int
    shared: int
    norm_a: float
    norm_b: float
    cosine: float | None
    share: float
    opposed: int

    @classmethod
    def of(cls, name: str, a: Change, b: Change) -> Overlap:
        both = a[0][torch.isin(a[0], b[0])]
        first, second = (change[1].double()[torch.searchsorted(change[0].contiguous(), both)] for change in (a, b))
        norms = [float(change[1].double().norm()) for change in (a, b)]
        lengths = [float(part.norm()) for part in (first, second)]
        cosine = None
        if lengths[0] > 0 and lengths[1] > 0:
            cosine = float((first * second).sum()) / (lengths[0] * lengths[1])
        smaller = norms.index(min(norms))
        share = (lengths[smaller] / norms[smaller]) ** 2 if norms[smaller] > 0 else 0.0
        opposed = int((torch.cosine_similarity(first, second, dim=1) < APART).sum()) if len(both) else 0
        return cls(name, len(a[0]), len(b[0]), len(both), norms[0], norms[1], cosine, share, opposed)

    @property
    def apart(self) -> bool:
        """Whether the two pull the same neurons apart."""
        return self.cosine is not None and self.cosine < APART and self.share >= MATTERS


@dataclass(frozen=True)
class LayerDiff:
    """How one layer of a patch B differs from that of A: neurons that only one of them holds, those of both whose
    deltas differ, and the Frobenius norms of the two deltas and of their difference."""

    name: str
    only_a: int
    only_b: int
    changed: int
    norm_a: float
    norm_b: float
    norm_difference: float


@dataclass(frozen=True)
class Diff:
    """How two patches differ: layer by layer, and in the entries of their ledgers.

    `only_a` and `only_b` are entries that stand in one of them alone, `both` the ids of those that stand in both.
    """

    layers: list[LayerDiff]
    only_a: list[Entry] = field(default_factory=list)
    only_b: list[Entry] = field(default_factory=list)
    both: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether the two patches compute the same, up to rounding."""
        return all(not (layer.only_a or layer.only_b or layer.changed) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        entries = {name: [entry.to_dict() for entry in getattr(self, name)] for name in ("only_a", "only_b")}
        return {"same": self.same, "layers": [asdict(layer) for layer in self.layers], **entries, "both": self.both}


def diff(a: str | Path, b: str | Path, *, revision: str | None = None, token: str | None = None) -> Diff:
    """How patch B differs from patch A; both are directories or Hub ids, and no base model is needed.

    Raises:
        FileNotFoundError, ValueError, OSError: As of [`Recorded.read`].
    """
    first, second = (Recorded.read(patch, revision=revision, token=token) for patch in (a, b))
    parts = first.deltas, second.deltas
    names = dict.fromkeys([*parts[0], *parts[1]])
    standing = [{entry.id: entry for entry in one.ledger.standing} for one in (first, second)]
    alone = [[entry for key, entry in one.items() if key not in other] for one, other in (standing, standing[::-1])]
    both = [key for key in standing[0] if key in standing[1]]
    layers = [_layer_diff(name, *(part.get(name) for part in parts)) for name in names]
    return Diff(layers, alone[0], alone[1], both)


def _layer_diff(name: str, a: Change | None, b: Change | None) -> LayerDiff:
    known = a or b
    assert known is not None, "a layer of neither patch"
    empty = torch.zeros(0, dtype=torch.long), torch.zeros(0, known[1].shape[1])
    a, b = a or empty, b or empty
    # what is nothing beside the deltas is rounding
    least = 1e-6 * max([float(part[1].abs().max()) for part in (a, b) if part[1].numel()], default=0.0)
    change = difference({name: b}, {name: a}).get(name, empty)
    differs = change[0][(change[1].abs() > least).any(dim=1)]
    in_a, in_b = (torch.isin(differs, part[0]) for part in (a, b))
    counts = int((in_a & ~in_b).sum()), int((in_b & ~in_a).sum()), int((in_a & in_b).sum())
    norms = (float(part[1].double().norm()) for part in (a, b, change))
    return LayerDiff(name, *counts, *norms)


def overlaps(a: Changes, b: Changes) -> list[Overlap]:
    """What two patches do to the layers that both of them hold."""
    return [Overlap.of(name, a[name], b[name]) for name in a if name in b]


def stack(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> list[Overlap]:
    """Write two patches as one, with the entries of both ledgers.

    The deltas are added. What the ledgers share is in the sum once, and an entry that one of them has taken out is
    taken out. No base model is needed, so nobody has looked at what the two do together: see [`check`].

    Args:
        a, b: Patches for the same base model: directories or Hub ids.
        out: The directory to write. It appears complete or not at all.
        overwrite: Whether a patch that `out` already holds may be replaced.
        revision, token: For Hub ids.

    Returns:
        What they do to the layers that both hold: [`Overlap.apart`] says where they pull the same neurons apart.

    Raises:
        FileNotFoundError, OSError: As of [`Recorded.read`].
        ValueError: They are for different models, hold whole modules, or `out` cannot be written.
    """
    first, second = (Recorded.read(patch, revision=revision, token=token) for patch in (a, b))
    _check_pair(first, second)
    ledger, rest = _merged(first.ledger, second.ledger)
    joined = add([first.deltas, second.deltas, rest])
    dtypes = {name: delta.dtype for one in (first, second) for name, delta in one.patch.deltas.items()}
    deltas = {name: (neurons, delta.to(dtypes[name])) for name, (neurons, delta) in joined.items() if name in dtypes}
    found = overlaps(first.deltas, add([second.deltas, _common(first.ledger, second.ledger)]))
    values = _config(first, second, list(deltas))
    first.changed(deltas, ledger, **values).write(out, overwrite=overwrite, inputs=(first.directory, second.directory))
    return found


def _check_pair(a: Recorded, b: Recorded) -> None:
    for one in (a, b):
        if one.patch.others or one.patch.config.get("modules_to_save"):
            raise ValueError(f"{one.name} also holds whole modules (`modules_to_save`), which cannot be added up.")
    first, second = (one.patch.config.get("base_fingerprint") for one in (a, b))
    if first and second and not matches(first, second):
        raise ValueError(f"{a.name} and {b.name} were solved for different base weights; a stack needs one base.")
    for name, delta in a.patch.deltas.items():
        if name in b.patch.deltas and b.patch.deltas[name].shape[1] != delta.shape[1]:
            raise ValueError(f"{a.name} and {b.name} are for different models: {name} has another number of outputs.")


def _merged(a: Ledger, b: Ledger) -> tuple[Ledger, Changes]:
    """The entries of two ledgers, and what has to be added to the sum of their patches to get the sum of those."""
    gone = {entry.id for ledger in (a, b) for entry in ledger.entries if not entry.stands}
    counts: dict[str, int] = {}
    for entry in (*a.standing, *b.standing):
        counts[entry.id] = counts.get(entry.id, 0) + 1
    ledger = Ledger.joined([a, b])
    rest = []
    for entry in ledger.entries:
        too_often = counts.get(entry.id, 0) - (entry.id not in gone)
        rest += [_negative(entry)] * max(0, too_often)
    reverted = {entry.id: entry for one in (a, b) for entry in one.entries if not entry.stands}
    return Ledger(tuple(reverted.get(entry.id, entry) for entry in ledger.entries)), add(rest)


def _common(a: Ledger, b: Ledger) -> Changes:
    """The entries that stand in both, with the sign turned: B without them is what B alone does."""
    ids = {entry.id for entry in a.standing}
    return add([_negative(entry) for entry in b.standing if entry.id in ids])


def _negative(entry: Entry) -> Changes:
    return {name: (neurons, -delta) for name, (neurons, delta) in entry.changes().items()}


def _config(a: Recorded, b: Recorded, names: list[str]) -> dict[str, Any]:
    """The values of the stack's configuration that differ from those of A."""
    scopes = [one.patch.config.get("scope") for one in (a, b)]
    # one that is no scope is refused when the stack is loaded
    known = [scope for scope in scopes if isinstance(scope, dict) and isinstance(scope.get("modules"), list)]
    modules = sorted({str(name) for scope in known for name in scope["modules"]})
    values = {
        "scope": {**known[0], "modules": modules} if known else None,
        "base_fingerprint": _either(a, b, "base_fingerprint"),
    }
    if set(a.patch.neurons) != set(names):
        # a pattern matches whole names, where a name would also match the end of another
        values |= {"target_modules": "|".join(map(re.escape, names)), "exclude_modules": None}
        values |= {"layers_to_transform": None, "layers_pattern": None}
        widths = [recorded_widths(one.patch) for one in (a, b)]
        values["in_features"] = {name: widths[0].get(name, widths[1].get(name)) for name in names}
        if None in values["in_features"].values():
            values["in_features"] = None
    return values


def _either(a: Recorded, b: Recorded, name: str) -> Any:
    return a.patch.config.get(name) or b.patch.config.get(name)
