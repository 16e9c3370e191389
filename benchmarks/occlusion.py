"""How well the first-order occlusion estimate agrees with exact occlusion, and whether it matters.

    python benchmarks/occlusion.py --model MODEL --data DIR --rows 10 --json occlusion.json

For each row: Spearman's rank correlation of the layers' changes in loss, and the share of the top half of the layers
that both measures name. Exact occlusion costs one forward pass for each layer; the estimate costs none.
"""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

from tqdm.auto import tqdm

from harness import load, machine, parser, task_rows, write_json
from methods import Star


def main() -> None:
    given = parser(__doc__).parse_args()
    state: dict[str, Any] = {"machine": machine(), "model": given.model, "results": {}}
    if given.json.is_file():
        state["results"] = json.loads(given.json.read_text())["results"]
    base, tokenizer = load(given)
    settings = {"algorithm": "prior-guided", "occlusion": "exact", "max_steps": 1}
    star = Star("star", **settings, layer_selection="occlusion", num_layers=0.5)
    for task, rows in task_rows(given).items():
        done = state["results"].setdefault(task, [])
        for row in tqdm(rows[len(done) :], desc=task):
            with star.install(base) as model:
                report = star.repair(model, tokenizer, [row])
            done.append(report.occlusion.get("agreement"))
            write_json(given.json, state)
    print("| task | rows with failures | Spearman | overlap of the chosen layers |\n| --- | --- | --- | --- |")
    found = {task: [item for item in items if item] for task, items in state["results"].items()}
    found["all"] = [item for items in found.values() for item in items]
    for task, items in found.items():
        if items:
            rho, overlap = mean(item["spearman"] for item in items), mean(item["top_overlap"] for item in items)
            print(f"| {task} | {len(items)} | {rho:.2f} | {overlap:.0%} |")


if __name__ == "__main__":
    main()
