"""A patch's page: one HTML file that shows what failed and what it says now, what else was looked at, where it acts.

The file needs nothing else: no network, no script. All that a patch says of itself is taken for a stranger's text: it
is escaped, characters that move or turn a text are spelled out, and the page forbids whatever is not its own style.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..files import bytes_of
from ..report import PROBLEM_COLUMNS, FailureRecord, RepairReport, RowRecord
from ..text import harmless, one_line
from .download import short_name
from .page_map import neuron_map, scale
from .page_texts import LONGEST, Piece, changed, ending, failing
from .patch_files import REPORT_NAME, Patch

MAGIC = b"<!doctype html>\n<!-- peft-star report -->\n"  # what every page begins with
SHOWN_ROWS = 100  # of each kind
DEEPEST = 5  # of what is shown of a value within values
_SHOWN_PROMPT = 6  # lines of a prompt that are shown at once
_OTHERWISE_SHOWN = ("base_model_name_or_path", "base_fingerprint", "target_modules", "disable_tqdm")


@dataclass(frozen=True)
class Line:
    """One text of a case: what it is, its pieces, and whether marks are "good", "bad" or nothing of either ("")."""

    label: str
    pieces: Sequence[Piece]
    tone: str = ""


@dataclass(frozen=True)
class Case:
    """A row as the page shows it. `hidden` is the part of a long prompt that is shown when it is asked for, and
    `continued` what the model says behind the prompt, where it said and says what it should."""

    row: RowRecord
    status: str
    tone: str
    hidden: str
    prompt: str
    lines: list[Line]
    failures: Sequence[FailureRecord] = ()
    continued: str = ""


def patch_page(directory: Path, *, name: str | None = None, ledger: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of a patch.

    Args:
        directory: The patch; its report is shown if it has one.
        name: What the patch is called; by default what the directory is.
        ledger: What happened to the patch so far, oldest first: an entry each, with its `time` and whatever else it
            tells. Without entries the page has no time line.

    Returns:
        The text of an HTML file that begins with `MAGIC`.

    Raises:
        ValueError: There is no patch in `directory`, or it or its report is damaged.
    """
    patch = Patch.read(directory)
    path = directory / REPORT_NAME
    report = RepairReport.load(path) if path.is_file() else None
    shown = _of_report(report) if report else {}
    template = _environment().from_string((files("peft_star") / "data" / "report.html.jinja").read_text("utf-8"))
    return MAGIC.decode() + template.render(
        name=name or directory.resolve().name,
        facts=_facts(patch, report, bytes_of(directory)),
        report=report,
        summary=report.summary() if report else {},
        map=neuron_map(patch, report.problems if report else ()),
        labels=report.labels() if report else {},
        columns=PROBLEM_COLUMNS,
        harm=harm_told(report.harm) if report else {},
        changed_texts=report.changed_texts if report else [],
        ledger=list(ledger),
        most=SHOWN_ROWS,
        **{"cases": _no_cases(), "acts": [], "warnings": [], "settings": {}, **shown},
    )


def _environment() -> Environment:
    """Every text is made harmless on its way into the page, and then escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    environment.filters |= {"one_line": one_line, "scale": scale, "number": _number, "short": _short}
    environment.tests["plain"] = lambda value: not isinstance(value, (Mapping, list, tuple))
    environment.tests["table"] = _is_table
    environment.globals["deepest"] = DEEPEST
    return environment


def _finalize(value: Any) -> Any:
    return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: Any) -> str:
    """A figure, or whatever else stands in its place."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _short(value: Any) -> str:
    """A value within values within values, as short as it has to be."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:200] + "…"


def _is_table(value: Any) -> bool:
    """Whether a value is a list of dicts of plain values, which a table shows best."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Mapping) for item in value)
        and not any(isinstance(cell, (Mapping, list, tuple)) for item in value for cell in item.values())
    )


def _facts(patch: Patch, report: RepairReport | None, size: int) -> dict[str, str]:
    """What the patch is, by what a reader would call it."""
    counts = [len(neurons) for neurons in patch.neurons.values()]
    base = patch.config.get("base_model_name_or_path")
    parameters = sum(delta.numel() for delta in patch.deltas.values())
    facts = {
        "Base model": short_name(base) if isinstance(base, str) and base.strip("/\\") else "unknown",
        "Patched": f"{sum(counts):,} neurons in {len(counts)} layers: {parameters:,} parameters",
        "Size on disk": f"{size / 1e6:,.2f} MB",
    }
    if patch.others:
        facts["Also saved"] = ", ".join(patch.others)
    fingerprint = patch.config.get("base_fingerprint")
    if isinstance(fingerprint, str):
        facts["Fits weights with the fingerprint"] = fingerprint
    if report:
        facts["Steps"] = str(report.steps)
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
        facts["Seconds"] = f"{sum(report.seconds.values()):.1f} ({phases})"
        facts["Made with"] = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    return {label: text for label, text in facts.items() if text}


def harm_told(harm: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of the model's own texts, by what a reader would call it."""
    if not {"texts", "unchanged", "kl"} <= harm.keys():
        return dict(harm)
    return {
        "The model's own texts": f"{harm['unchanged']:g} of {harm['texts']:g} unchanged",
        "Divergence there (KL)": f"{harm['kl']:.2g} nats a token",
    }


def _no_cases() -> dict[str, list[Case]]:
    return {"failures": [], "related": [], "retain": []}


def _of_report(report: RepairReport) -> dict[str, Any]:
    """What the page shows of a report, by the template's names."""
    failures = defaultdict(list)
    for failure in report.failures:
        failures[failure.row].append(failure)
    cases = _no_cases()
    for row in report.rows:
        if row.source in cases:
            cases[row.source].append(_case(row, failures[row.row] if row.source == "failures" else ()))
    for found in cases.values():
        found.sort(key=lambda case: ("bad", "good", "").index(case.tone))  # what went wrong first
    settings = {"arguments": report.arguments, "config": report.config}
    return {
        "cases": cases,
        "acts": [(problem, act) for problem in report.problems for act in problem.acts],
        "warnings": [(problem.name, text) for problem in report.problems for text in problem.warnings],
        "settings": {
            title: {key: value for key, value in values.items() if value is not None and key not in _OTHERWISE_SHOWN}
            for title, values in settings.items()
            if isinstance(values, Mapping)
        },
    }


def _case(row: RowRecord, failures: Sequence[FailureRecord]) -> Case:
    status, tone = _status(row)
    prompt = row.prompt.split("\n")
    hidden, shown = ("\n".join(part) for part in (prompt[:-_SHOWN_PROMPT], prompt[-_SHOWN_PROMPT:]))
    same = not tone and row.is_right
    lines = [] if same else _lines(row, failures)
    continued = row.completion[:LONGEST] if same else ""
    return Case(row, status, tone, ending(hidden), ending(shown), lines, failures, continued)


def _status(row: RowRecord) -> tuple[str, str]:
    """What became of a row, and whether that is good or bad."""
    if row.source == "failures":
        return ("right now", "good") if row.is_right else ("not right", "bad")
    if row.was_right:
        return ("right before and after", "") if row.is_right and not row.broken else ("broken", "bad")
    if row.broken:
        return "broken", "bad"
    return ("right now", "good") if row.is_right else ("wrong before and after", "")


def _lines(row: RowRecord, failures: Sequence[FailureRecord]) -> list[Line]:
    """The texts of a row: as few as tell what changed."""
    before, after = row.generated_before, row.generated_after
    wanted = Line("wanted", failing(row, failures), "mark")
    if before is None or after is None:
        return [wanted]
    lines = [Line("said", changed(before, row.completion), "bad")]
    if row.generation_exact_after:
        lines.append(Line("says", changed(after, before), "good"))
    elif after == before:
        lines = [Line("said and says", changed(before, row.completion), "bad"), Line("wanted", wanted.pieces, "mark")]
    else:
        lines += [Line("says", changed(after, row.completion), "bad"), wanted]
    if row.goes_on is not None:
        lines.append(Line("goes on with", [Piece(row.goes_on.strip("\n") or "(the end of the line)")], "faint"))
    return lines
