"""What a model's own words depend on: the Fisher information of what its layers say, on texts that it says by itself.

To second order, adding δ to an FFN's output o at a token changes what the model says from there on by a divergence of
½ δᵀ F δ, with F = E[g gᵀ], g = ∂ log p(y)/∂o and y drawn from the model (Amari 1998; as one factor of a Kronecker
product, Martens and Grosse 2015). Nothing of it is the paper's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from ..cache import TENSORS, kept
from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.recording import Recording, head_reads, recording
from ..failures import Row
from ..models.fingerprint import UNKNOWN, fingerprint

# ε of the Fisher information, relative to its mean diagonal
FLOOR = 0.1
# tokens of a batch: logits of the whole vocabulary are differentiated at most of them
BATCH = 512


@dataclass
class OwnReading:
    """What was read on a model's own texts.

    Attributes:
        activations: Per second matrix those of its neurons at the tokens that the model says next, shape (N, m), in
            this process's batches; a process without a batch has no entries.
        fisher: Per second matrix the Fisher information of its output, shape (d, d), float64.
    """

    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    fisher: dict[str, torch.Tensor] = field(default_factory=dict)


_CACHE: WeakKeyDictionary[nn.Module, OwnReading] = WeakKeyDictionary()
_STATES: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()


def read_own_texts(
    engine: Engine, rows: Sequence[Row], ffns: dict[str, nn.Module], progress: Callable[[int], None] | None = None
) -> OwnReading:
    """One pass over texts that the model says by itself, made once for each model.

    Args:
        engine: Its model's parameters need no gradient; its processes share the texts.
        rows: The texts.
        ffns: The second matrices by name.
        progress: Called with the number of texts read.
    """
    known = _CACHE.setdefault(engine.model, OwnReading())
    if not ffns.keys() <= known.fisher.keys():
        found: OwnReading | None = None

        def differentiate() -> dict[str, torch.Tensor]:
            nonlocal found
            found = _read(engine, rows, ffns, True, progress)
            return found.fisher

        fisher = _kept(engine, rows, ffns, differentiate)
        if found is None:
            found = _read(engine, rows, ffns, False, progress)
        known.activations |= found.activations
        known.fisher |= {name: values.double() for name, values in fisher.items()}
    return known


def read_states(
    engine: Engine, rows: Sequence[Row], layer: str, ffn: str, progress: Callable[[int], None] | None = None
) -> torch.Tensor:
    """The Fisher information (d, d), float64, of the hidden states that leave a decoder layer; read once for each
    model.

    Args:
        engine: Its model's parameters need no gradient; its processes share the texts.
        rows: Texts that the model says by itself.
        layer: The decoder layer's name.
        ffn: The name of the second matrix of its FFN.
        progress: Called with the number of texts read.
    """
    known = _STATES.setdefault(engine.model, {})
    if layer not in known:
        ffns, layers = {ffn: engine.model.get_submodule(ffn)}, {layer: engine.model.get_submodule(layer)}

        def differentiate() -> dict[str, torch.Tensor]:
            sums: dict[str, torch.Tensor] = {}
            for number, batch, seen, logits in _passes(engine, rows, ffns, layers, True, progress):
                _add(sums, layers, batch, _sampled_gradients(logits, number, [seen.h_out[layer]]))
            return _fisher(engine, rows, layers, sums)

        known[layer] = _kept(engine, rows, layers, differentiate)[layer].double()
    return known[layer]


def damped(fisher: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Lower Cholesky factor (d, d), float64, of F + ε I."""
    values = fisher.to(device, torch.float64, copy=True)
    mean = values.diagonal().mean()
    values.diagonal().add_(mean.clamp(min=torch.finfo(torch.float32).tiny) * FLOOR)
    return torch.linalg.cholesky(values)


def effects(pushes: torch.Tensor, fisher: torch.Tensor) -> torch.Tensor:
    """tᵀ F t of each push (n, d), float64, shape (n): twice the divergence of what is said behind it."""
    pushes = pushes.double()
    return ((pushes @ fisher.to(pushes)) * pushes).sum(dim=1)


def natural_targets(gradients: torch.Tensor, fisher: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """What lowers each failure's cross entropy most for what it changes in what the model says elsewhere.

        t_i = −‖s_Δ,i‖ u_i / ‖u_i‖,   u_i = (F + ε I)⁻¹ ∂L/∂o_i

    Args:
        gradients: ∂L/∂o at the failures' medium tokens, shape (n, d).
        fisher: F, shape (d, d).
        sizes: The lengths (n) of the semantic deltas.

    Returns:
        `torch.Tensor`: The targets T, float64, shape (n, d).
    """
    steps = torch.cholesky_solve(gradients.double().T, damped(fisher, gradients.device)).T
    length = steps.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return -sizes.to(steps)[:, None] * steps / length


def _read(
    engine: Engine,
    rows: Sequence[Row],
    ffns: dict[str, nn.Module],
    differentiate: bool,
    progress: Callable[[int], None] | None,
) -> OwnReading:
    activations: dict[str, list[torch.Tensor]] = {name: [] for name in ffns}
    sums: dict[str, torch.Tensor] = {}
    for number, batch, seen, logits in _passes(engine, rows, ffns, {}, differentiate, progress):
        for name in ffns:
            v = seen.v[name].detach()
            place = batch.rows.to(v.device), batch.positions.to(v.device)
            activations[name].append(v.reshape(*batch.input_ids.shape, -1)[place])
        if differentiate:
            _add(sums, ffns, batch, _sampled_gradients(logits, number, [seen.o[name] for name in ffns]))
    found = OwnReading({name: torch.cat(parts) for name, parts in activations.items() if parts})
    if differentiate:
        found.fisher = _fisher(engine, rows, ffns, sums)
    return found


def _passes(
    engine: Engine,
    rows: Sequence[Row],
    ffns: dict[str, nn.Module],
    layers: dict[str, nn.Module],
    differentiate: bool,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[int, Batch, Recording, torch.Tensor]]:
    """This process's batches of the texts with their numbers, what a forward held, and the logits (N, V)."""
    small = Engine(engine.model, min(engine.max_batch_tokens, BATCH), engine.team)
    batches = small.batches(rows)
    own = set(map(id, engine.team.share(batches)))
    for number, batch in enumerate(batches):
        if id(batch) not in own:
            continue
        with recording(ffns, layers) as seen, head_reads(engine.model, batch), torch.set_grad_enabled(differentiate):
            logits = engine.model(**batch.model_inputs(), use_cache=False).logits[0]
        yield number, batch, seen, logits
        if progress is not None:
            progress(len(batch.items))


def _add(
    sums: dict[str, torch.Tensor], names: Collection[str], batch: Batch, gradients: Sequence[torch.Tensor]
) -> None:
    """Add the second moments (d, d) of the gradients (B, T, d) at a batch's tokens."""
    for name, gradient in zip(names, gradients):
        g = gradient.reshape(-1, gradient.shape[-1])[batch.tokens.flatten().to(gradient.device)].double()
        sums[name] = sums.get(name, 0) + g.T @ g


def _fisher(
    engine: Engine, rows: Sequence[Row], names: Collection[str], sums: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The means over the texts' tokens of what all processes have added up, as they will be read from disk."""
    count = max(1, sum(len(row.completion_ids) for row in rows))
    width = max(engine.team.gather(next(map(len, sums.values()), 0)))
    empty = torch.zeros(width, width, dtype=torch.float64)
    return {name: (engine.team.sum(sums.get(name, empty)) / count).float() for name in names}


def _sampled_gradients(logits: torch.Tensor, seed: int, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """∂ log p(y)/∂o, summed over the tokens y that are drawn after each position; the same in any process."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
    return torch.autograd.grad(-F.cross_entropy(logits.float(), drawn, reduction="sum"), outputs)


def _kept(
    engine: Engine, rows: Sequence[Row], names: Collection[str], differentiate: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """By name the Fisher information of these texts, from disk or computed."""
    team, asked, whole = engine.team, _asked(engine.model, rows, sorted(names)), partial(_whole, names=names)
    return kept("sensitivity", asked, differentiate, TENSORS, whole, gather=team.gather, writes=team.rank == 0)


def _asked(model: nn.Module, rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """All that the words depend on: these weights, in these texts; None where the weights cannot be told."""
    weights = fingerprint(model)
    return None if weights == UNKNOWN else json.dumps([weights, names, [row.input_ids for row in rows]])


def _whole(fisher: dict[str, torch.Tensor], names: Collection[str]) -> bool:
    return fisher.keys() == set(names) and all(values.isfinite().all() for values in fisher.values())
