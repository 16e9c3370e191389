"""The report of a repair: what failed, what the patch did, what broke, and where it sits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .files import read_json, write_json

CONTEXT_CHARACTERS = 40
# of `harm`, what is read by name
HARM = ("texts", "unchanged", "kl")
SHOWN_TOKENS = 5  # of where a patch acts
PROBLEM_COLUMNS = ("solved", "rows right", "related fixed", "related broken", "retained kept", "acts at")


class Labels(dict[tuple[str, int], str]):
    """What readers are shown of rows, by source and index."""

    def __missing__(self, key: tuple[str, int]) -> str:
        return str(key[1] + 1)


def label_of(record: Any) -> str:
    """What readers are shown of a record's row: its line or number, counted from 1, with its id."""
    number = str(record.row + 1 if record.line is None else record.line)
    return f"{number} ({record.id})" if record.id else number


@dataclass
class FailureRecord:
    """One failing token.

    Attributes:
        row: Index of its row in the failures, from 0.
        position: The medium token's position in the row's tokens; the expected token is at `position + 1`.
        context: The text right before the expected token.
        expected, before, after: The expected token and the model's argmax before and after, as text (`*_id`: ids).
        gap_before, gap_after: p(expected) − the largest other probability.
        solved: Whether the argmax is the expected token after the patch.
    """

    row: int
    position: int
    context: str
    expected: str
    expected_id: int
    before: str
    before_id: int
    after: str
    after_id: int
    gap_before: float
    gap_after: float
    solved: bool


@dataclass
class RowRecord:
    """One row, before and after.

    `source` is "failures", "retain", "related" or "earlier" (of an earlier repair of the patch); `problem` is the
    problem that the row names.
    `exact_*`: every
    completion token right teacher-forced. `served_*`: the same by arithmetic, in each that the repair is to be served
    in. `generated_*`: the text of greedy generation, and `generation_exact_*` whether it equals the completion. Unless
    the repair generated (`verify_generation`), both are told from the tokens: what is right teacher-forced is
    generated, and the text of a wrong row ends with its first wrong token (None: an earlier version's report).
    `goes_on`: what the model says next, to the end of the line, after a completion of the failures that it says right
    now and that says nothing of where it ends (None: not looked at). `row` is the row's
    index, from 0; `line` is how people count it, from 1; `id` is what it is called elsewhere.
    """

    source: str
    row: int
    prompt: str
    completion: str
    tokens: int
    right_before: int
    right_after: int
    exact_before: bool
    exact_after: bool
    generated_before: str | None = None
    generated_after: str | None = None
    generation_exact_before: bool | None = None
    generation_exact_after: bool | None = None
    problem: str | None = None
    goes_on: str | None = None
    served_before: dict[str, bool] = field(default_factory=dict)
    served_after: dict[str, bool] = field(default_factory=dict)
    id: str | None = None
    line: int | None = None

    @property
    def label(self) -> str:
        """The row for readers: its line or number, with its id."""
        return label_of(self)

    @property
    def was_right(self) -> bool:
        """Right before, by every check that was made."""
        generated = self.generation_exact_before is not False
        return self.exact_before and generated and all(self.served_before.values())

    @property
    def is_right(self) -> bool:
        """Right after, by every check that was made."""
        generated = self.generation_exact_after is not False
        return self.exact_after and generated and all(self.served_after.values())

    @property
    def broken(self) -> bool:
        """Right before, by a check that was made, and wrong after."""
        teacher_forced = self.exact_before and not self.exact_after
        generated = bool(self.generation_exact_before) and self.generation_exact_after is False
        return teacher_forced or generated or any(self.broken_in(name) for name in self.served_before)

    def broken_in(self, name: str) -> bool:
        """Right before in the arithmetic of this name, and wrong after."""
        return self.served_before[name] and not self.served_after.get(name, True)


@dataclass
class BrokenToken:
    """A token that was right before the patch and is wrong after it."""

    source: str
    row: int
    position: int
    context: str
    expected: str
    expected_id: int
    after: str
    after_id: int


@dataclass
class PatchedLayer:
    """One patched FFN: its module, its neurons (ascending) and the Frobenius norm of its delta."""

    name: str
    neurons: list[int]
    delta_norm: float


@dataclass
class ProblemRecord:
    """One problem: the rows that name it, and how far its repair reaches.

    Attributes:
        name: Its name; the rows that name none share "".
        rows, rows_exact_after: Its failures' rows, and those with every token right teacher-forced after the patch.
        failures, solved: Its failing tokens, and those that are right now.
        related, related_fixed: Its related rows that were wrong before, and those of them that are right now.
        related_right, related_broken: Its related rows that were right before, and those of them that are wrong now.
        retained, retained_kept: Its retained rows, and those that did not break.
        acts: Where the patch acts: `how` ("focus", "found focus" or "failing position") with the texts of its
            `tokens`, and the `layers`.
        warnings: A sentence each.
    """

    name: str
    rows: int = 0
    failures: int = 0
    solved: int = 0
    rows_exact_after: int = 0
    related: int = 0
    related_fixed: int = 0
    related_right: int = 0
    related_broken: int = 0
    retained: int = 0
    retained_kept: int = 0
    acts: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return self.name or "(no name)"

    def count(self, row: RowRecord) -> None:
        """Count a row that belongs to the problem."""
        if row.source == "failures":
            self.rows += 1
            self.rows_exact_after += row.exact_after
        elif row.source == "retain":
            self.retained += 1
            self.retained_kept += not row.broken
        elif row.was_right:
            self.related_right += 1
            self.related_broken += not row.is_right
        else:
            self.related += 1
            self.related_fixed += row.is_right

    def add_act(self, how: str, tokens: Sequence[str], layers: Sequence[str]) -> None:
        """Say that the patch acts at these tokens; those of one kind are told together."""
        act = next((act for act in self.acts if act["how"] == how), None)
        if act is None:
            self.acts.append(act := {"how": how, "tokens": [], "layers": []})
        for known, more in (("tokens", tokens), ("layers", layers)):
            act[known] += [item for item in dict.fromkeys(more) if item not in act[known]]

    def cells(self) -> list[str]:
        """The figures as a table shows them, in the order of `PROBLEM_COLUMNS`."""
        return [
            f"{self.solved} of {self.failures}",
            f"{self.rows_exact_after} of {self.rows}",
            f"{self.related_fixed} of {self.related}",
            f"{self.related_broken} of {self.related_right}",
            f"{self.retained_kept} of {self.retained}",
        ]

    def places(self, show: Callable[[str], str]) -> str:
        """Where the patch acts, in words; `show` makes a token's or a layer's text fit for its surroundings."""
        parts = []
        for act in self.acts:
            tokens = [show(text) for text in act["tokens"][:SHOWN_TOKENS]]
            tokens += ["…"] if len(act["tokens"]) > SHOWN_TOKENS else []
            layers = act["layers"]
            within = show(layers[0]) if len(layers) == 1 else f"{len(layers)} layers"
            how = "".join(char for char in act["how"] if char.isalnum() or char == " ")
            parts.append(f"{how}: {', '.join(tokens)} in {within}")
        return "; ".join(parts)


def _mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values) if values else 1.0


@dataclass
class RepairReport:
    """What [`repair`] returns.

    Attributes:
        failures: One [`FailureRecord`] per failing token found.
        rows: One [`RowRecord`] per row, the failures' rows first, then the retained and the related ones.
        broken: Tokens that were right before and are wrong now, those of related rows included.
        layers: The patched layers with their neurons.
        steps: Steps of Algorithm 1 taken in all.
        seconds: Seconds by phase.
        occlusion: Change in loss per decoder layer: `"first-order"` and, when it was measured, `"exact"` and
            `"agreement"` of the two.
        arguments, config: The settings of the run.
        interrupted: The run was stopped before it was done.
        problems: One [`ProblemRecord`] per problem that a row names, and one for the rows that name none.
        earlier: Of the rows of earlier repairs that had to stay right: `rows`, `right` before, and `broken`. Only
            those that broke are among `rows`.
        warnings: A sentence each about the patch as a whole.
        entry: The id of the repair's entry in the patch's ledger; "": it made none.
        harm: What the patch does to texts that the model says by itself, as `evaluation.TextsHarm`; empty: not
            measured.
    """

    failures: list[FailureRecord]
    rows: list[RowRecord]
    broken: list[BrokenToken]
    layers: list[PatchedLayer]
    steps: int
    seconds: dict[str, float]
    occlusion: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    problems: list[ProblemRecord] = field(default_factory=list)
    earlier: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    entry: str = ""
    harm: dict[str, float] = field(default_factory=dict)

    @property
    def num_solved(self) -> int:
        return sum(failure.solved for failure in self.failures)

    @property
    def solved_share(self) -> float:
        """Share of the failing tokens that are right now; 1 when there were none."""
        return _mean([failure.solved for failure in self.failures])

    @property
    def broken_rows(self) -> list[RowRecord]:
        return [row for row in self.rows if row.broken]

    @property
    def success(self) -> bool:
        """Every failure solved, every failing row right by every check made, and nothing broken that was retained or
        that an earlier repair holds. Related rows are only looked at."""
        repaired = all(row.is_right for row in self.rows if row.source == "failures")
        held = ("retain", "earlier")
        retained = not any(item.source in held for item in self.broken)
        retained = retained and not any(row.broken for row in self.rows if row.source in held)
        return repaired and retained and not self.interrupted and not self.too_harmful

    @property
    def too_harmful(self) -> bool:
        """Whether more of the model's own texts change than the run allowed."""
        return self.harm.get("changed_share", 0.0) > self.arguments.get("max_harm", 1.0)

    def labels(self) -> Labels:
        """What readers are shown of each row, by source and index."""
        return Labels({(row.source, row.row): row.label for row in self.rows})

    @property
    def tells_problems(self) -> bool:
        """Whether the figures by problem say more than the `summary`."""
        related = any(row.source == "related" for row in self.rows)
        return bool(self.problems) and (related or any(problem.name for problem in self.problems))

    def summary(self) -> dict[str, Any]:
        """The figures that a reader looks for first."""
        rows = [row for row in self.rows if row.source == "failures"]
        retained = [row for row in self.rows if row.source == "retain"]
        related = [row for row in self.rows if row.source == "related"]
        generated = [row for row in rows if row.generation_exact_after is not None]
        tokens = sum(row.tokens for row in rows)
        result: dict[str, Any] = {
            "success": self.success,
            "failures": len(self.failures),
            "solved": self.num_solved,
            "rows": len(rows),
            "rows_exact_before": sum(row.exact_before for row in rows),
            "rows_exact_after": sum(row.exact_after for row in rows),
            "exact_match_before": sum(row.right_before for row in rows) / tokens if tokens else 1.0,
            "exact_match_after": sum(row.right_after for row in rows) / tokens if tokens else 1.0,
            "tokens_broken": len(self.broken),
            "rows_broken": len(self.broken_rows),
            "retained_rows": len(retained),
            "retained_rows_broken": sum(row.broken for row in retained),
            "layers": len(self.layers),
            "neurons": sum(len(layer.neurons) for layer in self.layers),
            "steps": self.steps,
            "seconds": sum(self.seconds.values()),
        }
        if generated:
            result["rows_generated_exact_before"] = sum(bool(row.generation_exact_before) for row in generated)
            result["rows_generated_exact_after"] = sum(bool(row.generation_exact_after) for row in generated)
        if self.earlier:
            result["earlier_rows"], result["earlier_rows_broken"] = self.earlier["rows"], self.earlier["broken"]
        if "texts" in self.harm:
            result["own_texts"] = self.harm["texts"]
            result["own_texts_unchanged"] = self.harm["unchanged"]
        if served := list(rows[0].served_after if rows else {}):
            result["served"] = {
                name: {
                    "rows_exact_before": sum(row.served_before[name] for row in rows),
                    "rows_exact_after": sum(row.served_after[name] for row in rows),
                    "retained_rows_broken": sum(row.broken_in(name) for row in retained),
                }
                for name in served
            }
        if related:
            result["related_rows"] = len(related)
            result["related_fixed"] = sum(row.is_right and not row.was_right for row in related)
            result["related_broken"] = sum(row.was_right and not row.is_right for row in related)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types, with the `summary`."""
        return {"summary": self.summary(), **asdict(self)}

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON; the file at `path` is replaced only when the new one is complete.

        Equal repairs write equal files: the seconds go beside it, into `x.times.json` of `x.json`.
        """
        content = self.to_dict()
        content["summary"].pop("seconds")
        write_json(_times_of(path), {"seconds": content.pop("seconds")})
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RepairReport:
        """Read a report that [`~RepairReport.save`] wrote.

        Raises:
            ValueError: The file is not a repair report.
        """
        try:
            data = read_json(Path(path))
            known = {item.name for item in fields(cls)}
            # reports of earlier versions know no problems, and hold their seconds themselves
            data = {"problems": [], **{key: value for key, value in data.items() if key in known}}
            if "seconds" not in data:
                times = _times_of(path)
                data["seconds"] = read_json(times)["seconds"] if times.is_file() else {}
            for key, kind in (
                ("failures", FailureRecord),
                ("rows", RowRecord),
                ("broken", BrokenToken),
                ("layers", PatchedLayer),
                ("problems", ProblemRecord),
            ):
                data[key] = [_checked(kind(**item)) for item in data[key]]
            return _checked(cls(**data))
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a repair report ({error}).") from None

    def to_markdown(self, max_rows: int = 50) -> str:
        """The report as Markdown: summary, failing tokens, what broke, the patched layers."""
        figures, labels = self.summary(), self.labels()
        lines = [
            f"**{figures['solved']} of {figures['failures']} failing tokens solved**, "
            f"{figures['rows_exact_before']} → {figures['rows_exact_after']} of {figures['rows']} rows right, "
            f"{figures['tokens_broken']} tokens broken; {figures['layers']} layers, {figures['neurons']} neurons, "
            f"{figures['steps']} steps.",
            "",
        ]
        if self.earlier:
            count, broken = self.earlier["rows"], self.earlier["broken"]
            lines += [f"The patch has earlier repairs: of {count} rows of theirs, {broken} broke.", ""]
        if "texts" in self.harm:
            lines += [
                f"{self.harm['unchanged']} of {self.harm['texts']} texts that the model says by itself come out "
                f"unchanged; KL there {self.harm['kl']:.2g} nats a token.",
                "",
            ]
        if self.interrupted:
            lines += ["The run was interrupted; this is what was finished.", ""]
        if self.failures:
            lines += ["| row | context | expected | before | after | gap |", "| --- | --- | --- | --- | --- | --- |"]
            for item in self.failures[:max_rows]:
                mark = "" if item.solved else " ✗"
                label = escaped(labels["failures", item.row])
                lines.append(
                    f"| {label} | {code(item.context)} | {code(item.expected)} | {code(item.before)} | "
                    f"{code(item.after)}{mark} | {item.gap_before:+.3f} → {item.gap_after:+.3f} |"
                )
            if len(self.failures) > max_rows:
                lines.append(f"| … | {len(self.failures) - max_rows} more | | | | |")
            lines.append("")
        if "served" in figures:
            lines += ["| served as | rows right before | after | retained rows broken |", "| --- | --- | --- | --- |"]
            lines += [
                f"| {name} | {seen['rows_exact_before']} of {figures['rows']} | {seen['rows_exact_after']} | "
                f"{seen['retained_rows_broken']} of {figures['retained_rows']} |"
                for name, seen in figures["served"].items()
            ]
            lines.append("")
            names = list(figures["served"])
            lines += [f"| row | completion | right | {' | '.join(names)} |", f"|{' --- |' * (3 + len(names))}"]
            for row in [row for row in self.rows if row.source == "failures"][:max_rows]:
                marks = ("✓" if right else "✗" for right in (row.exact_after, *row.served_after.values()))
                lines.append(f"| {row.row} | {code(row.completion)} | {' | '.join(marks)} |")
            lines.append("")
        going_on = [row for row in self.rows if row.goes_on is not None]
        if going_on:
            lines += ["| row | completion | the model goes on with |", "| --- | --- | --- |"]
            for row in going_on[:max_rows]:
                lines.append(f"| {escaped(row.label)} | {code(row.completion)} | {code(row.goes_on or '')} |")
            lines.append("")
        if self.tells_problems:
            heads = ("problem", *PROBLEM_COLUMNS)
            lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
            for problem in self.problems[:max_rows]:
                name = code(problem.name) if problem.name else problem.title
                lines.append(f"| {' | '.join((name, *problem.cells(), problem.places(code)))} |")
            lines.append("")
        told = [
            (code(problem.name) + ": " if problem.name else "") + escaped(text)
            for problem in self.problems
            for text in problem.warnings
        ]
        told += map(escaped, self.warnings)
        lines += [*(f"- Warning: {text}" for text in told), ""] if told else []
        if self.broken:
            lines += ["| broken in | row | context | expected | now |", "| --- | --- | --- | --- | --- |"]
            lines += [
                f"| {token.source} | {escaped(labels[token.source, token.row])} | {code(token.context)} "
                f"| {code(token.expected)} | {code(token.after)} |"
                for token in self.broken[:max_rows]
            ]
            lines.append("")
        if self.layers:
            lines += ["| layer | neurons | norm of the delta |", "| --- | --- | --- |"]
            lines += [f"| `{item.name}` | {len(item.neurons)} | {item.delta_norm:.4g} |" for item in self.layers]
            lines.append("")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw each failing token's probability gap before and after, and the size of the patch in each layer.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            import matplotlib
        except ImportError:
            raise ImportError("Plots need matplotlib; pip install 'peft-star[plot]'.") from None
        matplotlib.use("Agg", force=False)
        from matplotlib import pyplot as plt

        shown, labels = self.failures[:40], self.labels()
        height = max(3.0, 1.2 + 0.22 * max(len(shown), len(self.layers)))
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), width_ratios=(3, 2), layout="constrained")
        for number, item in enumerate(shown):
            color = "tab:green" if item.solved else "tab:red"
            left.plot([item.gap_before, item.gap_after], [number, number], color=color, alpha=0.5, zorder=1)
            left.scatter([item.gap_before], [number], color="tab:gray", s=18, zorder=2)
            left.scatter([item.gap_after], [number], color=color, s=18, zorder=2)
        left.axvline(0, color="black", linewidth=0.8)
        texts = [_label(f"{labels['failures', item.row]}: {item.before} → {item.expected}") for item in shown]
        left.set_yticks(range(len(shown)), texts)
        left.tick_params(axis="y", labelsize=7)
        left.invert_yaxis()
        left.set_xlabel("p(expected) − largest other probability: before (gray), after")
        more = len(self.failures) - len(shown)
        left.set_title(
            f"{self.num_solved} of {len(self.failures)} failing tokens solved"
            + (f" ({more} not shown)" if more else "")
        )
        right.barh(range(len(self.layers)), [item.delta_norm for item in self.layers], color="tab:blue")
        right.set_yticks(
            range(len(self.layers)), [_label(f"{item.name} ({len(item.neurons)})", 44) for item in self.layers]
        )
        right.tick_params(axis="y", labelsize=7)
        right.invert_yaxis()
        right.set_xlabel("norm of the delta")
        right.set_title(f"{sum(len(item.neurons) for item in self.layers)} neurons in {len(self.layers)} layers")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _times_of(path: str | os.PathLike) -> Path:
    """Where the seconds of the report at `path` are kept."""
    return Path(path).with_suffix(".times.json")


def _checked(record: Any) -> Any:
    """A record whose simple values are of the types that its class names.

    Raises:
        TypeError: One is not.
    """
    for item in fields(record):
        value, kinds = getattr(record, item.name), _KINDS.get(str(item.type))
        if kinds and not isinstance(value, kinds):
            raise TypeError(f"{item.name} is {type(value).__name__}")
    for name, seconds in getattr(record, "seconds", {}).items():
        if not isinstance(seconds, (int, float)):
            raise TypeError(f"the seconds of {name} are {type(seconds).__name__}")
    harm = getattr(record, "harm", {})
    named = [harm[name] for name in ("changed_share", *HARM) if name in harm]
    if not all(isinstance(value, (int, float)) for value in named) or "texts" in harm and not harm.keys() >= set(HARM):
        raise TypeError("what is said of the model's own texts is no numbers")
    earlier = getattr(record, "earlier", {})
    if earlier and not all(isinstance(earlier.get(name), int) for name in ("rows", "right", "broken")):
        raise TypeError("what is said of earlier repairs is no counts")
    if not all(isinstance(text, str) for text in getattr(record, "warnings", [])):
        raise TypeError("a warning is no text")
    for act in getattr(record, "acts", []):
        if not all(isinstance(text, str) for text in (act["how"], *act["tokens"], *act["layers"])):
            raise TypeError("where it acts is no text")
    return record


_NONE = type(None)
_KINDS: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "int | None": (int, _NONE),
    "bool": bool,
    "str | None": (str, _NONE),
    "bool | None": (bool, _NONE),
    "list[int]": list,
    "dict[str, float]": dict,
    "dict[str, int]": dict,
    "dict[str, bool]": dict,
    "list[dict[str, Any]]": list,
    "list[str]": list,
}


def code(text: str) -> str:
    """Text as code in a cell of a Markdown table."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("|", "\\|").replace("`", "ˋ")
    return f"`{text}`" if text else "(none)"


def escaped(text: str) -> str:
    """A sentence on one line, whose characters mean nothing to Markdown."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#~$" else char for char in " ".join(text.split()))


def _label(text: str, width: int = 34) -> str:
    # matplotlib reads a pair of dollar signs as mathematics
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$")
    return text if len(text) <= width else text[: width - 1] + "…"
