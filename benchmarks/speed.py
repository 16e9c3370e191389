"""How long a repair takes, beside SGD, MINT, LoRA and the least that a method with gradients can take.

    python benchmarks/speed.py --model MODEL --data DIR --rows 10 --repeats 3 --json speed.json --plot speed

Every row gets a patch of its own from every method. All stop by the same rule: every failing token of the row solved
by the margin and nothing broken, or the method's limit of steps; what they solved stands beside their times. The
methods and the floor take turns on each row, and who begins changes with every turn. MINT knows one mode, `single`;
the others run in the mode of `--arguments` (`multiple`, unless it says otherwise).

What is timed is `repair()` with `verify_generation=False`, and what the other methods do between making room for the
patch and taking it off. Making room (`get_peft_model`, or copying weights) and taking off are listed on their own, and
so is what belongs to a model and not to a repair (the head's semantic bases, activations on background text, the check
that layers can be replayed): the first repair of a model less a second repair of the same row. `PEFT_STAR_CACHE=0`
keeps the bases of a large head from being read from an earlier run's file.

The floor of a row is one full forward-backward and one full forward of the row alone, tokenised before. Full
forward-backward: a forward through all layers with logits at the completion's tokens, the cross entropy summed over
the failing ones, and its gradient with respect to the input of every FFN's second matrix; no gradient of a weight, and
nothing below the lowest FFN's second matrix. Full forward: the same forward without autograd.

Seconds are by the clock (`wall`) and of the processor, all threads together (`cpu`). With one thread on a processor
the latter leave out what other programs do on the machine, and decide; otherwise the clock does. Repeats of a (row,
method) count with their median. Finished ones are kept in the JSON file: an interrupted run goes on from there, and so
does one with more methods, repeats or rows of MINT.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import nn

import paper_figures
from effectiveness import estimate, markdown, ratio
from figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, YELLOW, bootstrap, drawing, label, looks, save
from harness import load, parser, resume, run_units, setting_of, task_rows
from interface import MAX_BATCH_TOKENS, Applied, Method, Passes, Problem, device_of, frozen, now
from methods import METHODS, Star, make_method
from peft_star import RepairArguments, RepairCallback, StarConfig, repair
from peft_star.engine.batch import Batch, make_batches
from peft_star.engine.passes import completion_logits, loss_at, teacher_forced
from peft_star.failures import encode_rows
from peft_star.method.callbacks import PHASES
from peft_star.method.semantics import semantic_bases
from peft_star.models.structure import find_second_matrices

FLOOR = "floor"
CLOCKS = {"cpu": "CPU s", "wall": "wall s"}
DEFAULT_METHODS = ["sgd", "mint", "lora", "star"]
OTHER = "other"
COLORS = dict(zip((*PHASES, OTHER), (YELLOW, BLUE, SKY, GREEN, ORANGE, PURPLE, GREY), strict=True))

Seconds = dict[str, float]
Record = dict[str, Any]
State = dict[str, Any]


class Stopwatch:
    """Seconds on both clocks since it was made or last read."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last = self._read()

    def _read(self) -> Seconds:
        return {"wall": now(self._device), "cpu": time.process_time()}

    def lap(self) -> Seconds:
        last, self._last = self._last, self._read()
        return {clock: self._last[clock] - last[clock] for clock in last}


class PhaseMeter(RepairCallback):
    """Seconds and passes of each of a repair's phases."""

    def __init__(self, device: torch.device):
        self.device, self.passes = device, Passes()
        self.phases: dict[str, dict[str, float]] = {}

    def _passes(self) -> tuple[int, int]:
        return self.passes.differentiated, self.passes.total - self.passes.differentiated

    def on_phase_begin(self, args: RepairArguments, state) -> None:
        self._before, self._watch = self._passes(), Stopwatch(self.device)

    def on_phase_end(self, args: RepairArguments, state) -> None:
        spent = self._watch.lap()
        counts = (after - before for before, after in zip(self._before, self._passes()))
        spent |= zip(("forward_backwards", "forwards"), counts)
        known = self.phases.setdefault(state.phase, dict.fromkeys(spent, 0))
        for name, value in spent.items():
            known[name] += value


class MeteredStar(Star):
    """`get_peft_model` (its `install`) and `repair`, with the repair's phases."""

    def of_all_layers(self) -> MeteredStar:
        """A repair of one step that patches every layer which this method may choose."""
        config = self._config | {"neuron_pattern": "layer-wise"}
        if config.get("layer_selection", StarConfig.layer_selection) == "occlusion":
            config["layer_selection"] = "all"
        return MeteredStar(self.name, **config, **self._arguments | {"max_steps": 1})

    @contextmanager
    def install(self, base: nn.Module) -> Iterator[nn.Module]:
        model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", **self._config))
        try:
            yield model
        finally:
            model.unload()

    @contextmanager
    def apply(self, problem: Problem) -> Iterator[Applied]:
        arguments = {"verify_generation": False, "disable_tqdm": True, **self._arguments}
        arguments |= {"mode": problem.mode, "margin": problem.margin}
        with self.install(problem.base) as model:
            meter = PhaseMeter(device_of(problem.base))
            with meter.passes.counting(problem.base):
                report = repair(
                    model, problem.tokenizer, problem.rows, RepairArguments(**arguments), callbacks=[meter]
                )
            yield Applied(model, report.steps, {"phases": meter.phases})


def method_of(name: str, config: dict[str, Any], arguments: dict[str, Any]) -> Method:
    """The method of this name; the settings are for STAR and its variants, which keep what makes them variants."""
    factory = METHODS[name]
    return (
        MeteredStar(name, **{**config, **arguments, **factory.keywords}) if factory.func is Star else make_method(name)
    )


@contextmanager
def lapped(install: Callable, laps: dict[str, Seconds], base: nn.Module) -> Iterator[Any]:
    """A method's `install` that says in `laps` how long it took to make room for the patch, and to take it off."""
    watch = Stopwatch(device_of(base))
    with ExitStack() as stack:
        patch = stack.enter_context(install(base))
        laps["setup"] = watch.lap()
        yield patch
        watch.lap()
    laps["removal"] = watch.lap()


def input_gradients(base: nn.Module, batch: Batch, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The full forward-backward: the gradient of the loss at the tokens `chosen` (mask of N) with respect to the input
    of every FFN's second matrix, in order of depth; each of its input's shape, (B, T, m) in most models."""
    inputs: list[torch.Tensor] = []

    def record(module: nn.Module, args: tuple) -> tuple:
        v = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
        inputs.append(v)
        return (v, *args[1:])

    handles = [module.register_forward_pre_hook(record) for module in find_second_matrices(base).values()]
    try:
        with torch.enable_grad():
            loss = loss_at(completion_logits(base, batch), batch, chosen)
    finally:
        for handle in handles:
            handle.remove()
    return torch.autograd.grad(loss, inputs)


class Study:
    """Times methods and floors on one model."""

    def __init__(self, base: nn.Module, tokenizer, margin: float, mode: str):
        self.base, self.tokenizer, self.margin, self.mode = base, tokenizer, margin, mode
        self.device = device_of(base)

    def failing(self, row: dict[str, str]) -> tuple[Batch, torch.Tensor]:
        """The row as a batch, and its failing tokens (mask of N)."""
        (batch,) = make_batches(encode_rows([row], self.tokenizer), MAX_BATCH_TOKENS, self.device)
        with frozen(self.base):
            return batch, ~teacher_forced(self.base, [batch]).right

    def floor(self, row: dict[str, str]) -> Record:
        batch, failing = self.failing(row)
        record: Record = {"failures": int(failing.sum()), "tokens": batch.input_ids.shape[1]}
        if record["failures"]:
            gc.collect()
            with frozen(self.base):
                watch = Stopwatch(self.device)
                input_gradients(self.base, batch, failing)
                record["forward_backward"] = watch.lap()
                with torch.no_grad():
                    completion_logits(self.base, batch)
                record["forward"] = watch.lap()
        return record

    def patched(self, row: dict[str, str], method: Method) -> Record:
        laps: dict[str, Seconds] = {}
        install = method.install
        method.install = partial(lapped, install, laps)
        gc.collect()
        try:
            with method.patched(self.base, self.tokenizer, [row], margin=self.margin, mode=self.mode) as outcome:
                found = outcome.to_dict()
        finally:
            method.install = install
        details = found.pop("details")
        whole = {"wall": found.pop("seconds"), "cpu": details["cpu_seconds"]}
        seconds = {clock: whole[clock] - laps["setup"][clock] for clock in whole}
        phases = {"phases": details["phases"]} if "phases" in details else {}
        return {"seconds": seconds, **laps, **found, **phases}

    def warm_up(self, rows: dict[str, list[dict[str, str]]], methods: dict[str, Method]) -> dict[str, Any]:
        """Do what is done once for each model (and process), and say how long it took.

        Raises:
            SystemExit: There is nothing to repair.
        """
        row = next((row for items in rows.values() for row in items if self.failing(row)[1].any()), None)
        if row is None:
            raise SystemExit("The model gets every token of these rows right; take other rows, or more of them.")
        self.floor(row)
        watch = Stopwatch(self.device)
        semantic_bases(self.base)
        once: dict[str, Any] = {"semantic bases": watch.lap(), "first repair": {}}
        for name, method in methods.items():
            if isinstance(method, MeteredStar):
                first, second = (phase_seconds(self.patched(row, method)) for _ in range(2))
                once["first repair"][name] = {
                    phase: {clock: first[phase][clock] - second[phase][clock] for clock in CLOCKS} for phase in second
                }
                # another row may choose layers whose background activations this row did not need
                self.patched(row, method.of_all_layers())
        return once

    def units(
        self, rows: dict[str, list[dict[str, str]]], methods: dict[str, Method], repeats: int, mint_rows: int | None
    ) -> Iterator[tuple[str, Callable[[], Record]]]:
        """What is to be done, by key: round-robin over the tasks, floor and methods in turn on each row."""
        turn = 0
        for number in range(max(map(len, rows.values()))):
            for task, items in rows.items():
                if number >= len(items):
                    continue
                todo = {FLOOR: self.floor} | {name: partial(self.patched, method=m) for name, m in methods.items()}
                if mint_rows is not None and number >= mint_rows:
                    todo.pop("mint", None)
                for repeat in range(repeats):
                    if repeat:
                        todo.pop("mint", None)
                    names = list(todo)
                    start = turn % len(names)
                    for name in names[start:] + names[:start]:
                        yield f"{task}/{number}/{name}/{repeat}", partial(todo[name], items[number])
                    turn += 1


def phase_seconds(record: Record) -> dict[str, Seconds]:
    """Seconds of a repair by phase, with those that lie in none of them."""
    phases = {name: record["phases"].get(name, dict.fromkeys(CLOCKS, 0.0)) for name in PHASES}
    spent = {name: {clock: phases[name][clock] for clock in CLOCKS} for name in PHASES}
    spent[OTHER] = {c: record["seconds"][c] - sum(phase[c] for phase in spent.values()) for c in CLOCKS}
    return spent


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


def seconds_of(record: Record, clock: str) -> float:
    """Of a repair, or of a floor."""
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
    """

    above: str
    below: str
    limit: float
    at_most: bool
    paper: str

    @property
    def title(self) -> str:
        return " / ".join(
            "full forward-backward + forward" if n == FLOOR else label(n) for n in (self.above, self.below)
        )

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def published(above: str, below: str) -> str:
    """A ratio of the sums of seconds in the paper's Table 4."""
    sums = [sum(sum(methods[name]) for methods in paper_figures.SECONDS.values()) for name in (above, below)]
    return f"{sums[0] / sums[1]:.2f}"


TARGETS = (
    Target("star", "sgd", 0.25, True, published("STAR, multiple", "SGD, multiple")),
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


def cases_of(found: Sequence[tuple[Record, Record]], clock: str) -> np.ndarray:
    """Seconds of pairs, shape (n, 2)."""
    return np.array([[seconds_of(record, clock) for record in pair] for pair in found]).reshape(-1, 2)


def targets_table(state: State) -> str:
    """The ratios that are wanted beside those measured: of sums over rows, and medians of the rows' own."""
    rows, lines = by_row(state), []
    first, second = clocks(state)
    for target in TARGETS:
        found = pairs(rows, target.above, target.below)
        if not found:
            continue
        # a floor solves nothing, and everything is solved beside it
        alike = [pair for pair in found if all(record.get("success", True) for record in pair)]
        measured = cases_of(found, first)
        line = [target.title, f"{'≤' if target.at_most else '≥'} {target.limit:g}", target.paper]
        line += ["yes" if target.met(ratio(measured)) else "no", str(len(found))]
        for cases in (measured, cases_of(found, second)):
            line += [estimate(cases, ".2f"), median_estimate(cases)]
        lines.append([*line, estimate(cases_of(alike, first), ".2f"), str(len(alike))])
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


def metered(state: State) -> list[str]:
    """The methods whose phases are known."""
    return list(dict.fromkeys(name for row in by_row(state).values() for name in row if "phases" in row[name]))


def report(state: State) -> str:
    """All tables, in Markdown."""
    parts = [targets_table(state), seconds_table(state), outcomes_table(state)]
    parts += [phases_table(state, name) for name in metered(state)]
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


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, choices=METHODS, metavar="METHOD")
    options.add_argument("--repeats", type=positive, default=1, help="runs of each method on each row; MINT has one")
    options.add_argument("--mint-rows", type=positive, help="MINT on the first so many rows of each task only")
    options.add_argument("--config", type=json.loads, default={}, help="StarConfig fields as JSON")
    options.add_argument("--arguments", type=json.loads, default={}, help="RepairArguments fields as JSON")
    options.add_argument("--threads", type=positive, default=1, help="PyTorch's threads on the processor")
    options.add_argument("--device", help="where the model goes, such as cuda; the default is the processor")
    options.add_argument("--plot", type=Path, metavar="PREFIX", help="draw PREFIX-phases.png and PREFIX-methods.png")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    state = resume(given.json, setting_of(given, "methods", "repeats", "mint_rows", "plot"))
    state["benchmark"] = "speed"
    arguments = dict(given.arguments)
    margin, mode = arguments.pop("margin", RepairArguments.margin), arguments.pop("mode", RepairArguments.mode)
    try:
        RepairArguments(margin=margin, mode=mode)
        methods = {name: method_of(name, given.config, arguments) for name in given.methods}
    except (TypeError, ValueError) as error:
        options.error(f"--config or --arguments: {error}")
    known = state.setdefault("methods", {})
    for name, method in methods.items():
        if known.setdefault(name, method.settings) != method.settings:
            raise SystemExit(f"{given.json} holds {name} with other settings; name another file.")
    rows = task_rows(given)
    base, tokenizer = load(given)
    study = Study(base, tokenizer, margin, mode)
    # processor time says nothing of an accelerator, and of several threads it is a sum
    state["clock"] = "cpu" if given.threads == 1 and study.device.type == "cpu" else "wall"
    units = list(study.units(rows, methods, given.repeats, given.mint_rows))
    if any(key not in state["results"] for key, _ in units):
        once = study.warm_up(rows, methods)
        # a later run adds the methods that it brings
        once["first repair"] |= state.get("once", once)["first repair"]
        state["once"] = once
    run_units(units, state, given.json, "repairs")
    if not by_row(state):
        return
    print(report(state))
    if given.plot is not None:
        if metered(state):
            plot_phases(state, given.plot.with_name(f"{given.plot.name}-phases.png"))
        plot_methods(state, given.plot.with_name(f"{given.plot.name}-methods.png"))


if __name__ == "__main__":
    main()
