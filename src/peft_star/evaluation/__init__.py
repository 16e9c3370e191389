"""Evaluation: how good a model is on rows, and what a patch changes elsewhere (paper section 4, "Measures").

[`evaluate`] has the metrics of RQ1, on teacher-forced predictions and on greedy generation, and [`compare`] what
changed between two of them; [`side_by_side`] shows what is generated with a patch and without it. [`gaps`] and
[`side_effects`] have RQ3: generalization and specificity. [`TextProbe`] and [`OwnTextsProbe`] go beyond the
paper: they measure harm on text that has nothing to do with a repair, and on what the model says by itself.
"""

from ..files import write_json
from .harm import Harm, TextProbe, harm
from .own_texts import OwnTextsProbe, TextsHarm
from .scores import Comparison, Evaluation, RowEvaluation, compare, evaluate
from .side_by_side import Pair, SideBySide, read_prompts, side_by_side
from .side_effects import Gaps, SideEffects, gaps, side_effects
from .text_metrics import MeanScores, TextScores

__all__ = [
    "Comparison",
    "Evaluation",
    "Gaps",
    "Harm",
    "MeanScores",
    "OwnTextsProbe",
    "Pair",
    "RowEvaluation",
    "SideBySide",
    "SideEffects",
    "TextProbe",
    "TextScores",
    "TextsHarm",
    "compare",
    "evaluate",
    "gaps",
    "harm",
    "read_prompts",
    "side_by_side",
    "side_effects",
    "write_json",
]
