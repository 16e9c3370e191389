"""Targets where the semantics of the head do not reach: what a hidden state midway through the model should be.

Equation 1 names the representation that the head should read. Layers further down hand their outputs to layers that
transform them, so there a target is found through these layers, by a few gradient steps (not in the paper; the loss
is that of the "v*" of ROME and MEMIT, Meng et al. 2022). Each step goes along the natural gradient, which changes
least of what the model says by itself (`sensitivity.py`), as far as the slope says that the cross entropy is gone
(Polyak's step); that takes half as many as Adam and ends with a smaller change. A step computes only what depends on
the target: the layers above, from the site on, and logits where the loss reads them.

What follows the site is blurred, by noise that is drawn anew in each step: the target is to work through what is said
of the site, not through the words of this one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from ..engine.replay import Replay
from ..engine.tails import Tails, can_read_tails
from ..failures import Row
from ..models.inputs import input_device
from .sensitivity import damped

# the largest change and the longest step, relative to the hidden states' size, and the weight of the divergence of
# what is said right behind the site; the first and the last are MEMIT's
LARGEST, LONGEST, DIVERGENCE = 0.75, 0.4, 0.0625
# at least, so that a target has seen more than one blur, and at most
STEPS = 4, 8
# cross entropy (nats a row) that is low enough
ENOUGH = 0.05
# size of the noise on what follows the site, relative to the hidden states' there
NOISE = 1.0
# tokens of the rows that are searched for together, at most; more of them at once are not faster
TOGETHER = 512
# sites that are done are dropped from a batch when they are at least this share of it
DONE = 0.25


@dataclass(frozen=True)
class Site:
    """Where a push acts: some tokens of a row, as it is and behind other texts.

    Attributes:
        rows: The row's versions, each with its completion.
        positions: Per version the positions of its s tokens, ascending.
    """

    rows: tuple[Row, ...]
    positions: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.positions[0])


def find_targets(
    model: nn.Module,
    top: str,
    above: str,
    sites: Sequence[Site],
    max_tokens: int,
    progress: Callable[[int], None] | None = None,
    fisher: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """What has to be added to the hidden states that leave the layer `top`, at each site, for its completions.

    Per token of a site a vector δ, together minimising the mean cross entropy of its rows' completions, with a term
    that keeps what the model says right behind the tokens, and a bound on the size of δ. Sites know nothing of each
    other; several share a forward.

    Args:
        model: A causal LM in evaluation mode whose parameters need no gradient.
        top, above: Names of a decoder layer and of the next one.
        sites: The sites.
        max_tokens: Tokens of one batch.
        progress: Called with the number of sites done.
        fisher: The Fisher information (d, d) of the hidden states that leave `top`; None: steps go along the gradient.

    Returns:
        Per site δ, float32, shape (s, d).
    """
    found: list[torch.Tensor | None] = [None] * len(sites)
    factor = None if fisher is None else damped(fisher, input_device(model))
    for group in _groups(sites, min(max_tokens, TOGETHER)):
        for number, delta in zip(group, _search(model, top, above, [sites[number] for number in group], factor)):
            found[number] = delta
        if progress is not None:
            progress(len(group))
    return [delta for delta in found if delta is not None]  # which none is by now


def _groups(sites: Sequence[Site], limit: int) -> Iterator[list[int]]:
    """Sites of similar length, such that their tokens from the site on, padding included, fit; one always does."""

    def length(number: int) -> int:
        site = sites[number]
        return max(len(row) - places[0] for row, places in zip(site.rows, site.positions))

    group: list[int] = []
    for number in sorted(range(len(sites)), key=length):
        if group and sum(len(sites[other].rows) for other in (*group, number)) * length(number) > limit:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


class _Batch:
    """The versions of some sites, as one forward reads them.

    Attributes:
        open: Numbers of the sites.
        tails: Their rows, versions of a site one after the other; its N logits are in the rows' order, of each row at
            the tokens in front of its completion's and then behind the site's.
        own: Which of the N logits are of completions, mask.
        owner: Of each of the N logits the site, N numbers.
        expected: The completions' tokens.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], open_: Sequence[int], tails: bool):
        self.open = list(open_)
        offsets = [0, *accumulate(site.size for site in sites)]
        self.total = offsets[-1]
        versions = [
            (number, row, places)
            for number in self.open
            for row, places in zip(sites[number].rows, sites[number].positions)
        ]
        starts = [places[0] if tails else 0 for _, _, places in versions]
        reads, owner, own, at = [], [], [], []
        expected: list[int] = []
        for line, (number, row, places) in enumerate(versions):
            # a token right in front of its completion is to say something else
            behind = [place for place in places if place < row.medium_positions[0]]
            reads.append([*row.medium_positions, *behind])
            owner += [number] * len(reads[-1])
            own += [True] * len(row.completion_ids) + [False] * len(behind)
            expected += row.completion_ids
            at += [(line, place - starts[line], offsets[number] + rank) for rank, place in enumerate(places)]
        self.tails = Tails(model, [row for _, row, _ in versions], starts, reads)
        device = self.tails.input_ids.device
        self.owner, self.own = torch.tensor(owner, device=device), torch.tensor(own, device=device)
        self.expected = torch.tensor(expected, device=device)
        self.lines, self.places, self.index = torch.tensor(at, device=device).T.contiguous()
        self._sites, self._offsets = sites, offsets
        self.versions = torch.tensor([len(sites[number].rows) for number in owner], device=device)

    def part(self, values: torch.Tensor, number: int) -> torch.Tensor:
        """Of values (S, ...) those of one site (s, ...)."""
        return values[self._offsets[number] : self._offsets[number + 1]]

    def per_site(self, values: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Sums (sites) of values (n) by the sites that they belong to (n)."""
        return values.new_zeros(len(self._sites)).index_add_(0, owner.to(values.device), values)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Means (sites) of values (n) at the sites' tokens."""
        owner = torch.bucketize(self.index, torch.tensor(self._offsets[1:], device=self.index.device), right=True)
        return self.per_site(values, owner) / self.per_site(torch.ones_like(values), owner)


class _Change:
    """What is added to the states that leave a layer, at a batch's sites: δ (S, d) for all tokens of all sites; and
    what follows the sites, blurred.

    Attributes:
        delta: δ, once a forward has shown how wide states are.
        seen: The states (n, d) that the last forward found there.
    """

    def __init__(self) -> None:
        self.delta: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self._generator = torch.Generator().manual_seed(0)

    @contextmanager
    def within(self, layer: nn.Module, batch: _Batch) -> Iterator[None]:
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            lines, places, index = (part.to(hidden.device) for part in (batch.lines, batch.places, batch.index))
            self.seen = hidden[lines, places].detach().float()
            if self.delta is None:
                self.delta = self.seen.new_zeros(batch.total, hidden.shape[-1], requires_grad=True)
            hidden = hidden + self._noise(hidden, lines, places)
            hidden = hidden.index_put((lines, places), self.delta[index].to(hidden), accumulate=True)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _noise(self, hidden: torch.Tensor, lines: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Noise (B, T, d) behind each line's first site token, but for the sites' own."""
        first = torch.full(hidden.shape[:1], hidden.shape[1], device=hidden.device)
        first = first.scatter_reduce(0, lines, places, "amin")
        behind = torch.arange(hidden.shape[1], device=hidden.device) > first[:, None]
        behind[lines, places] = False
        noise = torch.randn(hidden.shape, generator=self._generator).to(hidden)
        size = hidden.detach().norm(dim=-1, keepdim=True) / hidden.shape[-1] ** 0.5
        return behind[..., None] * (NOISE * size * noise)


def _search(
    model: nn.Module, top: str, above: str, sites: Sequence[Site], factor: torch.Tensor | None
) -> list[torch.Tensor]:
    """[`find_targets`] of sites that share each forward; `factor` is the damped Fisher information's."""
    layer, tails = model.get_submodule(top), can_read_tails(model, above)
    replay = Replay(model, above, check=not tails, caches=tails)
    batch, change = _Batch(model, sites, range(len(sites)), tails), _Change()
    found: list[torch.Tensor | None] = [None] * len(sites)
    least, most = STEPS
    before = scales = torch.zeros(0)
    for step in range(most + 1):
        with torch.enable_grad(), replay(batch), change.within(layer, batch):
            logits = batch.tails.logits(model).float()
            assert change.delta is not None and change.seen is not None  # the forward has made them
            own = F.cross_entropy(logits[batch.own], batch.expected, reduction="none") / batch.versions[batch.own]
            now = logits[~batch.own].log_softmax(-1)
            if step == 0:
                # nothing is changed yet, so this is what is to be kept
                before, scales = now.detach(), batch.mean(change.seen.norm(dim=-1))
            moved = F.kl_div(now, before, log_target=True, reduction="none").sum(-1) / batch.versions[~batch.own]
            loss = own.sum() + DIVERGENCE * moved.sum()
        entropy = batch.per_site(own.detach(), batch.owner[batch.own])
        for number in batch.open:
            if found[number] is None and (step >= least and entropy[number] < ENOUGH or step == most):
                found[number] = batch.part(change.delta, number).detach().clone()
        left = [number for number in batch.open if found[number] is None]
        if not left:
            break
        change.delta.grad = None
        loss.backward()
        with torch.no_grad():
            for number in left:
                assert change.delta.grad is not None
                delta, slope = (batch.part(values, number) for values in (change.delta, change.delta.grad))
                way = slope if factor is None else _natural(slope, factor)
                tiny = torch.finfo(slope.dtype).tiny
                fall, size = (slope * way).sum().clamp(min=tiny), way.norm().clamp(min=tiny)
                delta -= torch.minimum(entropy[number] / fall, LONGEST * scales[number] / size) * way
                delta.mul_((LARGEST * scales[number] / delta.norm(dim=-1, keepdim=True)).clamp(max=1))
        if len(left) <= (1 - DONE) * len(batch.open):
            kept = torch.isin(batch.owner[~batch.own], torch.tensor(left, device=batch.owner.device))
            batch, before = _Batch(model, sites, left, tails), before[kept]
    return [delta for delta in found if delta is not None]  # the last step leaves none


def _natural(slope: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(F + ε I)⁻¹ g of a site's gradient (s, d), as long as the gradient is."""
    way = torch.cholesky_solve(slope.to(factor).T, factor).T
    return (way * (slope.norm() / way.norm().clamp(min=torch.finfo(way.dtype).tiny))).to(slope)
