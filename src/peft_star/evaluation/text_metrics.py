"""How near texts are to what they should be, by the libraries that others use for it (the extra `eval`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class TextScores:
    """How near one text is to its row's completion; each score lies in 0..1.

    Attributes:
        text: What the model said, without the token that ends a turn.
        exact: Every token is right.
        edit_similarity: 1 − Levenshtein distance / length of the longer text, by characters.
        bleu: Sentence BLEU-4 (sacrebleu, effective order, its default tokenizer and smoothing).
        rouge_l: F-measure of ROUGE-L over words and single punctuation marks, case-sensitive.
    """

    text: str
    exact: bool
    edit_similarity: float
    bleu: float
    rouge_l: float


@dataclass
class MeanScores:
    """[`TextScores`] over rows: `exact`, `edit_similarity` and `rouge_l` are means, `bleu` is corpus-level BLEU-4."""

    exact: float
    edit_similarity: float
    bleu: float
    rouge_l: float


class TextMetrics:
    """Edit similarity, BLEU and ROUGE-L of texts.

    Raises:
        ImportError: The libraries of the extra `eval` are missing.
    """

    def __init__(self):
        try:
            from rapidfuzz.distance import Levenshtein
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            raise ImportError(f"The text metrics need {error.name}; pip install 'peft-star[eval]'.") from None
        self._edit = Levenshtein.normalized_similarity
        # texts of fewer than four tokens have no 4-grams: the effective order leaves those out
        self._bleu = BLEU(effective_order=True, force=True)
        self._rouge = RougeScorer(["rougeL"], tokenizer=_CodeTokenizer())

    def score(self, text: str, reference: str, exact: bool) -> TextScores:
        """Hold one text against its row's completion; `exact` says whether its tokens are the completion's."""
        return TextScores(
            text=text,
            exact=exact,
            edit_similarity=self._edit(text, reference),
            bleu=_share(self._bleu.sentence_score(text, [reference])),
            rouge_l=self._rouge.score(reference, text)["rougeL"].fmeasure,
        )

    def mean(self, scores: Sequence[TextScores], references: Sequence[str]) -> MeanScores:
        """The scores over all rows, whose completions are the `references`."""

        def mean(name: str) -> float:
            return sum(getattr(item, name) for item in scores) / len(scores)

        bleu = _share(self._bleu.corpus_score([item.text for item in scores], [list(references)]))
        return MeanScores(mean("exact"), mean("edit_similarity"), bleu, mean("rouge_l"))


def _share(bleu: Any) -> float:
    return min(bleu.score / 100, 1.0)  # sacrebleu's logarithms make a perfect score one rounding more than 100


class _CodeTokenizer:
    """Words and single punctuation marks, case kept; rouge-score's own drops punctuation, half of what code is."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)
