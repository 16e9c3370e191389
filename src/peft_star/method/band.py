"""The band of early layers in which pushes at a focus act: what its neurons do, and how a push is spread over it.

Read by forwards that end behind the band. The spreading is MEMIT's (Meng et al. 2022), on few neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..engine.batch import Batch, make_batches
from ..engine.distributed import ALONE
from ..engine.recording import leaving, recording_inputs, run_until_left
from ..engine.replay import Replay, replays_exactly
from ..failures import Row
from ..models.inputs import input_device
from ..models.names import plain_name
from ..tuner.layer import count_of
from .background import background_activations, floor_of
from .history import earlier_keys
from .namesakes import namesakes, put_in_front
from .sensitivity import effects, read_states
from .subject import HeldLayer, Run
from .targets import Site

# texts that are put in front, so that a push answers to the focus and not to the place where it stands: for the keys,
# which cost little; the targets are searched for behind the first two
FRONT = (
    "",
    "However, as we know, ",
    "The weather is mild today. ",
    "According to the report, ",
    "In 1990, it was said. ",
    "def f(x):\n    return x\n",
)
SEARCHED = 2
# neurons of a layer: so many times as many as elsewhere, and for each site at least
NEURONS, NEURONS_PER_SITE = 4, 32
# weight of the mean over the background beside one site's neurons: MEMIT's
WEIGHT = 100.0

_OWN: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Named:
    """A row's focus: its site, and the row's slots."""

    row: Row
    site: Site
    slots: slice

    @classmethod
    def of(cls, run: Run, row: Row, slots: slice) -> Named:
        """A row's focus, with each of the texts in front of it."""
        tokenizer = run.subject.tokenizer
        rows: list[Row] = []
        positions = []
        for text in FRONT:
            ids = put_in_front(row.prompt_ids, text, tokenizer)
            rows.append(Row(len(rows), "", "", ids, row.completion_ids))
            positions.append(tuple(last + len(ids) - len(row.prompt_ids) for last in row.focus))
        return cls(row, Site(tuple(rows), tuple(positions)), slots)

    @property
    def searched(self) -> Site:
        """The site behind the first texts alone, as targets are searched for."""
        return Site(self.site.rows[:SEARCHED], self.site.positions[:SEARCHED])


class Band:
    """The FFNs of the band: what their neurons do is read by forwards that end behind it."""

    def __init__(self, run: Run, band: list[str]):
        self.run, self.model = run, run.engine.model
        self.top = run.subject.decoder_of[band[-1]]
        self.ffns = {name: run.subject.base.get_submodule(name) for name in band}
        # what lies below each layer of the band, where the sites are read again and again
        exact = replays_exactly(self.model, self.top)
        layers = [run.subject.decoder_of[name] for name in band if exact]
        self.below = [Replay(self.model, layer, check=False) for layer in layers]
        self._sites: list[Batch] | None = None
        self._alone = replace(run.engine, team=ALONE)
        self.fisher = self._fisher()

    def _batches(self, texts: Sequence[tuple[int, ...]]) -> list[Batch]:
        # the last token stands for the completion that a row must have; nothing is read behind it
        rows = [Row(index, "", "", ids, ids[-1:]) for index, ids in enumerate(texts)]
        return make_batches(rows, self.run.args.max_batch_tokens, input_device(self.model))

    @torch.no_grad()
    def read(
        self,
        texts: Sequence[tuple[int, ...]],
        batches: Sequence[Batch] | None = None,
        replays: Sequence[Replay] = (),
        names: Sequence[str] | None = None,
    ) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
        """Per FFN v (T, m), and the states (T, d) that leave the band, of each text.

        Args:
            texts: The texts' tokens.
            batches: They in batches, where they are at hand.
            replays: What is recorded or replayed of the layers below.
            names: The FFNs, if not all.
        """
        ffns = self.ffns if names is None else {name: self.ffns[name] for name in names}
        v: dict[str, list] = {name: [None] * len(texts) for name in ffns}
        states: list = [None] * len(texts)
        for batch in self._batches(texts) if batches is None else batches:
            with ExitStack() as stack:
                for replay in replays:
                    stack.enter_context(replay(batch))
                found = stack.enter_context(recording_inputs(ffns))
                left = stack.enter_context(leaving(self.model.get_submodule(self.top)))
                run_until_left(self.model, batch)
            for number, row in enumerate(batch.items):
                length = len(texts[row.index])
                for name, (values,) in found.items():
                    v[name][row.index] = values.reshape(*batch.input_ids.shape, -1)[number, :length]
                states[row.index] = left[0][number, :length].float()
        return v, states

    def at_sites(
        self, named: Sequence[Named], changed: int | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Per FFN V (n, m), and the states (n, d) that leave the band, at n tokens: means over the texts in front, of
        V with the row as it is counting as much as all others together.

        Args:
            named: The same each time.
            changed: Which layer of the band is the only one that has changed since the last call, of whose FFN's next
                one V is wanted; None: any may have, and V is wanted of all.
        """
        versions = [version for one in named for version in zip(one.site.rows, one.site.positions)]
        texts, places = [row.input_ids[: place[-1] + 1] for row, place in versions], [place for _, place in versions]
        if self._sites is None:
            self._sites = self._batches(texts)
        first = 0 if changed is None else changed
        for later in self.below[first + 1 :]:
            later.drop()
        replays = self.below[first : first + 2]
        names = None if changed is None else list(self.ffns)[changed + 1 : changed + 2]
        v, states = self.read(texts, self._sites, replays, names)
        count = len(FRONT)

        def mean(values: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
            picked = [value[list(place)] for value, place in zip(values, places)]
            groups = [torch.stack(picked[i : i + count]) for i in range(0, len(picked), count)]
            return torch.cat([torch.tensordot(weights.to(group), group, 1) for group in groups])

        half = torch.tensor([0.5, *[0.5 / (count - 1)] * (count - 1)])
        return {name: mean(values, half) for name, values in v.items()}, mean(states, torch.full((count,), 1 / count))

    def _fisher(self) -> torch.Tensor | None:
        """The Fisher information (d, d) of the states that leave the band, on what the model says by itself; None
        where it says nothing, or nothing is to be protected."""
        texts = self._own_texts()
        if not texts:
            return None
        with self.run.subject.unpatched():
            return read_states(self._alone, texts, self.top, list(self.ffns)[-1], self.run.journal.advance)

    def _own_texts(self) -> Sequence[Row]:
        return self.run.own_texts().protected if self.run.args.background else ()

    def _shown_by_own_texts(self) -> dict[str, torch.Tensor]:
        """Per FFN v (N, m) in the model's own texts, read once for each model."""
        known = _OWN.setdefault(self.model, {})
        if texts := [row.input_ids for row in self._own_texts()]:
            if not self.ffns.keys() <= known.keys():
                known.update({name: torch.cat(values) for name, values in self.read(texts)[0].items()})
            return {name: known[name] for name in self.ffns}
        return {}

    def protection(self, named: Sequence[Named], retained: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Per FFN a matrix A (N, m) with C = AᵀA: the second moments on background text, on the model's own texts, on
        the retained rows and, unless nothing is to be protected, on what stands beside the focus and on other names in
        its place."""
        args, tokenizer = self.run.args, self.run.subject.tokenizer
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self.ffns}

        def protect(texts: Sequence[tuple[int, ...]], places: Sequence[Sequence[int]]) -> None:
            if not texts:
                return
            for name, values in self.read(texts)[0].items():
                read = torch.cat([value[list(place)] for value, place in zip(values, places)])
                parts[name].append(read / max(1, len(read)) ** 0.5)

        if args.background:
            shown = background_activations(self._alone, tokenizer, self.ffns, args.background)
            for name, values in shown.items():
                parts[name].append(values / len(values) ** 0.5)
            for name, values in self._shown_by_own_texts().items():
                parts[name].append(values / len(values) ** 0.5)
            sites = [site for one in named for site in zip(one.searched.rows, one.searched.positions)]
            texts = [row.input_ids[:-1] for row, _ in sites]
            protect(texts, [sorted({*range(len(ids))} - {*focus}) for ids, (_, focus) in zip(texts, sites)])
            others = list(namesakes([one.row for one in named], tokenizer))
            protect(others, [(len(ids) - 1,) for ids in others])
        texts = [row.input_ids for row in retained]
        protect(texts, [range(len(ids)) for ids in texts])
        for name, keys in earlier_keys(self.run).items():
            for ours in (ours for ours in parts if plain_name(ours) == name):
                parts[ours].append(keys.to(input_device(self.model)) / max(1, len(keys)) ** 0.5)
        return {name: torch.cat(found) for name, found in parts.items() if found}

    def locate(self, v: dict[str, torch.Tensor], protection: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The neurons that tell the sites from what is protected: those whose square, beside the mean one there, is
        largest at any site."""
        located = {}
        for name, values in v.items():
            there = _moment_diagonal(protection.get(name), values)
            shares = values.double().square() / (there + floor_of(there.mean()))
            wanted = count_of(self.run.subject.num_neurons, values.shape[1], f"neurons of {name}")
            wanted = min(values.shape[1], max(NEURONS * wanted, NEURONS_PER_SITE * len(values)))
            located[name] = shares.amax(dim=0).topk(wanted).indices.sort().values
        return located

    @torch.no_grad()
    def spread(
        self,
        layers: Sequence[HeldLayer],
        named: Sequence[Named],
        targets: torch.Tensor,
        protection: dict[str, torch.Tensor],
        unpatched: tuple[dict[str, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Add to the deltas such that the states that leave the band change by the targets (n, d) in all; each layer
        takes its share of what is still missing (MEMIT, equation 20). `unpatched` is what [`at_sites`] reads without
        a push.

        Returns:
            How far each token's push (n) moves what is said in other text, as `protected.py` estimates it.
        """
        costs = torch.zeros(len(targets), dtype=torch.float64)
        for number, layer in enumerate(layers):
            v, states = self.at_sites(named, number - 1 if number else None)
            missing = (targets.to(states) - (states - unpatched[1])) / (len(layers) - number)
            neurons = layer.neurons.to(states.device)
            values = v[layer.name].index_select(1, neurons).double()
            part = protection.get(layer.name)
            part = None if part is None else part.index_select(1, neurons).double()
            answer = shielded(values, part, self.run.args.ridge)
            layer.delta.add_((answer @ missing.double()).to(layer.delta))
            if part is not None and self.fisher is not None:
                costs += ((part @ answer).square().sum(dim=0) * effects(missing, self.fisher)).cpu()
        return costs


def _moment_diagonal(part: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """The diagonal (m) of C = AᵀA of a `part` A (N, m), in float64; zeros where nothing is protected."""
    return values.new_zeros(values.shape[1]).double() if part is None else part.double().square().sum(dim=0)


def shielded(values: torch.Tensor, part: torch.Tensor | None, ridge: float) -> torch.Tensor:
    """P = C⁻¹ Vᵀ (V C⁻¹ Vᵀ + w I)⁻¹ (k, n), float64: how much of each of k neurons' deltas answers to each of n sites.

    The delta W = P T, for targets T, minimises ‖V W − T‖² + w tr(Wᵀ C W): MEMIT's least squares, on few neurons.

    Args:
        values: V, shape (n, k), float64.
        part: A (N, k) with C = AᵀA; None: nothing is protected.
        ridge: A ridge besides, relative to the system's diagonal, for sites that are alike.
    """
    moment = values.new_zeros(values.shape[1], values.shape[1]) if part is None else part.T @ part
    # where nothing was ever shown, the sites' own size is all that there is to go by
    shown = moment.diagonal().mean()
    moment.diagonal().add_(floor_of(shown if shown > 0 else values.square().mean()))
    factor = torch.linalg.cholesky(moment)
    white = torch.linalg.solve_triangular(factor, values.T, upper=False)
    gram = white.T @ white
    gram.diagonal().add_(WEIGHT + ridge * gram.diagonal().mean())
    answer = torch.linalg.solve(gram, white.T).T
    return torch.linalg.solve_triangular(factor.T, answer, upper=True)
