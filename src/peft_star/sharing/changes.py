"""What a repair changes in a patch, as tensors: sums and differences of deltas by neuron, and their form in files.

A *change* of one module is a pair: neurons (k), ascending and unique, and what is added to their deltas (k, d). A
repair of n failing tokens in s steps changes a module by a matrix of rank n s at most, so most changes are kept as two
thin factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

Change = tuple[torch.Tensor, torch.Tensor]
Changes = dict[str, Change]

# a change is kept as factors when what these miss of it is no more than this, relative to its Frobenius norm or to
# that of the deltas which it was added to: what rounding in float32 makes of a change has no low rank
EXACT = 1e-6
# a neuron's delta is nothing when no entry is as large as this, relative to the largest of what was taken off it
NOTHING = 1e-5
NEURONS, WHOLE, LEFT, RIGHT = "neurons", "delta", "left", "right"
# a decomposition of anything larger takes longer than it saves
WIDEST = 1024
# more numbers than any repair changes in a module: two factors of a small file could be made to fill the memory
MOST_NUMBERS = 1 << 28


def total(changes: Iterable[Change]) -> Change:
    """The sum of changes of one module, on the union of their neurons, in float64.

    Args:
        changes: At least one.
    """
    changes = list(changes)
    union = torch.cat([neurons.cpu().long() for neurons, _ in changes]).unique()
    summed = torch.zeros(len(union), changes[0][1].shape[1], dtype=torch.float64)
    for neurons, delta in changes:
        summed.index_add_(0, torch.searchsorted(union, neurons.cpu().long()), delta.detach().cpu().double())
    return union, summed


def add(parts: Iterable[Mapping[str, Change]]) -> Changes:
    """The sum of changes of several modules, module by module; see [`total`]."""
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: total(part[name] for part in parts if name in part) for name in names}


def difference(after: Mapping[str, Change], before: Mapping[str, Change]) -> Changes:
    """What has to be added to `before` to get `after`, in float32, without neurons that did not change, and without
    modules that rounding alone has changed."""
    negative = {name: (neurons, -delta) for name, (neurons, delta) in before.items()}
    found = {name: trim(change) for name, change in add([after, negative]).items()}
    least = {name: EXACT * float(delta.double().norm()) for name, (_, delta) in after.items()}
    return {
        name: (neurons, delta.float())
        for name, (neurons, delta) in found.items()
        if len(neurons) and delta.norm() > least.get(name, 0.0)
    }


def trim(change: Change) -> Change:
    """A change without the neurons whose delta is zero."""
    neurons, delta = change
    used = delta.abs().amax(dim=1) > 0
    return neurons[used], delta[used]


def subtract(patch: Mapping[str, Change], change: Mapping[str, Change], kept: Mapping[str, torch.Tensor]) -> Changes:
    """A patch without a change of it. Each module keeps its data type, and one neuron at least, with a delta of zero
    if nothing else is left.

    Args:
        patch: By module neurons and deltas.
        change: What is taken off; modules that the patch does not hold are left out.
        kept: By module neurons that stay whatever is left of them.
    """
    result = {}
    for name, (neurons, delta) in patch.items():
        if name not in change:
            result[name] = neurons, delta
            continue
        union, rest = total([(neurons, delta), (change[name][0], -change[name][1])])
        least = NOTHING * change[name][1].abs().max()
        stays = torch.isin(union, kept[name].long()) if name in kept else torch.zeros(len(union), dtype=torch.bool)
        touched = torch.isin(union, change[name][0].long())
        nothing = (rest.abs().amax(dim=1) <= least) & touched
        rest[nothing] = 0
        left = ~nothing | stays & torch.isin(union, neurons.cpu().long())
        if not left.any():
            left[0] = True
        result[name] = union[left].to(neurons.dtype), rest[left].to(delta.dtype)
    return result


def norm(changes: Mapping[str, Change]) -> float:
    """The Frobenius norm over all modules."""
    return float(sum(delta.double().square().sum() for _, delta in changes.values()) ** 0.5) if changes else 0.0


def pack(change: Change, scale: float = 0.0) -> dict[str, torch.Tensor]:
    """A change as the tensors of a file: its neurons with its delta (k, d), or with factors (k, r) and (r, d) where
    these are shorter and exact up to [`EXACT`].

    Args:
        change: The change.
        scale: The Frobenius norm of the module's deltas, which its rounding goes with.
    """
    neurons, delta = change[0].to(torch.int32).cpu().contiguous(), change[1].float().cpu().contiguous()
    k, d = delta.shape
    if min(k, d) > WIDEST:
        return {NEURONS: neurons, WHOLE: delta}
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # what is missed when all from here on are left out
    rank = int((tails > EXACT * max(float(tails[0]), scale)).sum()) if len(s) else 0
    if rank * (k + d) >= k * d or not rank:
        return {NEURONS: neurons, WHOLE: delta}
    root = s[:rank].sqrt()
    left, right = (u[:, :rank] * root).float().contiguous(), (root[:, None] * v[:rank]).float().contiguous()
    return {NEURONS: neurons, LEFT: left, RIGHT: right}


def unpack(tensors: Mapping[str, torch.Tensor]) -> Change:
    """What [`pack`] has packed.

    Raises:
        ValueError: The tensors, of a file of unknown origin, are not those of a change; the message says why.
    """
    forms = ({NEURONS, WHOLE}, {NEURONS, LEFT, RIGHT})
    if set(tensors) not in forms:
        raise ValueError(f"it holds {', '.join(sorted(tensors))} in the place of neurons and a delta")
    neurons, parts = tensors[NEURONS], [tensors[name] for name in (WHOLE, LEFT, RIGHT) if name in tensors]
    if neurons.dtype != torch.int32 or neurons.dim() != 1:
        raise ValueError("its neurons are no vector of indices")
    if any(part.dim() != 2 or part.dtype != torch.float32 for part in parts):
        raise ValueError("its delta is no matrix in float32")
    if len(parts[0]) != len(neurons) or len(parts) == 2 and parts[0].shape[1] != len(parts[1]):
        raise ValueError("its neurons and its delta do not belong together")
    if len(neurons) == 0 or neurons.min() < 0 or (neurons.diff() <= 0).any():
        raise ValueError("it names neurons that cannot be")
    if len(neurons) * parts[-1].shape[1] > MOST_NUMBERS:
        raise ValueError("its delta is larger than any repair makes one")
    delta = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
    if not delta.isfinite().all():
        raise ValueError("its delta is not finite")
    return neurons.long(), delta
