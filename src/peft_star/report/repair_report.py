"""The report of a repair: what failed, what the patch did, what broke, and where it sits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import read_json, what_is_wrong, write_json
from .checks import checked
from .markdown import (
    broken_table,
    changed_texts_table,
    failures_table,
    going_on_table,
    layers_table,
    problems_table,
    served_tables,
    warnings_list,
)
from .picture import draw
from .records import BrokenToken, ChangedText, FailureRecord, Labels, PatchedLayer, ProblemRecord, RowRecord


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
        changed_texts: One [`ChangedText`] for each of those texts that changes.
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
    changed_texts: list[ChangedText] = field(default_factory=list)

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
            # reports of earlier versions know no problems and no changed texts, and hold their seconds themselves
            data = {"problems": [], "changed_texts": [], **{key: value for key, value in data.items() if key in known}}
            if "seconds" not in data:
                times = _times_of(path)
                data["seconds"] = read_json(times)["seconds"] if times.is_file() else {}
            for key, kind in (
                ("failures", FailureRecord),
                ("rows", RowRecord),
                ("broken", BrokenToken),
                ("layers", PatchedLayer),
                ("problems", ProblemRecord),
                ("changed_texts", ChangedText),
            ):
                data[key] = [checked(kind(**item)) for item in data[key]]
            report = checked(cls(**data))
            report.summary()  # adds up what has to belong together
            return report
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a repair report ({what_is_wrong(error)}).") from None

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
        repaired = [row for row in self.rows if row.source == "failures"]
        lines += failures_table(self.failures, labels, max_rows)
        lines += served_tables(figures, repaired, max_rows)
        lines += going_on_table(self.rows, max_rows)
        lines += problems_table(self.problems, max_rows) if self.tells_problems else []
        lines += warnings_list(self.problems, self.warnings)
        lines += broken_table(self.broken, labels, max_rows)
        lines += changed_texts_table(self.changed_texts, max_rows)
        lines += layers_table(self.layers)
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw each failing token's probability gap before and after, and the size of the patch in each layer.

        Raises:
            ImportError: matplotlib is missing.
        """
        draw(path, self.failures, self.layers, self.labels())


def _times_of(path: str | os.PathLike) -> Path:
    """Where the seconds of the report at `path` are kept."""
    return Path(path).with_suffix(".times.json")
