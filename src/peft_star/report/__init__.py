"""The report of a repair: what failed, what the patch did, what broke, and where it sits."""

from .markdown import code, escaped
from .records import (
    PROBLEM_COLUMNS,
    BrokenToken,
    ChangedText,
    FailureRecord,
    Labels,
    PatchedLayer,
    ProblemRecord,
    RowRecord,
    label_of,
)
from .repair_report import RepairReport

# characters of what stands before a token
CONTEXT_CHARACTERS = 40

__all__ = [
    "CONTEXT_CHARACTERS",
    "PROBLEM_COLUMNS",
    "BrokenToken",
    "ChangedText",
    "FailureRecord",
    "Labels",
    "PatchedLayer",
    "ProblemRecord",
    "RepairReport",
    "RowRecord",
    "code",
    "escaped",
    "label_of",
]
