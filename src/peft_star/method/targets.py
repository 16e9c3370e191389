"""Targets where the semantics of the head do not reach: what a hidden state midway through the model should be.

Equation 1 names the representation that the head should read. Layers further down hand their outputs to layers that
transform them, so there a target is found through these layers, by a few gradient steps (not in the paper; as the
"v*" of ROME and MEMIT, Meng et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from ..engine.batch import Batch, make_batches
from ..engine.passes import completion_logits
from ..engine.replay import Replay
from ..failures import Row
from ..models.inputs import input_device

# MEMIT's settings: Adam's step, the pull towards no change, the largest change, and the weight of the divergence of
# what is said right behind the site
RATE, DECAY, LARGEST, DIVERGENCE = 0.5, 0.5, 0.75, 0.0625
STEPS = 20
# cross entropy (nats a row) that is low enough
ENOUGH = 0.05


@dataclass(frozen=True)
class Site:
    """Where a push acts: some tokens of a row, as it is and behind other texts.

    Attributes:
        rows: The row's versions, each with its completion.
        positions: Per version the positions of its s tokens.
    """

    rows: tuple[Row, ...]
    positions: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.positions[0])


def find_target(model: nn.Module, top: str, above: str, site: Site, max_tokens: int) -> torch.Tensor:
    """What has to be added to the hidden states that leave the layer `top`, at a site, for its completions.

    Per token of the site a vector δ, together minimising the mean cross entropy of its rows' completions, with a term
    that keeps what the model says right behind the tokens, one that keeps δ small, and a bound on its size.

    Args:
        model: A causal LM in evaluation mode whose parameters need no gradient.
        top, above: Names of a decoder layer and of the next one.
        site: The site.
        max_tokens: Tokens of one batch.

    Returns:
        `torch.Tensor`: δ, float32, shape (s, d).
    """
    layer, replay = model.get_submodule(top), Replay(model, above)
    rows = [Row(index, "", "", row.prompt_ids, row.completion_ids) for index, row in enumerate(site.rows)]
    batches = [_with_site(batch, site) for batch in make_batches(rows, max_tokens, input_device(model))]
    said, states = [], []
    with torch.no_grad():
        for batch in batches:
            with replay(batch), _adding(layer, batch, None) as seen:
                said.append(_said(model, batch)[1])
            states.append(seen[0])
    scale = torch.cat(states).norm(dim=-1).mean()
    delta = torch.zeros(site.size, states[0].shape[1], device=scale.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=RATE)
    for step in range(STEPS + 1):
        # a norm of zero has no gradient
        loss, entropy = (DECAY * delta.norm() / scale.square() if step else 0.0), 0.0
        for batch, before in zip(batches, said):
            with torch.enable_grad(), replay(batch), _adding(layer, batch, delta):
                logits, now = _said(model, batch)
                expected = batch.expected[batch.expected >= 0].to(logits.device)
                own = F.cross_entropy(logits, expected, reduction="sum") / len(rows)
                moved = F.kl_div(now, before, log_target=True, reduction="sum") / len(rows)
                loss = loss + own + DIVERGENCE * moved
            entropy += own.item()
        if entropy < ENOUGH or step == STEPS:
            return delta.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta.mul_((LARGEST * scale / delta.norm(dim=-1, keepdim=True)).clamp(max=1))


def _with_site(batch: Batch, site: Site) -> Batch:
    """The batch, whose logits are also read behind the site's tokens, where nothing is expected (−1)."""
    device = batch.rows.device
    places = torch.tensor([site.positions[row.index] for row in batch.items], device=device).flatten()
    rows = torch.arange(len(batch.items), device=device).repeat_interleave(site.size)
    return replace(
        batch,
        rows=torch.cat([batch.rows, rows]),
        positions=torch.cat([batch.positions, places]),
        expected=torch.cat([batch.expected, torch.full_like(rows, -1)]),
        slots=torch.cat([batch.slots, torch.full_like(rows, -1)]),
    )


def _said(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the completions' tokens, and log-probabilities behind the site's tokens in front of them."""
    logits = completion_logits(model, batch).float()
    at_site = batch.expected < 0
    # a token right in front of its completion is to say something else
    first = torch.tensor([row.medium_positions[0] for row in batch.items], device=batch.rows.device)
    in_front = at_site & (batch.positions < first[batch.rows])
    return logits[~at_site.to(logits.device)], logits[in_front.to(logits.device)].log_softmax(-1)


@contextmanager
def _adding(layer: nn.Module, batch: Batch, delta: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """Add `delta` (s, d) to what leaves the layer at a batch's sites; gives the states (B s, d) that were there."""
    seen: list[torch.Tensor] = []
    at_site = batch.expected < 0

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        place = batch.rows[at_site].to(hidden.device), batch.positions[at_site].to(hidden.device)
        seen.append(hidden[place].detach().float())
        if delta is not None:
            change = delta.repeat(len(batch.items), 1).to(hidden)
            hidden = hidden.index_put(place, hidden[place] + change)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
