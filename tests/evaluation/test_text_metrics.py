"""The text metrics against the libraries' own and by hand."""

from __future__ import annotations

import sys

import pytest
import sacrebleu

from peft_star.evaluation import MeanScores, TextScores, evaluate
from support.byte_llama import build_model
from support.evaluated import ALTERED, ROWS


def test_text_scores(patched, tokenizer):
    result = evaluate(patched, tokenizer, ALTERED, progress=False)
    for kind in ("teacher_forced", "generated"):
        first, second = (getattr(row, kind) for row in result.rows)
        assert first == TextScores("cd", True, 1.0, 1.0, 1.0)
        assert (second.text, second.exact) == ("say(x, y)", False)
        assert second.edit_similarity == pytest.approx(8 / 9)
        # "say ( x , y )" and "say ( x , y ]": five of six in common, which rouge-score's own tokenizer would not see
        assert second.rouge_l == pytest.approx(5 / 6)
        assert second.bleu == pytest.approx(sacrebleu.sentence_bleu("say(x, y)", ["say(x, y]"]).score / 100)
        assert 0 < second.bleu < 1
        means = getattr(result, kind)
        assert (means.exact, means.edit_similarity, means.rouge_l) == pytest.approx((1 / 2, 17 / 18, 11 / 12))
        corpus = sacrebleu.corpus_bleu(["cd", "say(x, y)"], [["cd", "say(x, y]"]])
        assert means.bleu == pytest.approx(corpus.score / 100)


def test_bleu_of_texts_too_short_for_four_grams(patched, tokenizer):
    result = evaluate(patched, tokenizer, ROWS[:1], progress=False)
    assert result.teacher_forced == MeanScores(1.0, 1.0, 1.0, 1.0)


def test_rouge_keeps_case(patched, tokenizer):
    row = evaluate(patched, tokenizer, [{"prompt": "xyz", "completion": "Say(x, y)"}], progress=False).rows[0]
    assert row.generated.text == "say(x, y)" and row.generated.rouge_l == pytest.approx(5 / 6)


@pytest.mark.parametrize("module", ["sacrebleu.metrics", "rouge_score.rouge_scorer", "rapidfuzz.distance"])
def test_missing_library(monkeypatch, tokenizer, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}; pip install 'peft-star\[eval\]'"):
        evaluate(build_model(), tokenizer, ROWS)
