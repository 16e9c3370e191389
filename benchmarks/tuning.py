"""The baselines' hyper-parameters, chosen as fairly as the package's own: each grid on the same few rows.

    python benchmarks/tuning.py --model MODEL --data DIR --rows 2 --json tuning.json

Every row gets a fresh patch for each setting. The best setting solves the most failing tokens, then breaks the fewest
right ones, then takes the least time of the processor (which, with one thread, other processes do not touch). After
each row the worse half of the settings drops out, until four are left. Finished patches are kept in the JSON file: an
interrupted run goes on from there.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from typing import Any

from harness import load, parser, resume, run_units, setting_of, task_rows
from methods import make_method
from peft_star.method.semantics import semantic_bases


def grid(**axes: list) -> list[dict[str, Any]]:
    return [dict(zip(axes, values)) for values in product(*axes.values())]


LEFT = 4
TARGETS = ["all-linear", "ffn-second"]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "sgd-tuned": grid(learning_rate=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    "lora": grid(target_modules=TARGETS, rank=[8, 16], learning_rate=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "shira": grid(target_modules=TARGETS, optimizer=["adamw"], learning_rate=[1e-3, 3e-3, 1e-2, 3e-2])
    + grid(target_modules=["ffn-second"], optimizer=["sgd"], learning_rate=[1e-1, 1.0]),
    "mint": grid(factor=[0.3, 1.0, 3.0, 10.0, 30.0]),
}


def patch(base, tokenizer, row: dict[str, str], name: str, setting: dict[str, Any]) -> dict[str, Any]:
    with make_method(name, **setting).patched(base, tokenizer, [row]) as outcome:
        return outcome.to_dict()


def text(setting: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in setting.items()
    )


def totals(records: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("failures", "solved", "right", "broken", "success", "steps", "forward_backwards", "forwards")
    sums = {key: sum(record[key] for record in records) for key in keys}
    return sums | {"rows": len(records), "seconds": sum(record["details"]["cpu_seconds"] for record in records)}


def ranked(results: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """One method's settings, the best first, with their totals; those that went on to more rows go first."""
    rows = {}
    for setting in map(text, GRIDS[name]):
        records = [record for key, record in results.items() if key.startswith(f"{name} | {setting} | ")]
        if records:
            rows[setting] = totals(records)
    order = ("rows", "solved"), ("broken", "seconds")
    return dict(
        sorted(
            rows.items(), key=lambda item: (*(-item[1][key] for key in order[0]), *(item[1][key] for key in order[1]))
        )
    )


def table(results: dict[str, dict[str, Any]], name: str) -> str:
    lines = [
        "| setting | failing tokens solved | right tokens broken | rows | steps | passes (differentiated) | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setting, t in ranked(results, name).items():
        lines.append(
            f"| {setting} | {t['solved']} / {t['failures']} | {t['broken']} / {t['right']} | "
            f"{t['success']} / {t['rows']} | {t['steps']} | "
            f"{t['forward_backwards'] + t['forwards']} ({t['forward_backwards']}) | {t['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", default=list(GRIDS), choices=GRIDS)
    options.set_defaults(rows=2)
    given = options.parse_args()
    state = resume(given.json, setting_of(given, "methods"))
    rows = task_rows(given)
    base, tokenizer = load(given)
    semantic_bases(base)
    going_on = {name: GRIDS[name] for name in given.methods}
    for number, task in product(range(given.rows), given.tasks):
        row = rows[task][number]
        units = [
            (f"{name} | {text(setting)} | {task} {number}", partial(patch, base, tokenizer, row, name, setting))
            for name, settings in going_on.items()
            for setting in settings
        ]
        if not run_units(units, state, given.json, f"{task} {number}"):
            break
        for name, settings in going_on.items():
            best = list(ranked(state["results"], name))[: max(LEFT, math.ceil(len(settings) / 2))]
            going_on[name] = [setting for setting in settings if text(setting) in best]
    for name in given.methods:
        print(f"\n{name}\n\n{table(state['results'], name)}", flush=True)


if __name__ == "__main__":
    main()
