"""Harm against dense and hand-computed references."""

from __future__ import annotations

import math

import pytest
import torch

from peft_star.evaluation import TextProbe, harm
from support.byte_llama import build_model
from support.tiny_models import MODELS


def test_harm_by_hand():
    before = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()
    after = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]]).log()
    result = harm(before, after, torch.tensor([2, 0, 1]))
    first = 0.5 * math.log(2) + 0.25 * math.log(1 / 2)
    last = 0.2 * math.log(1 / 3) + 0.6 * math.log(3)
    assert result.tokens == 3 and result.kl == pytest.approx((first + last) / 3)
    assert result.perplexity_before == pytest.approx(1 / math.sqrt(0.5 * 0.8))
    assert result.perplexity_after == pytest.approx(1 / math.sqrt(0.25 * 0.8))
    assert result.perplexity_ratio == pytest.approx(math.sqrt(2))
    assert (result.right_before, result.broken, result.broken_share) == (2, 1, 1 / 2)
    assert result.to_dict()["perplexity_ratio"] == result.perplexity_ratio


def test_harm_of_long_texts_and_of_logits():
    """More positions than are compared at once."""
    torch.manual_seed(0)
    before, after, ids = torch.randn(150, 11) * 3, torch.randn(150, 11) * 3, torch.randint(11, (150,))
    result = harm(before, after, ids)
    was, now = before.log_softmax(-1), after.log_softmax(-1)
    assert result.kl == pytest.approx((was.exp() * (was - now)).sum(-1).mean().item(), rel=1e-5)
    for perplexity, values in ((result.perplexity_before, was), (result.perplexity_after, now)):
        nll = -values[:-1].gather(-1, ids[1:, None]).mean().item()
        assert perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    right = was[:-1].argmax(-1) == ids[1:]
    assert result.right_before == right.sum()
    assert result.broken == (right & (now[:-1].argmax(-1) != ids[1:])).sum()


def test_tokens_that_a_model_rules_out():
    logits = torch.tensor([[1.0, 2.0, -math.inf], [0.0, 1.0, -math.inf]])
    assert harm(logits, logits, torch.tensor([0, 1])).kl == 0


def test_harm_of_what_does_not_fit():
    with pytest.raises(ValueError, match="on 3 tokens"):
        harm(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="two tokens at least"):
        harm(torch.zeros(1, 5), torch.zeros(1, 5), torch.tensor([1]))


def test_text_probe(patched, tokenizer):
    text = "A text that has nothing to do with it. " * 5
    with patched.disable_adapter():
        probe = TextProbe(patched, tokenizer, text, max_tokens=100)
        same = probe(patched)
    assert (same.kl, same.perplexity_ratio, same.broken, same.tokens) == (0, 1, 0, 100)
    ids = torch.tensor(tokenizer(text)["input_ids"][:100])
    with torch.no_grad():
        now = patched(input_ids=ids[None]).logits[0]
        with patched.disable_adapter():
            was = patched(input_ids=ids[None]).logits[0]
    assert probe(patched) == harm(was, now, ids) and probe(patched).kl > 0


def test_text_probe_sees_a_changed_head(tokenizer):
    model = build_model(tie_word_embeddings=False)
    probe = TextProbe(model, tokenizer, "some text")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert probe(model).kl > 0.01


def test_text_probe_reads_no_more_than_the_context(tokenizer):
    assert TextProbe(build_model(), tokenizer, "x" * 999, max_tokens=999).ids.numel() == 256
    mpt = MODELS["mpt"].build(vocab_size=len(tokenizer))
    assert TextProbe(mpt, tokenizer, "x" * 99, max_tokens=99).ids.numel() == 64
    with pytest.raises(ValueError, match="two tokens at least"):
        TextProbe(build_model(), tokenizer, "x")
