"""A report as Markdown, table by table; each gives its lines and an empty one, or none where it has nothing to say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..text import harmless
from .records import (
    PROBLEM_COLUMNS,
    BrokenToken,
    ChangedText,
    FailureRecord,
    Labels,
    PatchedLayer,
    ProblemRecord,
    RowRecord,
)

# characters that mean something to Markdown; an underscore within a word does not
_MEANT = re.compile(r"[\\`*\[\]<>|#~$]|(?<![^\W_])_|_(?![^\W_])")


def code(text: str) -> str:
    """Text as code in a cell of a Markdown table."""
    text = harmless(text).replace("\\", "\\\\").replace("\n", "\\n").replace("|", "\\|").replace("`", "ˋ")
    return f"`{text}`" if text else "(none)"


def escaped(text: str) -> str:
    """A sentence on one line, whose characters mean nothing to Markdown."""
    return _MEANT.sub(r"\\\g<0>", harmless(" ".join(text.split())))


def failures_table(failures: Sequence[FailureRecord], labels: Labels, max_rows: int) -> list[str]:
    """The failing tokens, before and after."""
    if not failures:
        return []
    lines = ["| row | context | expected | before | after | gap |", "| --- | --- | --- | --- | --- | --- |"]
    for item in failures[:max_rows]:
        mark = "" if item.solved else " ✗"
        label = escaped(labels["failures", item.row])
        lines.append(
            f"| {label} | {code(item.context)} | {code(item.expected)} | {code(item.before)} | "
            f"{code(item.after)}{mark} | {item.gap_before:+.3f} → {item.gap_after:+.3f} |"
        )
    if len(failures) > max_rows:
        lines.append(f"| … | {len(failures) - max_rows} more | | | | |")
    return [*lines, ""]


def served_tables(figures: Mapping[str, Any], rows: Sequence[RowRecord], max_rows: int) -> list[str]:
    """The failures' rows in each arithmetic that serves them, by the figures of a `summary`."""
    if "served" not in figures:
        return []
    lines = ["| served as | rows right before | after | retained rows broken |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {escaped(name)} | {seen['rows_exact_before']} of {figures['rows']} | {seen['rows_exact_after']} | "
        f"{seen['retained_rows_broken']} of {figures['retained_rows']} |"
        for name, seen in figures["served"].items()
    ]
    names = list(map(escaped, figures["served"]))
    lines += ["", f"| row | completion | right | {' | '.join(names)} |", f"|{' --- |' * (3 + len(names))}"]
    for row in rows[:max_rows]:
        marks = ("✓" if right else "✗" for right in (row.exact_after, *row.served_after.values()))
        lines.append(f"| {escaped(row.label)} | {code(row.completion)} | {' | '.join(marks)} |")
    return [*lines, ""]


def going_on_table(rows: Sequence[RowRecord], max_rows: int) -> list[str]:
    """What the model says after completions that say nothing of where they end."""
    going_on = [row for row in rows if row.goes_on is not None]
    if not going_on:
        return []
    lines = ["| row | completion | the model goes on with |", "| --- | --- | --- |"]
    for row in going_on[:max_rows]:
        lines.append(f"| {escaped(row.label)} | {code(row.completion)} | {code(row.goes_on or '')} |")
    return [*lines, ""]


def problems_table(problems: Sequence[ProblemRecord], max_rows: int) -> list[str]:
    """The figures by problem."""
    heads = ("problem", *PROBLEM_COLUMNS)
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for problem in problems[:max_rows]:
        name = code(problem.name) if problem.name else problem.title
        lines.append(f"| {' | '.join((name, *problem.cells(), problem.places(code)))} |")
    return [*lines, ""]


def warnings_list(problems: Sequence[ProblemRecord], warnings: Sequence[str]) -> list[str]:
    """The problems' warnings, and those about the patch as a whole."""
    told = [
        (code(problem.name) + ": " if problem.name else "") + escaped(text)
        for problem in problems
        for text in problem.warnings
    ]
    told += map(escaped, warnings)
    return [*(f"- Warning: {text}" for text in told), ""] if told else []


def broken_table(broken: Sequence[BrokenToken], labels: Labels, max_rows: int) -> list[str]:
    """The tokens that were right."""
    if not broken:
        return []
    lines = ["| broken in | row | context | expected | now |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {escaped(token.source)} | {escaped(labels[token.source, token.row])} | {code(token.context)} "
        f"| {code(token.expected)} | {code(token.after)} |"
        for token in broken[:max_rows]
    ]
    return [*lines, ""]


def changed_texts_table(texts: Sequence[ChangedText], max_rows: int) -> list[str]:
    """Where texts that the model says by itself change."""
    if not texts:
        return []
    lines = ["| text of the model's own | said | says |", "| --- | --- | --- |"]
    lines += [
        f"| {code(item.context[-40:])} | {code(item.before)} | {code(item.after)} |" for item in texts[:max_rows]
    ]
    return [*lines, ""]


def layers_table(layers: Sequence[PatchedLayer]) -> list[str]:
    """Where the patch sits."""
    if not layers:
        return []
    lines = ["| layer | neurons | norm of the delta |", "| --- | --- | --- |"]
    lines += [f"| {code(item.name)} | {len(item.neurons)} | {item.delta_norm:.4g} |" for item in layers]
    return [*lines, ""]
