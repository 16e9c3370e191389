"""What speed.py says of its measurements: tables in Markdown, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

import paper_figures
from effectiveness import estimate, markdown, ratio
from figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, YELLOW, bootstrap, drawing, label, looks, save
from peft_star.method.callbacks import PHASES
from speed_measure import CLOCKS, FLOOR, OTHER, Record, Seconds, phase_seconds

COLORS = dict(zip((*PHASES, OTHER), (YELLOW, BLUE, SKY, GREEN, ORANGE, PURPLE, GREY), strict=True))

# in these a repair finds its patch; the others, and what lies in none of them, look at what was said before and is now
PATCHING = ("trace", "locate", "solve", "patch")

State = dict[str, Any]


def merged(runs: Sequence[Any]) -> Any:
    """Repeats of one thing as one: the median of each number."""
    if isinstance(runs[0], dict):
        return {key: merged([run[key] for run in runs]) for key in runs[0]}
    return median(runs)


def by_row(state: State) -> dict[str, dict[str, Record]]:
    """By row (task and number) what was found of each method and of the floor, for rows with failures."""
    runs: dict[str, dict[str, list[Record]]] = {}
    for key, record in state["results"].items():
        row, name, _ = key.rsplit("/", 2)
        if record["failures"]:
            runs.setdefault(row, {}).setdefault(name, []).append(record)
    return {row: {name: merged(found) for name, found in methods.items()} for row, methods in runs.items()}


def seconds_of(record: Record, clock: str, phases: Sequence[str] = ()) -> float:
    """Of a repair, or of these of its `phases`; or of a floor."""
    if phases:
        spent = phase_seconds(record)
        return sum(spent[phase][clock] for phase in phases)
    parts = [record["seconds"]] if "seconds" in record else [record["forward_backward"], record["forward"]]
    return sum(part[clock] for part in parts)


@dataclass(frozen=True)
class Target:
    """A wanted ratio of seconds.

    Attributes:
        above, below: What is divided by what: methods, or the floor.
        limit: The ratio wanted,
        at_most: as the largest one, or as the least.
        paper: What the paper's figures give.
        phases: Of what stands above these phases alone; empty: all of it.
    """

    above: str
    below: str
    limit: float
    at_most: bool
    paper: str
    phases: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        above, below = (
            "full forward-backward + forward" if n == FLOOR else label(n) for n in (self.above, self.below)
        )
        return f"{above}{f', {PATCHING[0]} to {PATCHING[-1]} alone' if self.phases else ''} / {below}"

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def published(above: str, below: str) -> str:
    """A ratio of the sums of seconds in the paper's Table 4."""
    sums = [sum(sum(methods[name]) for methods in paper_figures.SECONDS.values()) for name in (above, below)]
    return f"{sums[0] / sums[1]:.2f}"


TARGETS = (
    Target("star", "sgd", 0.35, True, published("STAR, multiple", "SGD, multiple")),
    Target("star", "sgd", 0.19, True, "–", PATCHING),
    Target("mint", "star", 10.0, False, published("MINT, single", "STAR, single")),
    Target("lora", "star", 5.0, False, "–"),
    # section 4.4: ten steps at most, each a forward-backward
    Target("star", FLOOR, 1.0, True, "about 10"),
)


def median_ratio(cases: np.ndarray) -> float:
    return float(np.median(cases[:, 0] / cases[:, 1]))


def median_estimate(cases: np.ndarray) -> str:
    """The median of the rows' ratios with its interval."""
    value, (low, high) = median_ratio(cases), bootstrap(cases, median_ratio)
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def clocks(state: State) -> list[str]:
    """The clock that decides, then the other."""
    return sorted(CLOCKS, key=lambda clock: clock != state["clock"])


def pairs(rows: dict[str, dict[str, Record]], above: str, below: str) -> list[tuple[Record, Record]]:
    """What was found of two methods on the rows that both have."""
    return [(row[above], row[below]) for row in rows.values() if above in row and below in row]


def cases_of(found: Sequence[tuple[Record, Record]], clock: str, phases: Sequence[str] = ()) -> np.ndarray:
    """Seconds of pairs, of the first of each those of its `phases` where these are given; shape (n, 2)."""
    cases = [[seconds_of(one, clock, phases), seconds_of(other, clock)] for one, other in found]
    return np.array(cases).reshape(-1, 2)


def targets_table(state: State) -> str:
    """The ratios that are wanted beside those measured: of sums over rows, and medians of the rows' own."""
    rows, lines = by_row(state), []
    first, second = clocks(state)
    for target in TARGETS:
        found = pairs(rows, target.above, target.below)
        if target.phases:
            found = [pair for pair in found if "phases" in pair[0]]
        if not found:
            continue
        # a floor solves nothing, and everything is solved beside it
        alike = [pair for pair in found if all(record.get("success", True) for record in pair)]
        measured = cases_of(found, first, target.phases)
        line = [target.title, f"{'≤' if target.at_most else '≥'} {target.limit:g}", target.paper]
        line += ["yes" if target.met(ratio(measured)) else "no", str(len(found))]
        for cases in (measured, cases_of(found, second, target.phases)):
            line += [estimate(cases, ".2f"), median_estimate(cases)]
        lines.append([*line, estimate(cases_of(alike, first, target.phases), ".2f"), str(len(alike))])
    header = ["seconds", "wanted", "paper", "met", "rows"]
    header += [f"{CLOCKS[clock]}: {what}" for clock in (first, second) for what in ("sums", "median of rows")]
    return markdown([*header, f"{CLOCKS[first]}: sums, rows that both repair", "these rows"], lines)


def seconds_table(state: State) -> str:
    """Medians over rows, and sums by those of the floor on the same rows."""
    rows, lines = by_row(state), []

    def line(title: str, records: list[Seconds], times: str) -> list[str]:
        middle = [f"{median(record[clock] for record in records):.3f}" for clock in clocks(state)]
        return [title, str(len(records)), *middle, times]

    floors = [row[FLOOR] for row in rows.values() if FLOOR in row]
    if floors:
        for part, title in (("forward_backward", "full forward-backward"), ("forward", "full forward")):
            lines.append(line(title, [floor[part] for floor in floors], "–"))
    for name in state["methods"]:
        if found := [row[name] for row in rows.values() if name in row]:
            times = estimate(cases_of(pairs(rows, name, FLOOR), clocks(state)[0]), ".2f")
            lines.append(line(label(name), [record["seconds"] for record in found], times))
            for part, what in (("setup", "making room"), ("removal", "taking off")):
                lines.append(line(f"{label(name)}, {what}", [record[part] for record in found], "–"))
    return markdown(["", "rows", *(f"median {CLOCKS[clock]}" for clock in clocks(state)), "times the floor"], lines)


def outcomes_table(state: State) -> str:
    """What the methods solved, and with how many passes; means over rows."""
    rows, lines = by_row(state), []
    for name in state["methods"]:
        found = [row[name] for row in rows.values() if name in row]
        if not found:
            continue
        line = [label(name), str(len(found))]
        for part, whole, form in (("solved", "failures", ".1%"), ("broken", "right", ".2%")):
            some, all_ = (sum(record[key] for record in found) for key in (part, whole))
            line.append(f"{some:g} / {all_:g}" + (f" ({some / all_:{form}})" if all_ else ""))
        line.append(f"{sum(record['success'] for record in found):g} / {len(found)}")
        lines.append(
            line + [f"{mean(r[count] for r in found):.1f}" for count in ("steps", "forward_backwards", "forwards")]
        )
    header = ["", "rows", "failing tokens solved", "right tokens broken", "rows repaired", "steps"]
    return markdown([*header, "forward-backwards", "forwards"], lines)


def phases_table(state: State, name: str) -> str:
    """Where the time of one method's repairs goes: sums over rows, passes a row."""
    found = [row[name] for row in by_row(state).values() if name in row]
    spent = [phase_seconds(record) for record in found]
    lines = []
    for phase in (*PHASES, OTHER):
        if phase != OTHER and not any(phase in record["phases"] for record in found):
            continue
        line = [phase]
        for clock in clocks(state):
            share = sum(part[phase][clock] for part in spent) / sum(seconds_of(record, clock) for record in found)
            line.append(f"{mean(part[phase][clock] for part in spent):.3f} ({share:.0%})")
        for count in ("forward_backwards", "forwards"):
            passes = mean(record["phases"].get(phase, {}).get(count, 0) for record in found)
            line.append("–" if phase == OTHER else f"{passes:.1f}")
        lines.append(line)
    columns = [f"{CLOCKS[clock]} a row" for clock in clocks(state)]
    return markdown([f"phase of {label(name)}", *columns, "forward-backwards", "forwards"], lines)


def once_text(state: State) -> str:
    """What is done once for each model."""
    clock, once = clocks(state)[0], state["once"]
    text = f"Once for each model, in {CLOCKS[clock]}: semantic bases {once['semantic bases'][clock]:.2f}"
    for name, extra in once["first repair"].items():
        parts = ", ".join(f"{phase} {part[clock]:.2f}" for phase, part in extra.items() if abs(part[clock]) >= 0.005)
        total = sum(part[clock] for part in extra.values())
        text += f"; the first repair by {label(name)} beyond the second of the same row {total:.2f}"
        text += f" ({parts})" if parts else ""
    return f"{text}."


def left_out_text() -> str:
    """What the ratio of phases leaves out."""
    return (
        f"From {PATCHING[0]} to {PATCHING[-1]}, what a repair looks at besides is left out: what the rows say in the "
        "arithmetic that serves them, before and after; retained rows; what is said behind a completion; how many of "
        "the model's own texts change (the gate, in `other`); and what report and ledger keep of it. Patches that the "
        "gate asks for again are in. Of the other methods all seconds count."
    )


def metered(state: State) -> list[str]:
    """The methods whose phases are known."""
    return list(dict.fromkeys(name for row in by_row(state).values() for name in row if "phases" in row[name]))


def report(state: State) -> str:
    """All tables, in Markdown."""
    parts = [targets_table(state), seconds_table(state), outcomes_table(state)]
    parts += [phases_table(state, name) for name in metered(state)]
    if "star" in metered(state):
        parts.append(left_out_text())
    parts.append(once_text(state))
    parts.append(
        "\n".join(
            f"- {label(name)}: {', '.join(f'{key} {value}' for key, value in settings.items())}."
            for name, settings in state["methods"].items()
        )
    )
    return "\n\n".join(parts)


def _ordered(state: State, *needed: str) -> dict[str, dict[str, Record]]:
    """The rows that have these, by the seconds of their floor."""
    rows = {name: row for name, row in by_row(state).items() if all(key in row for key in (FLOOR, *needed))}
    return dict(sorted(rows.items(), key=lambda item: seconds_of(item[1][FLOOR], state["clock"])))


def _name_rows(axis: Any, rows: Sequence[str]) -> None:
    if len(rows) <= 40:
        axis.set_xticks(range(len(rows)), [name.replace("/", " ") for name in rows], rotation=90, fontsize=8)
    else:
        axis.set_xticks([])
    axis.set_xlabel("rows, by their floor")
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.grid(axis="x", visible=False)


def _draw_floor(axis: Any, rows: dict[str, dict[str, Record]], clock: str) -> None:
    values = [seconds_of(row[FLOOR], clock) for row in rows.values()]
    edges = np.arange(len(values) + 1) - 0.5
    axis.stairs(values, edges, baseline=None, color=BLACK, linewidth=1.8, label="floor: forward-backward + forward")


def plot_phases(state: State, path: Path) -> None:
    """Stacked bars: the phases of each row's repair, with the floor as a line; a panel for each STAR method."""
    clock, names = state["clock"], metered(state)
    with drawing() as plt:
        rows = {name: _ordered(state, name) for name in names}
        width = min(14, max(6, 2 + 0.22 * max(map(len, rows.values()))))
        figure, axes = plt.subplots(len(names), 1, figsize=(width, 4.2 * len(names)), squeeze=False)
        for axis, name in zip(axes[:, 0], names):
            spent = [phase_seconds(row[name]) for row in rows[name].values()]
            bottom = np.zeros(len(spent))
            for phase, color in COLORS.items():
                # a difference of two readings of a clock can fall below nothing
                values = np.array([max(0.0, part[phase][clock]) for part in spent])
                if values.any():
                    axis.bar(range(len(spent)), values, bottom=bottom, width=0.8, color=color, label=phase)
                    bottom += values
            _draw_floor(axis, rows[name], clock)
            axis.set_title(f"Phases of a repair by {label(name)}")
            axis.set_ylabel(CLOCKS[clock])
            _name_rows(axis, list(rows[name]))
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save(figure, path)


def plot_methods(state: State, path: Path) -> None:
    """Bars on a logarithmic axis: the seconds of every method on each row, with the floor as a line."""
    clock, rows = state["clock"], _ordered(state)
    names = [name for name in state["methods"] if any(name in row for row in rows.values())]
    with drawing() as plt:
        size = (min(14, max(6, 2 + 0.12 * len(rows) * (len(names) + 1))), 4.2)
        figure, axis = plt.subplots(figsize=size)
        width = 0.85 / len(names)
        for place, (name, look) in enumerate(looks(names).items()):
            points = [(n, seconds_of(row[name], clock)) for n, row in enumerate(rows.values()) if name in row]
            middle = (place - (len(names) - 1) / 2) * width
            axis.bar(
                [n + middle for n, _ in points], [s for _, s in points], width, color=look.color, label=look.label
            )
        _draw_floor(axis, rows, clock)
        shortest = min(seconds_of(record, clock) for row in rows.values() for record in row.values())
        axis.set_yscale("log")
        axis.set_ylim(bottom=shortest / 2)  # where a logarithmic axis ends, bars would otherwise
        axis.set_title("Seconds of a repair")
        axis.set_ylabel(CLOCKS[clock])
        _name_rows(axis, list(rows))
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save(figure, path)
