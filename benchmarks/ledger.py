"""Repairs one after another in one patch: what each leaves of those before it, and what taking one out again leaves.

    python benchmarks/ledger.py --model MODEL --rows examples/failures.jsonl --facts DIR/counterfact/facts.jsonl \
        --count 20 --json ledger.json

Each row is a repair of its own, in the order given and in the opposite one; with what earlier repairs have solved held
by its rows (the default), by activations alone (`ledger_rows=False`), and not at all (`keep_earlier=False`). Then each
repair of the first patch is taken out again, from the whole patch: its tokens should fail as before, and all other
rows stay right. Harm is the mean KL divergence from the unpatched model on 256 tokens of the Apache licence. Finished
parts are kept in the JSON file: an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model

from harness import Harm, load, resume, run_units, setting_of
from peft_star import RepairArguments, StarConfig, repair, revert
from peft_star.evaluation import evaluate
from peft_star.failures import read_rows
from peft_star.files import parse_json
from peft_star.sharing.governor import NORM, curves

WAYS: dict[str, dict[str, Any]] = {
    "rows": {},
    "opposite order": {},
    "activations": {"ledger_rows": False},
    "nothing": {"keep_earlier": False},
}


def some_rows(given: argparse.Namespace) -> list[dict[str, str]]:
    """The rows to repair: those of the file, then facts."""
    rows = read_rows(given.rows)
    lines = given.facts.read_text(encoding="utf-8").splitlines() if given.facts else []
    facts = [parse_json(line) for line in lines[: given.count]]
    rows += [{"prompt": fact["prompt"], "completion": f" {fact['target_new']}"} for fact in facts]
    return rows[: given.count]


def exact_rows(model, tokenizer, rows: list[dict]) -> list[bool]:
    """Which rows have every token right, teacher-forced."""
    found = evaluate(model, tokenizer, rows, generate=False, progress=False)
    return [all(row.right) for row in found.rows]


def succession(base, tokenizer, rows: list[dict], args: dict[str, Any], harm: Harm, keep: Path | None) -> dict:
    """Repair the rows one after another in one patch, take it off again, and say what was right after each."""
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
    config, records = model.peft_config["default"], []
    settings = RepairArguments(**args, disable_tqdm=True, verify_generation=False)
    for row in rows:
        start = time.process_time()
        report = repair(model, tokenizer, [row], settings)
        seconds = time.process_time() - start
        kl = harm(model).kl
        if report.entry:
            ledger = config.ledger
            config.ledger = ledger.replaced(replace(ledger.entries[-1], harm={"kl": kl}))
        records.append(
            {
                "failures": len(report.failures),
                "solved": report.num_solved,
                "earlier_broken": report.earlier.get("broken", 0),
                "steps": report.steps,
                "cpu_seconds": seconds,
                "kl": kl,
                "warnings": report.warnings,
            }
        )
    right = exact_rows(model, tokenizer, rows)
    pace = {curve.measure: curve.pace() for curve in curves(config.ledger)}
    norm = config.ledger.entries[-1].patch[NORM]
    if keep is not None:
        model.save_pretrained(keep, save_embedding_layers=False)
    model.unload()
    return {"records": records, "right": right, "kl": harm(base).kl if not records else kl, "norm": norm, "pace": pace}


def take_out(base, tokenizer, patch: Path, rows: list[dict], number: int) -> dict[str, Any]:
    """Take one repair out of the whole patch, and say what is right then."""
    model = PeftModel.from_pretrained(base, patch)
    entry = model.peft_config["default"].ledger.entries[number]
    start = time.process_time()
    report = revert(model, tokenizer, entry.id)
    seconds = time.process_time() - start
    right = exact_rows(model, tokenizer, rows)
    model.unload()
    return {
        "row": rows.index(entry.rows[0].row),
        "failures": report.failures,
        "fail_again": report.fail_again,
        "broken": report.broken,
        "solved_again": len(report.solved_again),
        "right": right,
        "cpu_seconds": seconds,
    }


def table(results: dict[str, Any]) -> str:
    lines = ["| held by | rows right at the end | earlier rows broken on the way | KL | CPU s a repair |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name in WAYS:
        if name in results:
            found = results[name]
            records = found["records"]
            seconds = sum(record["cpu_seconds"] for record in records) / len(records)
            broken = sum(record["earlier_broken"] for record in records)
            right = f"{sum(found['right'])} of {len(found['right'])}"
            lines.append(f"| {name} | {right} | {broken} | {found['kl']:.4f} | {seconds:.1f} |")
    if {"rows", "opposite order"} <= results.keys():
        verdicts = zip(results["rows"]["right"], results["opposite order"]["right"][::-1])
        same = sum(a == b for a, b in verdicts)
        lines += ["", f"Equal verdicts in both orders: {same} of {len(results['rows']['right'])} rows."]
    out = [value for key, value in results.items() if key.startswith("without ")]
    if out:
        whole = results["rows"]["right"]
        others = [[right for n, right in enumerate(one["right"]) if n != one["row"] and whole[n]] for one in out]
        tokens = sum(one["fail_again"] for one in out), sum(one["failures"] for one in out)
        kept = sum(all(right) for right in others)
        alone = sum(not one["broken"] for one in out)
        lines += [
            "",
            f"Taken out, one at a time: {len(out)} repairs; {tokens[0]} of {tokens[1]} tokens fail again; all other "
            f"rows stay right for {kept} of {len(out)} ({alone} with nothing to be solved again); "
            f"{sum(one['cpu_seconds'] for one in out) / len(out):.1f} CPU s each.",
        ]
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="Hub id, directory or .gguf file")
    options.add_argument("--rows", type=Path, required=True, help="JSON Lines of rows")
    options.add_argument("--facts", type=Path, help="JSON Lines of CounterFact, when there are too few rows")
    options.add_argument("--count", type=int, default=20)
    options.add_argument("--arguments", type=json.loads, default={}, help="RepairArguments fields as JSON")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", type=Path, required=True, help="results; an existing file is gone on with")
    given = options.parse_args()
    state, rows = resume(given.json, setting_of(given)), some_rows(given)
    base, tokenizer = load(given)
    harm, patch = Harm(base, tokenizer), given.json.with_suffix(".patch")

    def one(name: str) -> dict[str, Any]:
        order = rows[::-1] if name == "opposite order" else rows
        arguments = {**given.arguments, **WAYS[name]}
        return succession(base, tokenizer, order, arguments, harm, patch if name == "rows" else None)

    units = [("rows", lambda: one("rows"))]
    run_units(units, state, given.json)
    # rows that did not fail have made no entry
    entries = [number for number, record in enumerate(state["results"]["rows"]["records"]) if record["failures"]]
    for place, number in enumerate(entries):
        units.append((f"without {number}", lambda place=place: take_out(base, tokenizer, patch, rows, place)))
    units += [(name, lambda name=name: one(name)) for name in list(WAYS)[1:]]
    run_units(units, state, given.json)
    print(table(state["results"]))


if __name__ == "__main__":
    main()
