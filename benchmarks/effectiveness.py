"""Effectiveness and efficiency of repair methods, as in the paper's Tables 3 and 4 (RQ1).

    python benchmarks/effectiveness.py --model MODEL --data DIR --rows 50 --json effectiveness.json

Every row gets a patch of its own from every method, in each mode that the method has, and is itself what the patched
model is scored on: "for each data used in repairing LM, we use the same data to validate". Exact match is the share of
completion tokens that are predicted right, given the right tokens before them, over all rows; edit similarity, BLEU-4
and ROUGE-L are means over rows of the text of these tokens, and once more of greedy generation. Time is the seconds of
the repair by failing token, of the processor where it has one thread. Intervals are 95% bootstrap intervals over rows.
Harm, beyond the paper, is the KL divergence from the unpatched model on 256 tokens of the Apache licence, over rows
that needed a patch.

The methods take turns on each row, and who begins changes from row to row, so that what else the machine does falls on
all alike and a stopped run is balanced. What belongs to the model and not to a repair (the semantic bases of its head)
is computed before, and its time is printed. Finished patches are kept in the JSON file: an interrupted run goes on
from there, and so does one with more methods or modes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from figures import bootstrap, label
from harness import Harm, load, parser, resume, run_units, setting_of, task_rows
from interface import MODES, Method
from methods import make_method
from peft_star.evaluation import RowEvaluation, evaluate
from peft_star.method.semantics import semantic_bases
from side_effects import parse_method

UNPATCHED = "unpatched"
DEFAULT_METHODS = ["mint", "sgd", "lora", "logit-bias", "star"]
SCORES = {"edit_similarity": "edit similarity", "bleu": "BLEU-4", "rouge_l": "ROUGE-L"}
REPAIR = ("s a failure", "failing tokens solved", "right tokens broken", "rows repaired", "steps", "passes", "KL")


class Study:
    """Runs and scores patches of one model."""

    def __init__(self, base, tokenizer, margin: float, generate: bool, harm: bool):
        self.base, self.tokenizer = base, tokenizer
        self.margin, self.generate = margin, generate
        self.harm = Harm(base, tokenizer) if harm else None

    def score(self, model, row: dict[str, str]) -> dict[str, Any]:
        evaluation = evaluate(model, self.tokenizer, [row], generate=self.generate, progress=False)
        found: RowEvaluation = evaluation.rows[0]
        record = {"tokens": len(found.right), "right": sum(found.right)}
        for name in ("teacher_forced", "generated"):
            if (scores := getattr(found, name)) is not None:
                record[name] = vars(scores)
        return record

    def unpatched(self, row: dict[str, str]) -> dict[str, Any]:
        return {"score": self.score(self.base, row)}

    def patched(self, row: dict[str, str], method: Method, mode: str) -> dict[str, Any]:
        with method.patched(self.base, self.tokenizer, [row], margin=self.margin, mode=mode) as outcome:
            record = {"score": self.score(outcome.model, row), "outcome": outcome.to_dict()}
            if self.harm is not None and outcome.failures:
                record["kl"] = self.harm(outcome.model).kl
        return record

    def units(
        self, rows: dict[str, list[dict[str, str]]], methods: dict[str, Method], modes: Sequence[str]
    ) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """What is to be done, by key: round-robin over the tasks, the methods in turn on each row."""
        pairs = [(mode, *named) for mode in modes for named in methods.items() if mode in named[1].modes]
        turn = 0
        for number in range(max(map(len, rows.values()))):
            for task, items in rows.items():
                if number >= len(items):
                    continue
                yield key(UNPATCHED, "", task, number), partial(self.unpatched, items[number])
                for place in range(len(pairs)):
                    mode, name, method = pairs[(turn + place) % len(pairs)]
                    unit = partial(self.patched, items[number], method, mode)
                    yield key(name, mode, task, number), unit
                turn += 1


def key(method: str, mode: str, task: str, number: int) -> str:
    return f"{mode}/{method}/{task}/{number}" if mode else f"{method}/{task}/{number}"


def complete(
    results: dict[str, Any], task: str, rows: int, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By (mode, method) the records of a task's rows, for those rows that all of them have finished."""
    wanted = [("", UNPATCHED), *pairs]
    numbers = [
        number for number in range(rows) if all(key(method, mode, task, number) in results for mode, method in wanted)
    ]
    return {(mode, method): [results[key(method, mode, task, n)] for n in numbers] for mode, method in wanted}


def ratio(cases: np.ndarray) -> float:
    """Sum of the first column by sum of the second."""
    total = cases[:, 1].sum()
    return float(cases[:, 0].sum() / total) if total else float("nan")


def estimate(cases: Sequence[tuple[float, float]], form: str) -> str:
    """A ratio of sums with its interval, or a dash."""
    array = np.asarray(cases, dtype=float).reshape(-1, 2)
    value = ratio(array)
    if np.isnan(value):
        return "–"
    low, high = bootstrap(array, ratio)
    return f"{value:{form}}" if np.isnan(low) else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def score_cells(records: list[dict[str, Any]], source: str) -> list[str]:
    scores = [record["score"] for record in records]
    texts = [score[source] for score in scores if source in score]
    first = (
        [(s["right"], s["tokens"]) for s in scores] if source == "teacher_forced" else [(t["exact"], 1) for t in texts]
    )
    return [estimate(first, ".3f"), *(estimate([(text[name], 1) for text in texts], ".3f") for name in SCORES)]


def repair_cells(records: list[dict[str, Any]]) -> list[str]:
    outcomes = [record["outcome"] for record in records]
    failing = [outcome for outcome in outcomes if outcome["failures"]]
    passes = [(o["forward_backwards"] + o["forwards"], 1) for o in failing]
    return [
        estimate([(_seconds(o), o["failures"]) for o in failing], ".3f"),
        estimate([(o["solved"], o["failures"]) for o in outcomes], ".1%"),
        estimate([(o["broken"], o["right"]) for o in outcomes], ".2%"),
        estimate([(o["success"], 1) for o in outcomes], ".1%"),
        estimate([(o["steps"], 1) for o in failing], ".1f"),
        estimate(passes, ".1f"),
        estimate([(record["kl"], 1) for record in records if "kl" in record], ".4f"),
    ]


def _seconds(outcome: dict[str, Any]) -> float:
    """Of the processor, where one thread did all: what else a machine does tells on the clock's."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return outcome["details"].get("cpu_seconds", outcome["seconds"]) if alone else outcome["seconds"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(state: dict[str, Any], methods: dict[str, Method], modes: Sequence[str], tasks: Sequence[str]) -> str:
    """The tables, in Markdown: of each task and of all together, on the rows that every method has finished."""
    pairs = [(mode, name) for mode in modes for name, method in methods.items() if mode in method.modes]
    by_task = {task: complete(state["results"], task, state["setting"]["rows"], pairs) for task in tasks}
    if len(tasks) > 1:
        pooled = {pair: [r for found in by_task.values() for r in found[pair]] for pair in [("", UNPATCHED), *pairs]}
        by_task["all tasks"] = pooled
    parts = []
    for title, found in by_task.items():
        unpatched = found.pop(("", UNPATCHED))
        parts.append(f"### {title} ({len(unpatched)} rows)")
        if not unpatched:
            continue
        for source, first in (("teacher_forced", "exact match"), ("generated", "rows generated exactly")):
            if source in unpatched[0]["score"]:
                lines = [["", UNPATCHED, *score_cells(unpatched, source)]]
                lines += [[mode, label(method), *score_cells(r, source)] for (mode, method), r in found.items()]
                parts.append(markdown(["mode", "method", first, *SCORES.values()], lines))
        lines = [[mode, label(method), *repair_cells(records)] for (mode, method), records in found.items()]
        parts.append(markdown(["mode", "method", *REPAIR], lines))
    parts.append(f"Semantic bases of the model's head, once: {state['semantic_bases_seconds']:.2f} s.")
    settings = {
        name: ", ".join(f"{key} {value}" for key, value in method.settings.items()) for name, method in methods.items()
    }
    parts.append("\n".join(f"- {label(name)}: {text}." for name, text in settings.items()))
    return "\n\n".join(parts)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, help="name or name:setting=value,...")
    options.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    options.add_argument("--margin", type=float, default=0.01, help="probability by which a solved token must lead")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--no-generate", dest="generate", action="store_false", help="teacher-forced scores only")
    options.add_argument("--no-harm", dest="harm", action="store_false", help="no KL divergence on unrelated text")
    given = options.parse_args()
    state = resume(given.json, setting_of(given, "methods", "modes"))
    methods = {name: parse_method(name) for name in given.methods}
    known = state.setdefault("methods", {})
    for name, method in methods.items():
        if known.setdefault(name, method.settings) != method.settings:
            raise SystemExit(f"{given.json} holds {name} with other settings; name another file.")
    rows = task_rows(given)
    base, tokenizer = load(given, given.dtype)
    start = time.perf_counter()
    semantic_bases(base)
    state["semantic_bases_seconds"] = time.perf_counter() - start
    study = Study(base, tokenizer, given.margin, given.generate, given.harm)
    study.patched(rows[given.tasks[0]][0], make_method("star"), "multiple")  # the first passes of a process are slow
    run_units(study.units(rows, methods, given.modes), state, given.json)
    print(report(state, methods, given.modes, given.tasks))


if __name__ == "__main__":
    main()
