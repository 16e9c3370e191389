"""Harm as people see it: how many of the texts that a model says by itself come out unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.passes import completion_logits


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


@torch.no_grad()
def texts_harm(
    engine: Engine,
    batches: Sequence[Batch],
    unpatched: Callable[[], AbstractContextManager],
    progress: Callable[[int], None] | None = None,
) -> TextsHarm:
    """Compare the patched model with the unpatched on the latter's own texts.

    Args:
        engine: Its model is patched; its processes share the texts.
        batches: The texts as rows, their slots numbered from 0.
        unpatched: A context in which the model is not patched.
        progress: Called with the number of texts compared.
    """
    found = []
    for batch in engine.team.share(batches):
        with engine.replay(batch):
            now = completion_logits(engine.model, batch).float().log_softmax(-1)
        with unpatched():
            was = completion_logits(engine.model, batch).float().log_softmax(-1)
        expected = batch.expected.to(was.device)
        own, stays = was.argmax(-1) == expected, now.argmax(-1) == expected
        divergence = (was.exp() * (was - now)).sum(-1).clamp_min(0)
        values = torch.stack([own, stays, divergence]).double().cpu()
        for index, places in _texts(batch).items():
            found.append((index, values[:, places]))
        if progress is not None:
            progress(len(batch.items))
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
