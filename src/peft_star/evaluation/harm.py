"""Beyond the paper: what a patch does to text that has nothing to do with the repair."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..models.inputs import context_length, evaluating, input_device

# rows of the vocabulary's width that are held in float32 beside the logits
_CHUNK = 64


@dataclass
class Harm:
    """What a patch does to text that has nothing to do with the repair.

    Attributes:
        tokens: Tokens of the text.
        kl: Mean KL divergence of the patched model from the unpatched, KL(before || after), in nats a token.
        perplexity_before, perplexity_after: Of the text's tokens after the first.
        right_before: Tokens that the unpatched model predicts right (argmax), given the right tokens before.
        broken: Those of them that the patched model predicts wrong.
    """

    tokens: int
    kl: float
    perplexity_before: float
    perplexity_after: float
    right_before: int
    broken: int

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity after / before."""
        return self.perplexity_after / self.perplexity_before

    @property
    def broken_share(self) -> float:
        """Share of the tokens that were right and are now wrong."""
        return self.broken / self.right_before if self.right_before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio, "broken_share": self.broken_share}


@torch.no_grad()
def harm(before: torch.Tensor, after: torch.Tensor, ids: torch.Tensor) -> Harm:
    """Compare what two models say about the same tokens.

    Args:
        before, after: Logits or log-probabilities (T, V) of the unpatched and the patched model at each token.
        ids: The tokens (T); entry p of the logits is about token p + 1.

    Raises:
        ValueError: The shapes differ, or there are fewer than two tokens.
    """
    if before.shape != after.shape or before.shape[0] != ids.numel():
        raise ValueError(
            f"Logits of shapes {tuple(before.shape)} and {tuple(after.shape)} on {ids.numel()} tokens: "
            "give (T, V) twice and T tokens."
        )
    if ids.numel() < 2:
        raise ValueError("Harm is measured on two tokens at least; give a longer text.")
    divergence = nll_before = nll_after = 0.0
    right = broken = 0
    for start in range(0, ids.numel(), _CHUNK):
        now = after[start : start + _CHUNK].float().log_softmax(-1)
        was = before[start : start + _CHUNK].to(now.device).float().log_softmax(-1)
        p = was.exp()
        # a token that a model rules out (log-probability −inf) on both sides adds nothing
        terms = torch.where(p > 0, p * (was - now), 0.0)
        divergence += terms.sum(-1, dtype=torch.float64).clamp_min(0).sum().item()
        following = ids[start + 1 : start + 1 + _CHUNK].to(now.device)[:, None]
        was, now = was[: len(following)], now[: len(following)]
        nll_before -= was.gather(-1, following).sum(dtype=torch.float64).item()
        nll_after -= now.gather(-1, following).sum(dtype=torch.float64).item()
        was_right = was.argmax(-1, keepdim=True) == following
        right += int(was_right.sum())
        broken += int((was_right & (now.argmax(-1, keepdim=True) != following)).sum())
    count = ids.numel() - 1
    return Harm(
        ids.numel(), divergence / ids.numel(), _exp(nll_before / count), _exp(nll_after / count), right, broken
    )


class TextProbe:
    """A text, prose or code, and what the unpatched model says about it; call it with a patched model for [`Harm`].

    It keeps the unpatched model's logits, on the CPU and in the model's precision: tokens x vocabulary entries (256
    tokens of a vocabulary of 49,152 in float32 are 50 MB). Nothing is assumed about what the patch touches, the LM
    head included.

    Args:
        model: The unpatched model, or a model with its adapters disabled.
        tokenizer: Its tokenizer.
        text: The text.
        max_tokens: The text is cut after this many tokens, or at the model's context if that is shorter.

    Raises:
        ValueError: The text has fewer than two tokens.
    """

    def __init__(self, model: nn.Module, tokenizer, text: str, max_tokens: int = 256):
        limit = min(max_tokens, context_length(model) or max_tokens)
        self.ids = torch.tensor(tokenizer(text)["input_ids"][:limit], dtype=torch.long)
        if len(self.ids) < 2:
            raise ValueError("Harm is measured on two tokens at least; give a longer text.")
        self.before = self._logits(model).cpu()

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> torch.Tensor:
        with evaluating(model):
            return model(input_ids=self.ids[None].to(input_device(model)), use_cache=False).logits[0]

    def __call__(self, model: nn.Module) -> Harm:
        """The harm that the patch of `model` does to the text."""
        return harm(self.before, self._logits(model), self.ids)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
