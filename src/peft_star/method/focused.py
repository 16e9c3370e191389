"""Pushes at what a problem is about: the tokens that a row names as its `focus`, in early layers (not in the paper).

A failure shows at the token before the one that is wrong, but what it is about may have been read long before: the
subject of a fact, the name of a function. A push at the last token of that span, in the layers that gather what is
known of it, carries over to other ways of asking, and leaves alone what is asked of others. Editors of facts act there
(ROME and MEMIT, Meng et al. 2022); the frame is this package's: few neurons, least squares under protection, checked
by forward passes, and whatever it does not solve is left to the pushes at the failing tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ..engine.batch import completion_offsets, make_batches
from ..engine.distributed import ALONE
from ..engine.predictions import Predictions
from ..engine.recording import leaving, recording_inputs, run_until_left
from ..failures import Row
from ..models import structure
from ..models.inputs import input_device
from ..tuner.layer import count_of
from .background import background_activations, floor_of
from .best import keeping_best
from .objective import Goal
from .solve import protected_answer
from .subject import HeldLayer, Run
from .targets import Site, find_target

# the layers that a push is spread over, as shares of the depth: the third to the seventh of 30
BAND = (2 / 30, 6 / 30)
# texts that are put in front, so that a push answers to the focus and not to the place where it stands
FRONT = ("", "However, as we know, ")
# a site needs more neurons the more sites there are
NEURONS_PER_SITE = 16
# the layers above answer less than a target promises, or more: strengths that are looked at until all is as wanted
STRENGTHS = (1.0, 1.3, 1.7)
# weight of one token that must not fire, beside the mean over the background
CONTRAST = 0.01
# least ridge: what the least squares leave of a target, the next layer makes up for
RIDGE = 0.3


@dataclass(frozen=True)
class Named:
    """A row's focus: its site, behind other texts too, and texts that end like the focus and are not it."""

    row: Row
    site: Site
    contrast: tuple[tuple[int, ...], ...]


def patch(
    run: Run, goal: Goal, rows: Sequence[Row], retained: Sequence[Row], how: Mapping[int, str]
) -> Predictions | None:
    """Push the rows that have a focus, all of them at once, if that holds up: if more of the goal's tokens are as
    wanted with the pushes than without.

    Args:
        run: What every stage is given.
        goal: The failures, over the rows' slots.
        rows: The failures' rows.
        retained: Rows that must stay right; what the neurons do in them is protected.
        how: What the report calls each row's focus, by the row's index.

    Returns:
        [`Predictions`] (S) with the pushes, or None where there are none; the adapter is then as it was.
    """
    # the lower layers change, so none is replayed
    run = replace(run, engine=replace(run.engine, replay=nullcontext))
    failing = {int(slot) for slot in goal.task.medium.nonzero()[:, 0]}
    starts = completion_offsets(rows)
    named = [
        _named(run, row)
        for row, start in zip(rows, starts)
        if row.focus and failing.intersection(range(start, start + len(row.completion_ids)))
    ]
    if not named:
        return None
    layers_of_model = [name for name, _ in structure.find_decoder_layers(run.subject.base)]
    band = _band(run, layers_of_model)
    if not band:
        _warn(run, named, "The adapter does not reach the layers in which a push at the focus acts.")
        return None
    with run.journal.phase("solve", len(named)):
        reader = _Reader(run, band)
        above = layers_of_model[layers_of_model.index(reader.top) + 1]
        targets = []
        for one in named:
            targets.append(find_target(reader.model, reader.top, above, one.site, run.args.max_batch_tokens))
            run.journal.advance()
        protection = reader.protection(named, retained)
        unpatched = reader.at_sites(named)
        layers = run.subject.hold(reader.locate(unpatched[0], protection))
    deltas = [layer.delta for layer in layers]
    with run.journal.phase("patch", 1), keeping_best(deltas, goal.task, goal.before, run.journal) as best:
        start = [delta.detach().clone() for delta in deltas]
        reader.spread(layers, named, torch.cat(targets), protection, unpatched)
        whole = [delta.detach() - origin for delta, origin in zip(deltas, start)]
        least = goal.task.wanting(goal.before).sum()
        for strength in STRENGTHS:
            with torch.no_grad():
                for delta, origin, change in zip(deltas, start, whole):
                    delta.copy_(origin + strength * change)
            now, loss = goal.look(run.engine)
            if goal.task.wanting(now).sum() < least:
                least = goal.task.wanting(now).sum()
                best.offer(1, now, loss)
            if not least:
                break
    if best.score is None:
        _warn(run, named, "A push at the focus did not help, so the failing tokens were pushed instead.")
        return None
    for one in named:
        index = one.row.index
        run.journal.acts.append({"row": index, "how": how[index], "tokens": list(one.row.focus), "layers": band})
    return best.predictions


def _warn(run: Run, named: Sequence[Named], sentence: str) -> None:
    run.journal.warnings += [(one.row.index, sentence) for one in named]


def _band(run: Run, names: Sequence[str]) -> list[str]:
    """The second matrices in the band of these decoder layers, of those that the adapter may patch, by depth."""
    first, last = (min(round(share * len(names)), len(names) - 2) for share in BAND)
    inside = set(names[first : last + 1]) if len(names) > 1 else set()
    found = [name for name, layer in run.subject.decoder_of.items() if layer in inside]
    return [name for name in found if structure.routed_shape(run.subject.base.get_submodule(name)) is None]


def _named(run: Run, row: Row) -> Named:
    tokenizer = run.subject.tokenizer
    begin = 1 if row.prompt_ids[0] == tokenizer.bos_token_id else 0
    rows, positions, contrast = [], [], []
    fronts = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else () for text in FRONT]
    for front in fronts:
        ids = row.prompt_ids[:begin] + front + row.prompt_ids[begin:]
        rows.append(Row(len(rows), "", "", ids, row.completion_ids))
        positions.append(tuple(last + len(front) for last in row.focus))
    for first, last in zip(row.focus_starts, row.focus):
        # a text's first token is unlike any other, so the endings stand behind others, too
        begins = [row.prompt_ids[:begin] + front for front in fronts]
        contrast += [text + row.prompt_ids[i : last + 1] for i in range(first + 1, last + 1) for text in begins]
    return Named(row, Site(tuple(rows), tuple(positions)), tuple(contrast))


class _Reader:
    """Reads what the neurons of the band do, by forwards that end behind it."""

    def __init__(self, run: Run, band: list[str]):
        self.run, self.model = run, run.engine.model
        self.top = run.subject.decoder_of[band[-1]]
        self.ffns = {name: run.subject.base.get_submodule(name) for name in band}

    @torch.no_grad()
    def read(self, texts: Sequence[tuple[int, ...]]) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
        """Per FFN v (T, m), and the states (T, d) that leave the band, of each text."""
        v: dict[str, list] = {name: [None] * len(texts) for name in self.ffns}
        states: list = [None] * len(texts)
        # the last token stands for the completion that a row must have; nothing is read behind it
        rows = [Row(index, "", "", ids, ids[-1:]) for index, ids in enumerate(texts)]
        for batch in make_batches(rows, self.run.args.max_batch_tokens, input_device(self.model)):
            with recording_inputs(self.ffns) as found, leaving(self.model.get_submodule(self.top)) as left:
                run_until_left(self.model, batch)
            for number, row in enumerate(batch.items):
                length = len(texts[row.index])
                for name, (values,) in found.items():
                    v[name][row.index] = values.reshape(*batch.input_ids.shape, -1)[number, :length]
                states[row.index] = left[0][number, :length].float()
        return v, states

    def at_sites(self, named: Sequence[Named]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Per FFN V (n, m), and the states (n, d) that leave the band, at n tokens: means over the texts in front."""
        texts = [row.input_ids for one in named for row in one.site.rows]
        v, states = self.read(texts)
        places = [positions for one in named for positions in one.site.positions]
        count = len(FRONT)

        def mean(values: list[torch.Tensor]) -> torch.Tensor:
            picked = [value[list(place)] for value, place in zip(values, places)]
            groups = [torch.stack(picked[i : i + count]).mean(dim=0) for i in range(0, len(picked), count)]
            return torch.cat(groups)

        return {name: mean(values) for name, values in v.items()}, mean(states)

    def protection(self, named: Sequence[Named], retained: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Per FFN a matrix A (N, m) with C = AᵀA: the second moment on background text and on the other tokens of
        these rows and of the retained ones, and what must not fire."""
        args = self.run.args
        shown = {}
        if args.background:
            alone = replace(self.run.engine, team=ALONE)
            shown = background_activations(alone, self.run.subject.tokenizer, self.ffns, args.background)
        texts = [one.row.input_ids for one in named] + [row.input_ids for row in retained]
        contrast = [ids for one in named for ids in one.contrast]
        v, _ = self.read([*texts, *contrast])
        parts = {}
        for name in self.ffns:
            values, ends = v[name][: len(texts)], v[name][len(texts) :]
            for number, one in enumerate(named):
                keep = torch.ones(len(values[number]), dtype=torch.bool)
                # from the site on, a row is what the push is for
                keep[one.row.focus[0] :] = False
                values[number] = values[number][keep]
            others = torch.cat(values).double()
            rows = [others / max(1, len(others)) ** 0.5]
            if ends:
                rows.append(torch.stack([value[-1] for value in ends]).double() * CONTRAST**0.5)
            if name in shown:
                rows.append(shown[name].double() / len(shown[name]) ** 0.5)
            parts[name] = torch.cat(rows)
        return parts

    def locate(self, v: dict[str, torch.Tensor], protection: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The neurons that tell the sites from what is protected: those with the largest part in vᵀ C⁻¹ v."""
        located = {}
        for name, values in v.items():
            values = values.double()
            shares = values * whitened(values, protection[name])
            wanted = count_of(self.run.subject.num_neurons, values.shape[1], f"neurons of {name}")
            wanted = min(values.shape[1], max(wanted, NEURONS_PER_SITE * len(values)))
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
    ) -> None:
        """Write deltas such that the states that leave the band change by the targets (n, d); each layer takes its
        share of what is still missing (MEMIT, equation 20). `unpatched` is what [`at_sites`] reads before."""
        v, states = unpatched
        start = states
        for number, layer in enumerate(layers):
            if number:
                v, states = self.at_sites(named)
            missing = (targets.to(start) - (states - start)) / (len(layers) - number)
            part = protection[layer.name][:, layer.neurons].to(layer.delta.device)
            moment = part.T @ part
            moment.diagonal().add_(floor_of(moment.diagonal().mean()))
            values = v[layer.name].index_select(1, layer.neurons).to(layer.delta.device)
            ridge = max(self.run.args.ridge, RIDGE)
            answer = protected_answer(values, torch.linalg.cholesky(moment), ridge)
            layer.delta.add_((answer @ missing.double().to(answer.device)).to(layer.delta))


def whitened(values: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """(C + ε I)⁻¹ v for rows v (n, m), with C = AᵀA of a `part` A (N, m), by the smaller of the two systems."""
    floor = floor_of(part.square().sum() / part.shape[1])
    if len(part) >= part.shape[1]:
        moment = part.T @ part
        moment.diagonal().add_(floor)
        return torch.linalg.solve(moment, values.T).T
    gram = part @ part.T
    gram.diagonal().add_(floor)
    return (values - torch.linalg.solve(gram, part @ values.T).T @ part) / floor
