"""Harm as people see it: how many of the texts that a model says by itself come out unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..engine.batch import Batch
from ..engine.engine import Engine
from ..engine.own_texts import TOKENS, own_texts
from ..engine.passes import completion_logits, generate
from ..failures import Row
from ..models.inputs import context_length, evaluating
from .side_by_side import encode_prompts

# words after each token whose probabilities are kept of the unpatched model
KEPT = 64
# texts are short: in batches of more tokens than these, padding takes as much time as a seventh of them
BATCH_TOKENS = 512
# so many rows of logits are compared at a time, since these stay in a processor's cache
ROWS = 16
# tokens in front of a place that are kept to show it, and half as many behind
SHOWN = 32


class Parting(NamedTuple):
    """Where a patched model parts from a text: tokens in front of the place, the text's token and the patched model's,
    and the tokens with which the text went on."""

    front: tuple[int, ...]
    was: int
    now: int
    rest: tuple[int, ...]


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
        partings: Where each of the texts that change does so first.
    """

    texts: int
    unchanged: int
    first_words: int
    tokens: int
    changed: int
    kl: float
    partings: tuple[Parting, ...] = field(default=(), compare=False, repr=False)

    @property
    def unchanged_share(self) -> float:
        """Share of the texts that come out unchanged; 1 when there are none."""
        return self.unchanged / self.texts if self.texts else 1.0

    @property
    def changed_share(self) -> float:
        """Share of the texts that come out changed; 0 when there are none."""
        return 1 - self.unchanged_share

    def to_dict(self) -> dict[str, Any]:
        """The figures, as plain JSON types."""
        figures = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "partings"}
        return {**figures, "changed_share": self.changed_share}

    def to_markdown(self) -> str:
        """The harm as a Markdown table, or a sentence where there are no texts."""
        if not self.texts:
            return "The model has no texts of its own that a patch could change.\n"
        lines = [
            "| | |",
            "| --- | --- |",
            f"| own texts unchanged | {self.unchanged} / {self.texts} ({self.unchanged_share:.2%}) |",
            f"| first words unchanged | {self.first_words} / {self.texts} ({self.first_words / self.texts:.2%}) |",
            f"| tokens changed | {self.changed} / {self.tokens} ({self.changed / self.tokens:.2%}) |",
            f"| KL, nats a token | {self.kl:.4g} |",
        ]
        return "\n".join([*lines, ""])


class OwnTextsProbe:
    """What the unpatched model says by itself; call it with a patched model for [`TextsHarm`].

    A model that was never trained has no texts of its own: there are none then, and nothing is measured.

    Args:
        model: The unpatched model, or a model with its adapters disabled.
        tokenizer: Its tokenizer.
        prompts: Texts, or lists of chat messages, that the model is to go on from. None: those of the package's own
            that no repair is solved by, so that it is measured what others' texts would show.
        max_new_tokens: The most tokens that the model says to each of the given prompts.
        max_batch_tokens: Tokens of one batch, padding included.
        progress: Called with the number of texts generated.

    Raises:
        TypeError, ValueError: A prompt is neither text nor messages, is empty, or is too long for the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Iterable[str | Sequence[dict[str, str]]] | None = None,
        *,
        max_new_tokens: int = TOKENS,
        max_batch_tokens: int = 2048,
        progress: Callable[[int], None] | None = None,
    ):
        self.max_batch_tokens = max_batch_tokens
        engine = Engine(model, max_batch_tokens)
        with evaluating(model):
            if prompts is None:
                texts = own_texts(engine, tokenizer, progress).measured
            else:
                rows = encode_prompts(prompts, tokenizer, max_new_tokens, context_length(model))
                said = generate(engine, tokenizer, rows, progress)
                texts = [replace(row, completion_ids=ids) for row, ids in zip(rows, said) if ids]
            self.heard = hear(engine, engine.batches(texts)) if texts else {}

    def __call__(self, model: nn.Module) -> TextsHarm:
        """What the patch of `model` does to the texts."""
        with evaluating(model):
            return texts_harm(Engine(model, self.max_batch_tokens), self.heard)


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
            logits = completion_logits(engine.model, batch)
        said, divergence = _compare(was, logits)
        stays = said == batch.expected.to(said.device)
        values = torch.stack([was.own, stays, divergence]).double().cpu()
        for row, places in zip(batch.items, _texts(batch)):
            found.append((row.index, values[:, places], _parting(row, stays[places], said[places])))
    # a text that rounding makes another one is none of the model's own
    own = [item for part in engine.team.gather(found) for item in sorted(part, key=_index) if item[1][0].all()]
    texts = [values for _, values, _ in own]
    tokens = sum(values.shape[1] for values in texts)
    return TextsHarm(
        texts=len(texts),
        unchanged=sum(bool(values[1].all()) for values in texts),
        first_words=sum(bool(values[1, 0]) for values in texts),
        tokens=tokens,
        changed=int(sum(values.shape[1] - values[1].sum() for values in texts)),
        kl=float(sum(values[2].sum() for values in texts)) / tokens if tokens else 0.0,
        partings=tuple(parting for _, _, parting in own if parting is not None),
    )


def _index(item: tuple[int, torch.Tensor, Any]) -> int:
    return item[0]


def _texts(batch: Batch) -> list[torch.Tensor]:
    """Of each row of a batch the places of its completion tokens, in order, among the batch's."""
    places, start = [], 0
    for row in batch.items:
        places.append(torch.arange(start, start := start + len(row.completion_ids)))
    return places


def _parting(row: Row, stays: torch.Tensor, said: torch.Tensor) -> Parting | None:
    """Where the patched model, which says `said` (N) at a text's tokens, parts from it; None: nowhere."""
    changed = (~stays).nonzero()[:, 0].tolist()
    if not changed:
        return None
    at, ids = changed[0], row.completion_ids
    front = (*row.prompt_ids, *ids[:at])[-SHOWN:]
    return Parting(front, ids[at], int(said[at]), tuple(ids[at + 1 : at + 1 + SHOWN // 2]))


def _compare(was: Heard, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words that logits (N, V) say, and at each token (N) KL(was || now), of the words that were heard and all
    others as one."""
    said, log_q = [], []
    for part, words in zip(logits.split(ROWS), was.words.split(ROWS)):
        now = part.float().log_softmax(-1)
        said.append(now.max(-1).indices)
        log_q.append(now.gather(-1, words))
    return torch.cat(said), _divergence(was.log_p, torch.cat(log_q))


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    rest, now_rest = ((1 - part.sum(-1)).clamp(min=1e-6) for part in (p, log_q.exp()))
    return ((p * (log_p - log_q)).sum(-1) + rest * (rest / now_rest).log()).clamp_min(0)
