"""A fresh patch for each row: failing tokens solved, right tokens broken, steps and seconds.

    python benchmarks/fresh_patch.py --model MODEL --data DIR --rows 50 --json fresh_patch.json

Every row of every task gets its own patch on the unpatched model, in `multiple` mode, with the package's default
hyper-parameters unless they are given. Harm is measured on text that has nothing to do with the repair (256 tokens of
the Apache licence): the mean KL divergence from the unpatched model. Finished rows are kept in the JSON file: an
interrupted run goes on from there.
"""

from __future__ import annotations

import json
import time
from typing import Any

from tqdm.auto import tqdm

from harness import Harm, load, parser, resume, setting_of, task_rows, write_json
from methods import Star

SUMS = ("failures", "solved", "right", "broken", "rows_solved")


def patch_row(
    base, tokenizer, row: dict[str, str], config: dict[str, Any], args: dict[str, Any], harm: Harm
) -> dict[str, Any]:
    """Patch one row on the unpatched model and take the patch off again."""
    star = Star("star", **config, **args)
    with star.install(base) as model:
        start = time.perf_counter()
        report = star.repair(model, tokenizer, [row])
        seconds = time.perf_counter() - start
        divergence = harm(model).kl if report.failures else 0.0
    record = report.rows[0]
    return {
        "failures": len(report.failures),
        "solved": report.num_solved,
        "right": record.right_before,
        "broken": len(report.broken),
        "tokens": record.tokens,
        "rows_solved": int(report.success),
        "steps": report.steps,
        "seconds": seconds,
        "kl": divergence,
        "generation_exact": record.generation_exact_after,
        "teacher_forced_exact": record.exact_after,
    }


def totals(records: list[dict[str, Any]]) -> dict[str, float]:
    failing = [record for record in records if record["failures"]]
    sums = {key: sum(record[key] for record in records) for key in SUMS}
    return {
        "rows": len(records),
        **sums,
        "solved_share": sums["solved"] / sums["failures"] if sums["failures"] else 1.0,
        "broken_share": sums["broken"] / sums["right"] if sums["right"] else 0.0,
        "steps": sum(record["steps"] for record in failing) / max(1, len(failing)),
        "kl": sum(record["kl"] for record in failing) / max(1, len(failing)),
        "median_seconds": sorted(record["seconds"] for record in failing)[len(failing) // 2] if failing else 0.0,
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| task | rows | failing tokens solved | right tokens broken | rows right after | steps | KL | median s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    everything = [record for records in results.values() for record in records]
    for name, records in [*results.items(), ("all", everything)]:
        t = totals(records)
        lines.append(
            f"| {name} | {t['rows']} | {t['solved']} / {t['failures']} ({t['solved_share']:.2%}) | "
            f"{t['broken']} / {t['right']} ({t['broken_share']:.2%}) | {t['rows_solved']} / {t['rows']} | "
            f"{t['steps']:.2f} | {t['kl']:.4f} | {t['median_seconds']:.2f} |"
        )
    return "\n".join(lines)


def run(base, tokenizer, rows: dict[str, list], config: dict, args: dict, done: dict[str, list], save) -> None:
    """Fill `done` (records by task) up to all rows, saving after each."""
    harm = Harm(base, tokenizer)
    with tqdm(total=sum(map(len, rows.values())), initial=sum(map(len, done.values())), desc="rows") as bar:
        for task, items in rows.items():
            records = done.setdefault(task, [])
            for row in items[len(records) :]:
                records.append(patch_row(base, tokenizer, row, config, args, harm))
                save()
                bar.update()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--config", type=json.loads, default={}, help="StarConfig fields as JSON")
    options.add_argument("--arguments", type=json.loads, default={}, help="RepairArguments fields as JSON")
    given = options.parse_args()
    state = resume(given.json, setting_of(given))
    rows = task_rows(given)
    base, tokenizer = load(given)
    run(base, tokenizer, rows, given.config, given.arguments, state["results"], lambda: write_json(given.json, state))
    print(table(state["results"]))


if __name__ == "__main__":
    main()
