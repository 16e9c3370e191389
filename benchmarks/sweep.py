"""The sweep behind Algorithm 1's hyper-parameters: norm, learning rate, share of layers, neurons per layer, and more.

    python benchmarks/sweep.py --model MODEL --data DIR --rows 5 --json sweep.json --plot sweep.png

One factor at a time around `CONFIG` and `ARGUMENTS`, a fresh patch for each row (see fresh_patch.py). Every setting
that the sweep depends on is named here, so that it measures the same whatever the package's defaults are. Finished
rows are kept in the JSON file: an interrupted run goes on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fresh_patch import run, totals
from harness import load, parser, resume, setting_of, task_rows, write_json

CONFIG: dict[str, Any] = {
    "layer_selection": "occlusion",
    "num_layers": 0.5,
    "num_neurons": 64,
    "neuron_pattern": "layer-wise",
}
ARGUMENTS: dict[str, Any] = {
    "algorithm": "prior-guided",
    "norm": "std",
    "learning_rate": 0.01,
    "damping": 0.5,
    "growth": 1.2,
    "ridge": 1e-4,
    "margin": 0.01,
    "occlusion": "first-order",
    "max_steps": 10,
}
RATES = {
    "std": (0.003, 0.01, 0.03, 0.1),
    "rms": (0.003, 0.01),
    "max": (0.1,),
    "l2": (0.1,),
}
OTHERS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "layers": [({"num_layers": share}, {}) for share in (0.1, 0.25, 0.75, 1.0)],
    "neurons": [({"num_neurons": count}, {}) for count in (16, 256, 1.0)],
    "pattern": [({"neuron_pattern": "model-wise"}, {})],
    "ridge": [({}, {"ridge": ridge}) for ridge in (1e-2, 1e-1)],
    "damping": [({}, {"damping": 0.5, "growth": 1.0}), ({}, {"damping": 1.0, "growth": 1.0})],
    "occlusion": [({}, {"occlusion": "exact"})],
    "margin": [({}, {"margin": margin}) for margin in (0.0, 0.1)],
}


def grid() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Settings by name: (StarConfig fields, RepairArguments fields); one factor at a time around the base setting."""
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"base setting": ({}, {})}
    for norm, rates in RATES.items():
        for rate in rates:
            if (norm, rate) != (ARGUMENTS["norm"], ARGUMENTS["learning_rate"]):
                changes[f"norm {norm}, lr {rate:g}"] = ({}, {"norm": norm, "learning_rate": rate})
    for name, variants in OTHERS.items():
        for config, arguments in variants:
            value = ", growth ".join(str(value) for value in [*config.values(), *arguments.values()])
            changes[f"{name} {value}"] = (config, arguments)
    return {name: (CONFIG | config, ARGUMENTS | arguments) for name, (config, arguments) in changes.items()}


def table(results: dict[str, dict[str, list]]) -> str:
    lines = [
        "| setting | failing tokens solved | right tokens broken | rows right after | steps | KL |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_task in results.items():
        t = totals([record for records in by_task.values() for record in records])
        lines.append(
            f"| {name} | {t['solved']} / {t['failures']} ({t['solved_share']:.2%}) | "
            f"{t['broken']} / {t['right']} ({t['broken_share']:.2%}) | {t['rows_solved']} / {t['rows']} | "
            f"{t['steps']:.2f} | {t['kl']:.4f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list]], path: Path) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    names = list(results)
    rows = [totals([record for records in results[name].values() for record in records]) for name in names]
    columns = (
        ("failing tokens solved", [row["solved_share"] for row in rows], False),
        ("right tokens broken", [row["broken_share"] for row in rows], False),
        ("steps a row", [row["steps"] for row in rows], False),
        ("KL on unrelated text", [max(row["kl"], 1e-6) for row in rows], True),
    )
    size = (13, 1 + 0.28 * len(names))
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained")
    for axis, (title, values, log) in zip(axes, columns):
        axis.barh(range(len(names)), values, color="tab:blue")
        axis.set_title(title)
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlim(0.9 * min(columns[0][1]), 1)
    axes[1].set_xlim(0, max(0.01, 1.1 * max(columns[1][1])))
    figure.savefig(path, dpi=120)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--plot", type=Path, help="draw the results here")
    given = options.parse_args()
    state = resume(given.json, setting_of(given, "plot") | {"config": CONFIG, "arguments": ARGUMENTS})
    rows = task_rows(given)
    base, tokenizer = load(given)
    for name, (config, args) in grid().items():
        print(name, flush=True)
        done = state["results"].setdefault(name, {})
        run(base, tokenizer, rows, config, args, done, lambda: write_json(given.json, state))
    print(table(state["results"]))
    if given.plot is not None:
        plot(state["results"], given.plot)


if __name__ == "__main__":
    main()
