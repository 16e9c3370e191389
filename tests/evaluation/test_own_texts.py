"""How many of a model's own texts stay under a patch, against generating them and against what a repair reports."""

from __future__ import annotations

import json

import pytest
import torch

from peft_star import RepairArguments, StarLayer, repair
from peft_star.engine import own_texts as texts_module
from peft_star.evaluation import OwnTextsProbe, side_by_side
from support.byte_llama import build_model
from support.evaluated import ROWS
from support.words import QUIET, decided, star, word_tokenizer
from support.words import ROWS as WORDS

PROMPTS = [row["prompt"] for row in ROWS] + ["q", "a longer prompt that nobody repaired", "x = ", "w"]
SPOKEN = [f"w{a} w{a + 7} w{a + 11}" for a in range(3, 43, 2)]


def test_as_many_texts_stay_as_are_generated_again() -> None:
    tokenizer, model = word_tokenizer(), star()
    probe = OwnTextsProbe(decided(), tokenizer, SPOKEN, max_new_tokens=6)
    assert probe(model).unchanged == len(SPOKEN)
    repair(model, tokenizer, WORDS, RepairArguments(**QUIET, max_harm=1.0))
    with torch.no_grad():  # the whole patch changes every text
        for layer in (layer for layer in model.modules() if isinstance(layer, StarLayer)):
            layer.star_delta["default"] *= 0.1
    found, pairs = probe(model), side_by_side(model, tokenizer, SPOKEN, max_new_tokens=6)
    assert found.texts == len(SPOKEN)
    assert 0 < len(SPOKEN) - found.unchanged == len(pairs.changed) < len(SPOKEN)
    assert found.first_words == sum(pair.token != 0 for pair in pairs.pairs)
    assert found.changed > 0 and found.kl > 0 and found.tokens <= 6 * len(SPOKEN)


def test_with_the_adapter_off_the_base_is_heard(patched, tokenizer) -> None:
    training = [module.training for module in patched.modules()]
    with patched.disable_adapter():
        probe = OwnTextsProbe(patched, tokenizer, PROMPTS, max_new_tokens=9)
        assert probe(patched).unchanged == len(PROMPTS)
    found = OwnTextsProbe(build_model(), tokenizer, PROMPTS, max_new_tokens=9)(patched)
    assert probe(patched).unchanged == found.unchanged < len(PROMPTS)
    assert [module.training for module in patched.modules()] == training


@pytest.fixture
def voice(monkeypatch, tmp_path) -> None:
    """Twenty prompts, and a model's voice counts although it was never trained."""
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path))
    prompts = tuple({"prompt": text} for text in SPOKEN)
    for name, value in (("TOKENS", 4), ("CHANCE", 99.0), ("SURE", 0.0), ("own_prompts", lambda: prompts)):
        monkeypatch.setattr(texts_module, name, value)


def test_of_the_packages_prompts_it_is_what_a_repair_reports(voice) -> None:
    tokenizer = word_tokenizer()
    probe = OwnTextsProbe(decided(), tokenizer)
    model = star()
    report = repair(model, tokenizer, WORDS, RepairArguments(**QUIET, max_harm=1.0))
    found = probe(model)
    assert found.texts == 5 and found.unchanged < 5
    assert found.to_dict() == pytest.approx(report.harm, rel=1e-3)
    json.dumps(found.to_dict())
    assert f"| own texts unchanged | {found.unchanged} / 5 ({found.unchanged / 5:.2%}) |" in found.to_markdown()
    assert f"| tokens changed | {found.changed} / {found.tokens} |" in found.to_markdown().replace(
        f" ({found.changed / found.tokens:.2%})", ""
    )


def test_a_model_that_was_never_trained_has_none(patched, tokenizer) -> None:
    found = OwnTextsProbe(build_model(), tokenizer)(patched)
    assert (found.texts, found.tokens, found.changed_share) == (0, 0, 0.0)
    assert found.to_markdown() == "The model has no texts of its own that a patch could change.\n"


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "There is no prompt"),
        (["a", ""], ValueError, "prompt 2: the prompt is empty"),
        ([3], TypeError, "prompt 1: the prompt must be text"),
        (["a" * 500], ValueError, "exceed the model's context"),
    ],
)
def test_bad_prompts_are_told_in_a_sentence(prompts, error, message, tokenizer) -> None:
    with pytest.raises(error, match=message):
        OwnTextsProbe(build_model(), tokenizer, prompts)
