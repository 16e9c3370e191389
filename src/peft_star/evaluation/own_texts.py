"""Harm as people see it: how many of the texts that a model says by itself come out unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.passes import completion_logits

# words after each token whose probabilities are kept of the unpatched model
KEPT = 64


@dataclass(frozen=True)
class TextsHarm:
    """What a patch does to texts that the unpatched model says by itself.

    Where every argmax within a text stays, greedy generation says the same text; so one forward over texts that were
    generated once tells how many change.

    Attributes:
        texts: Texts that the unpatched model says, argmax by argmax.
        unchanged: Those of them that the patched model says, too.
        first_words: Those of them whose first token stays.
        tokens, changed: Tokens of the texts, and those whose argmax is another now.
        kl: Mean KL divergence of the patched model from the unpatched at these tokens, KL(before || after), in nats.
    """

    texts: int
    unchanged: int
    first_words: int
    tokens: int
    changed: int
    kl: float

    @property
    def unchanged_share(self) -> float:
        """Share of the texts that come out unchanged; 1 when there are none."""
        return self.unchanged / self.texts if self.texts else 1.0

    @property
    def changed_share(self) -> float:
        """Share of the texts that come out changed; 0 when there are none."""
        return 1 - self.unchanged_share

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return {**asdict(self), "changed_share": self.changed_share}


@dataclass(frozen=True)
class Heard:
    """What the unpatched model says at the N tokens of a batch of its own texts: the `KEPT` most probable words (N, k)
    with their log-probabilities, and whether (N) the first of them is the text's."""

    words: torch.Tensor
    log_p: torch.Tensor
    own: torch.Tensor


@torch.no_grad()
def hear(engine: Engine, batches: Sequence[Batch]) -> dict[Batch, Heard]:
    """What the model, which is not patched, says in this process's part of its own texts.

    Args:
        engine: Runs the passes.
        batches: The texts as rows, their slots numbered from 0.
    """
    heard = {}
    for batch in engine.team.share(batches):
        with engine.replay(batch):
            log_p = completion_logits(engine.model, batch).float().log_softmax(-1)
        top = log_p.topk(min(KEPT, log_p.shape[-1]), dim=-1)
        own = top.indices[:, 0] == batch.expected.to(log_p.device)
        heard[batch] = Heard(top.indices, top.values, own)
    return heard


@torch.no_grad()
def texts_harm(engine: Engine, heard: Mapping[Batch, Heard]) -> TextsHarm:
    """Compare the patched model with the unpatched on the latter's own texts.

    Args:
        engine: Its model is patched; its processes share the texts.
        heard: What the unpatched model says in this process's part, see [`hear`].
    """
    found = []
    for batch, was in heard.items():
        with engine.replay(batch):
            now = completion_logits(engine.model, batch).float().log_softmax(-1)
        stays = now.argmax(-1) == batch.expected.to(now.device)
        values = torch.stack([was.own, stays, _divergence(was, now)]).double().cpu()
        for index, places in _texts(batch).items():
            found.append((index, values[:, places]))
    # a text that rounding makes another one is none of the model's own
    texts = [values for part in engine.team.gather(found) for _, values in sorted(part, key=_index) if values[0].all()]
    tokens = sum(values.shape[1] for values in texts)
    return TextsHarm(
        texts=len(texts),
        unchanged=sum(bool(values[1].all()) for values in texts),
        first_words=sum(bool(values[1, 0]) for values in texts),
        tokens=tokens,
        changed=int(sum(values.shape[1] - values[1].sum() for values in texts)),
        kl=float(sum(values[2].sum() for values in texts)) / tokens if tokens else 0.0,
    )


def _index(item: tuple[int, torch.Tensor]) -> int:
    return item[0]


def _texts(batch: Batch) -> dict[int, torch.Tensor]:
    """Of each row of a batch the places of its completion tokens, in order, among the batch's."""
    places, start = {}, 0
    for row in batch.items:
        places[row.index] = torch.arange(start, start := start + len(row.completion_ids))
    return places


def _divergence(was: Heard, now: torch.Tensor) -> torch.Tensor:
    """KL(was || now) at each token (N), of the words that were heard and all others as one."""
    p, log_q = was.log_p.exp(), now.gather(-1, was.words)
    rest, now_rest = ((1 - part.sum(-1)).clamp(min=1e-6) for part in (p, log_q.exp()))
    return ((p * (was.log_p - log_q)).sum(-1) + rest * (rest / now_rest).log()).clamp_min(0)
