"""Sparsity patterns: which share of the failing tokens is solved with fewer layers and neurons (paper Figures 4 to 6).

    python benchmarks/sparsity.py --model MODEL --data DIR --rows 20 --json sparsity.json --plot sparsity.png

Every row with failing tokens gets a patch of its own, in each setting:

- Figure 4: a shrinking share of the neurons of all layers, the same number in each layer (layer-wise) or where the
  attribution is highest (model-wise); both patch equally many.
- Figure 5: all neurons of a growing share of the layers, those first whose removal changes the loss most.
- Figure 6: a growing number of neurons in the one layer whose removal changes the loss most.

Each twice: with Algorithm 1 to the letter, whose steps are constant, and with the package's defaults. Layers are
ranked by exact occlusion, once a row, unless `--occlusion first-order` is given. Finished patches are kept in the
JSON file: an interrupted run goes on from there, and so does one with more rows, figures or tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from figures import BLUE, GREY, VERMILION, bootstrap, drawing, offsets, save, with_interval
from fresh_patch import patch_row
from harness import Harm, load, parser, resumable, resume, setting_of, task_rows, write_json
from methods import METHODS, Star
from peft_star import RepairArguments

ALGORITHM_1, DEFAULTS = "Algorithm 1", "defaults"
ARGUMENTS = {item.name for item in fields(RepairArguments)}
# what makes Algorithm 1 is said once, with the methods; the layers and neurons are the figures' own
VARIANTS: dict[str, dict[str, Any]] = {
    ALGORITHM_1: {key: value for key, value in METHODS["star-paper"].keywords.items() if key in ARGUMENTS},
    DEFAULTS: {},
}
SHARES = [2.0**-power for power in range(8)]
LAYER_SHARES = [tenths / 10 for tenths in range(1, 11)]
COUNTS: list[int | float] = [1, 4, 16, 64, 256, 1.0]


@dataclass(frozen=True)
class Setting:
    """One point of one line of one of the paper's figures.

    `neurons` and `layers` are counts (int) or shares (float); `layers` None means all of them.
    """

    figure: int
    line: str
    variant: str
    neurons: int | float
    layers: int | float | None = None

    @property
    def key(self) -> str:
        x = self.layers if self.figure == 5 else self.neurons
        return f"figure {self.figure} | {self.line} | {self.variant} | {x:g}{'' if isinstance(x, int) else ' of all'}"

    def config(self, ranked: Sequence[int]) -> dict[str, Any]:
        """StarConfig fields, given the layers' indices in order of their importance to the row."""
        if self.layers is None:
            pattern = "model-wise" if self.line == "model-wise" else "layer-wise"
            return {"num_neurons": self.neurons, "neuron_pattern": pattern, "layer_selection": "all"}
        count = self.layers if isinstance(self.layers, int) else max(1, round(self.layers * len(ranked)))
        return {"num_neurons": self.neurons, "layer_selection": sorted(ranked[:count])}


def settings(figures: Sequence[int]) -> list[Setting]:
    made = []
    for variant in VARIANTS:
        if 4 in figures:
            lines = ("layer-wise", "model-wise")
            made += [Setting(4, line, variant, share) for share in SHARES for line in lines]
        if 5 in figures:
            made += [Setting(5, "layers by occlusion", variant, 1.0, share) for share in LAYER_SHARES]
        if 6 in figures:
            made += [Setting(6, "one layer", variant, count, 1) for count in COUNTS]
    return made


def scan_row(base, tokenizer, row: dict[str, str], occlusion: str) -> dict[str, Any]:
    """What the unpatched model does on a row, and the indices of its layers, the most important first."""
    config = {"num_neurons": 1, "num_layers": 1.0, "layer_selection": "occlusion"}
    star = Star("star", **config, occlusion=occlusion, max_steps=1)
    with star.install(base) as model:
        report = star.repair(model, tokenizer, [row])
    found: dict[str, Any] = {
        "tokens": report.rows[0].tokens,
        "right": report.rows[0].right_before,
        "failures": len(report.failures),
    }
    if report.failures:
        changes = report.occlusion[occlusion]
        ranked = sorted(changes, key=lambda name: abs(changes[name]), reverse=True)
        found["layers"] = [int(name.rpartition(".")[2]) for name in ranked]
    return found


def run(base, tokenizer, rows: dict[str, dict[str, str]], given, state: dict[str, Any]) -> None:
    """Fill `state` with what is missing, saving after each patch; row by row, so that all settings grow together."""
    harm = Harm(base, tokenizer)
    wanted = settings(given.figures)
    with tqdm(rows.items(), desc="rows") as bar:
        for name, row in bar:
            if name not in state["scan"]:
                state["scan"][name] = scan_row(base, tokenizer, row, given.occlusion)
                write_json(given.json, state)
            found = state["scan"][name]
            for setting in wanted if found["failures"] else ():
                done = state["results"].setdefault(setting.key, {})
                if name in done:
                    continue
                bar.set_postfix_str(f"{name}, {setting.key}")
                arguments = VARIANTS[setting.variant] | {"max_steps": given.steps}
                config = setting.config(found["layers"])
                done[name] = patch_row(base, tokenizer, row, config, arguments, harm)
                write_json(given.json, state)


def points(state: dict[str, Any], setting: Setting) -> dict[str, Any] | None:
    """Solved share of the failing tokens, exact match and KL of one setting, with intervals over rows."""
    records, scan = state["results"].get(setting.key, {}), state["scan"]
    if not records:
        return None
    # rows that the model gets right need no patch and count as they are, if the patched ones around them are done
    counted = [name for name in scan if name in records or not scan[name]["failures"]]
    table = []
    for name in counted:
        record = records.get(name, {"failures": 0, "solved": 0, "broken": 0, "kl": np.nan, "steps": 0})
        right = scan[name]["right"] + record["solved"] - record["broken"]
        table.append([record["solved"], record["failures"], right, scan[name]["tokens"], record["kl"]])
    measures = {
        "solved": lambda t: t[:, 0].sum() / t[:, 1].sum() if t[:, 1].sum() else np.nan,
        "exact_match": lambda t: t[:, 2].sum() / t[:, 3].sum(),
        "kl": lambda t: np.nanmean(t[:, 4]) if not np.isnan(t[:, 4]).all() else np.nan,
    }
    cases = np.array(table, dtype=float)
    point: dict[str, Any] = {"rows": len(records), "failures": int(cases[:, 1].sum())}
    for name, measure in measures.items():
        point[name], point[f"{name}_interval"] = float(measure(cases)), bootstrap(cases, measure)
    return point


def before(state: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    """Exact match of the unpatched model, with its interval over rows."""
    cases = np.array([[found["right"], found["tokens"]] for found in state["scan"].values()], dtype=float)
    return cases[:, 0].sum() / cases[:, 1].sum(), bootstrap(cases, lambda t: t[:, 0].sum() / t[:, 1].sum())


def _fraction(share: float) -> str:
    return "1" if share == 1 else f"1/{round(1 / share)}"


def _x_label(setting: Setting) -> str:
    if setting.figure == 5:
        return f"{setting.layers:.0%}"
    if setting.figure == 6:
        return f"{setting.neurons}" if isinstance(setting.neurons, int) else "all"
    return _fraction(setting.neurons)


TITLES = {4: "Figure 4: neurons of all layers", 5: "Figure 5: layers", 6: "Figure 6: neurons of one layer"}
CAPTIONS = {
    4: "Figure 4: share of neurons, layer-wise against model-wise (all layers)",
    5: "Figure 5: share of layers, the most important first (all their neurons)",
    6: "Figure 6: number of neurons in the most important layer",
}
X_AXES = {4: "share of each layer's neurons", 5: "share of layers", 6: "neurons in the one layer"}


def lines_of(state: dict[str, Any], figure: int) -> dict[tuple[str, str], list[tuple[Setting, dict[str, Any]]]]:
    """The measured points of a figure by (line, variant)."""
    lines: dict[tuple[str, str], list] = {}
    for setting in settings([figure]):
        point = points(state, setting)
        if point is not None:
            lines.setdefault((setting.line, setting.variant), []).append((setting, point))
    return lines


def table(state: dict[str, Any]) -> str:
    """The results as Markdown, one table for each figure."""
    parts = []
    unpatched = dict(zip(("match", "match_interval"), before(state)))
    parts.append(
        f"{len(state['scan'])} rows, {sum(found['failures'] > 0 for found in state['scan'].values())} of them with "
        f"failing tokens. Exact match of the unpatched model: {with_interval(unpatched, 'match', '.1%')}."
    )
    for figure, caption in CAPTIONS.items():
        lines = lines_of(state, figure)
        if not lines:
            continue
        parts += ["", f"*{caption}*", ""]
        parts.append("| line | steps | " + X_AXES[figure] + " | failing tokens solved | exact match after | KL |")
        parts.append("| --- | --- | --- | --- | --- | --- |")
        for (line, variant), measured in lines.items():
            for setting, point in measured:
                solved, match = (with_interval(point, name, ".1%") for name in ("solved", "exact_match"))
                parts.append(f"| {line} | {variant} | {_x_label(setting)} | {solved} | {match} | {point['kl']:.4f} |")
    return "\n".join(parts)


def plot(state: dict[str, Any], path: Path) -> None:
    """Draw the figures side by side: failing tokens solved above, exact match below."""
    drawn = {figure: lines for figure in CAPTIONS if (lines := lines_of(state, figure))}
    with drawing() as plt:
        size = (0.6 + 4.1 * len(drawn), 6.4)
        figure, axes = plt.subplots(2, len(drawn), figsize=size, sharey="row", sharex="col", squeeze=False)
        base, (low, high) = before(state)
        handles = {}
        for column, (number, lines) in enumerate(drawn.items()):
            upper, lower = axes[:, column]
            for (line, variant), measured in lines.items():
                color = VERMILION if line == "model-wise" else BLUE
                name = f"{'model-wise' if line == 'model-wise' else 'layer-wise'}, {variant}"
                look = {"color": color, "marker": "s" if line == "model-wise" else "o", "label": name}
                look |= {"linestyle": "-" if variant == DEFAULTS else "--"}
                look |= {"markerfacecolor": color if variant == DEFAULTS else "white"}
                every = settings([number])
                order = list(dict.fromkeys(_x_label(setting) for setting in every))
                places = [order.index(_x_label(setting)) for setting, _ in measured]
                for axis, measure in ((upper, "solved"), (lower, "exact_match")):
                    values = [point[measure] for _, point in measured]
                    spread = offsets([point[f"{measure}_interval"] for _, point in measured], values)
                    # apart by a little, so that one line's error bars do not hide another's
                    shift = 0.08 * (list(lines).index((line, variant)) - (len(lines) - 1) / 2)
                    drawn_line = axis.errorbar([x + shift for x in places], values, spread, elinewidth=0.8, **look)
                handles[name] = drawn_line
                lower.set_xticks(range(len(order)), order)
            lower.axhspan(low, high, color=GREY, alpha=0.12, linewidth=0)
            handles["unpatched model"] = lower.axhline(base, color=GREY, linestyle=":")
            lower.set_xlabel(X_AXES[number])
            upper.set_title(TITLES[number])
        for row, title in enumerate(("failing tokens solved", "completion tokens right")):
            axes[row, 0].set_ylabel(title)
            axes[row, 0].yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1.0))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(5, 2 * len(drawn)))
        save(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--figures", type=int, nargs="+", default=[4, 5, 6], choices=(4, 5, 6))
    options.add_argument("--steps", type=int, default=10, help="at most this many steps a patch (paper: 10)")
    options.add_argument("--occlusion", default="exact", choices=("exact", "first-order"), help="how layers rank")
    options.add_argument("--device", help="cpu (default), cuda, ...")
    options.add_argument("--plot", type=Path, help="draw the results here")
    given = options.parse_args()
    # more rows, tasks and figures only add to what a file holds
    setting = setting_of(given, "data", "tasks", "rows", "figures", "plot", "device")
    setting["defaults"] = RepairArguments().to_dict()
    state = {"benchmark": "sparsity", "scan": {}} | resume(given.json, setting)
    # the rows' texts are not ours to pass on with the results
    rows = {
        f"{task}-{hashlib.sha256(row['prompt'].encode()).hexdigest()[:10]}": row
        for task, items in task_rows(given).items()
        for row in items
    }
    base, tokenizer = load(given)
    with resumable(given.json):
        run(base, tokenizer, rows, given, state)
    print(table(state))
    if given.plot is not None:
        plot(state, given.plot)


if __name__ == "__main__":
    main()
