"""How much can one patch hold? Rows repaired at once and in succession, and what is left of all else then.

    python benchmarks/cumulative.py --model MODEL --data DIR --tasks tldr --counts 1 10 50 --step 10 \\
        --methods star sgd lora --json cumulative.json --plot cumulative
    python benchmarks/cumulative.py --model MODEL --facts facts.jsonl --counts 1 10 50 --step 10 \\
        --methods star memit alphaedit --json cumulative.json --plot cumulative

*At once*, a new patch repairs the first N rows. *In succession*, one patch repairs them in batches of `--step` rows,
up to the largest N, and is measured after each batch. How each method goes on is said in `succession.py`.

    solved            tokens of the N rows that were wrong and are right, teacher-forced
    rows right        of the N rows, all tokens
    earlier right     of the rows of earlier batches that were right after their own batch, those that still are
    unseen            of a task: tokens right in `--unseen` rows that nothing repairs; of facts: rephrased prompts that
                      say the new object, and neighbours (another subject) whose next token is as before
    own texts         of what the model says by itself, on prompts that no repair is solved by: texts unchanged
    KL, perplexity    on 256 tokens of the Apache licence and of Python's `heapq`

A task's rows are those that the model gets wrong, in an order by `--seed`, each behind its demonstrations. Editors,
which have to be told a subject, are run on facts only; STAR is told it, too. CPU seconds are those of the repair,
in succession of all batches so far; what STAR learns of a model once comes before.

Every finished point is kept in the JSON file: an interrupted run goes on from there, and so does one with more counts,
methods, tasks or another step. A series in succession goes on from its last batch, whose patch lies in the folder
beside the file (`--states`); without that, it begins anew, and is measured only where it was not.
"""

from __future__ import annotations

import argparse
import heapq
import inspect
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from cumulative_report import AT_ONCE, FACTS, IN_SUCCESSION, Record, lines, plot, report
from harness import UNRELATED, load, resumable, resume, setting_of, write_json
from interface import MAX_BATCH_TOKENS, Method, padded
from methods import Star
from peft_star.engine.engine import Engine
from peft_star.engine.passes import teacher_forced
from peft_star.evaluation import OwnTextsProbe, TextProbe
from peft_star.failures import encode_rows
from peft_star.files import new_directory
from prompts import TASKS, few_shot_rows, read_jsonl
from side_effects import parse_method
from succession import Series, series
from transfer import consistent, following, given_to, needs_focus, right, rows_of

COUNTS = [1, 10, 50, 100, 250]
METHODS = ["star", "sgd", "lora", "memit", "alphaedit"]
# what STAR learns of a model it learns of these; one goes by its focus, the other does not
WARM = [
    {"prompt": "The colour of the sky is", "completion": " green", "focus": "the sky"},
    {"prompt": "print(", "completion": "sum)"},
]
# more rows than any task has
ALL = 10**6
Row = dict[str, Any]


def said(model: nn.Module, tokenizer, rows: Sequence[Row]) -> list[torch.Tensor]:
    """Of each row which of its completion's tokens a model says, given those before."""
    encoded, engine = encode_rows(rows, tokenizer), Engine(model, MAX_BATCH_TOKENS)
    found = teacher_forced(engine, padded(encoded, model)).right
    return list(found.split([len(row.completion_ids) for row in encoded]))


@dataclass(frozen=True)
class Subject:
    """What is repaired, and what is looked at beside it.

    Attributes:
        name: Of the task, or "facts".
        rows: In the order in which they are repaired, for judging.
        before: Of each row which of its completion's tokens the unpatched model says.
        given: From a method and the numbers of rows to what it is given.
        unseen: From a model and the number of rows repaired to what it says elsewhere in the task.
    """

    name: str
    rows: list[Row]
    before: list[torch.Tensor]
    given: Callable[[Method, int, int], list[Row]]
    unseen: Callable[[nn.Module, int], dict[str, Any]]
    needs_focus: bool


def task_subject(base, tokenizer, given: argparse.Namespace, task: str) -> Subject:
    """The rows of a task that the model gets wrong, and others of it, wrong or right, that stay unseen."""
    found = few_shot_rows(given.data, task, ALL, given.demonstrations)
    # two completions of one prompt cannot both be right
    found = list({row["prompt"]: row for row in reversed(found)}.values())
    random.Random(f"{given.seed} {task}").shuffle(found)
    unseen, others = found[: given.unseen], found[given.unseen :]
    unseen_before = said(base, tokenizer, unseen)
    rows, before, most = [], [], max(given.counts)
    for row in others:
        (says,) = said(base, tokenizer, [row])
        if not says.all():
            rows.append(row)
            before.append(says)
        if len(rows) == most:
            break
    if len(rows) < most:
        raise SystemExit(f"The model gets {len(rows)} rows of {task} wrong; ask for no more of them (--counts).")

    def look(model: nn.Module, count: int) -> dict[str, Any]:
        was, now = torch.cat(unseen_before), torch.cat(said(model, tokenizer, unseen))
        return {
            "tokens": len(was),
            "right_before": int(was.sum()),
            "right": int(now.sum()),
            "broken": int((was & ~now).sum()),
        }

    return Subject(task, rows, before, lambda method, first, last: rows[first:last], look, False)


def facts_subject(base, tokenizer, given: argparse.Namespace) -> Subject:
    """The first facts of a file, their rephrased prompts and their neighbours."""
    facts = consistent(read_jsonl(given.facts))[: max(given.counts)]
    if len(facts) < max(given.counts):
        raise SystemExit(f"{given.facts} holds {len(facts)} facts; ask for no more of them (--counts).")

    def neighbours(model: nn.Module, count: int) -> list[int]:
        """What is said of each fact's neighbour."""
        prompts = [fact["locality_prompt"] for fact in facts[:count]]
        return [int(following(model, tokenizer, prompt).argmax()) for prompt in prompts]

    neighbours_before = neighbours(base, len(facts))

    def look(model: nn.Module, count: int) -> dict[str, Any]:
        return {
            "rephrased": sum(right(model, tokenizer, rows_of(facts[:count], "rephrase_prompt"))),
            "neighbours": sum(map(int.__eq__, neighbours_before, neighbours(model, count))),
        }

    rows = rows_of(facts)
    before = said(base, tokenizer, rows)
    return Subject(FACTS, rows, before, lambda method, a, b: given_to(method, facts[a:b], True), look, True)


class Study:
    """The unpatched model, what it says without a patch, and how a patch is measured."""

    def __init__(self, base: nn.Module, tokenizer, given: argparse.Namespace, state: dict[str, Any]):
        self.base, self.tokenizer, self.given, self.state = base, tokenizer, given, state
        self.texts = {
            "prose": TextProbe(base, tokenizer, UNRELATED.read_text(encoding="utf-8"), 256),
            "code": TextProbe(base, tokenizer, inspect.getsource(heapq), 256),
        }
        self.own = OwnTextsProbe(base, tokenizer)
        self.warm: set[str] = set()

    def measure(self, subject: Subject, model: nn.Module, count: int, held: Sequence[bool]) -> Record:
        """What there is to say of a patch of the first rows; `held`: of each earlier one, whether it was right after
        its own batch."""
        now = said(model, self.tokenizer, subject.rows[:count])
        rows_right = [bool(row.all()) for row in now]
        was, is_now = torch.cat(subject.before[:count]), torch.cat(now)
        return {
            "failures": int((~was).sum()),
            "solved": int((~was & is_now).sum()),
            "right": int(was.sum()),
            "broken": int((was & ~is_now).sum()),
            "rows_right": sum(rows_right),
            "earlier": sum(held),
            "earlier_right": sum(was_held and still for was_held, still in zip(held, rows_right)),
            "held": [*held, *rows_right[len(held) :]],
            "unseen": subject.unseen(model, count),
            "own_texts": self.own(model).to_dict(),
            "texts": {name: probe(model).to_dict() for name, probe in self.texts.items()},
        }

    def store(self, key: str, record: Record) -> None:
        self.state["results"][key] = record
        write_json(self.given.json, self.state)

    def patch(self, method: Method, kept: Path | None = None):
        """A patch to be repaired again and again, of a model that STAR knows already."""
        if isinstance(method, Star) and method.name not in self.warm:
            self.warm.add(method.name)
            with series(method, self.base, self.tokenizer, margin=self.given.margin) as patch:
                patch.add(WARM)
        return series(method, self.base, self.tokenizer, margin=self.given.margin, kept=kept)

    def add(self, patch: Series, subject: Subject, first: int, last: int) -> Record:
        """Repair some more rows; returns what that took."""
        rows, start = subject.given(patch.method, first, last), time.process_time()
        details = patch.add(rows)
        return {"cpu_seconds": time.process_time() - start, "details": details}

    def at_once(self, subject: Subject, name: str, method: Method, count: int, advance) -> None:
        key = f"{subject.name}, {name}, {AT_ONCE}, {count}"
        if key not in self.state["results"]:
            labels = {"subject": subject.name, "method": name, "way": AT_ONCE, "rows": count}
            with self.patch(method) as patch:
                took = self.add(patch, subject, 0, count)
                took |= {"cpu_seconds_total": took["cpu_seconds"], "left_out": took["details"].get("left_out", 0)}
                self.store(key, labels | took | self.measure(subject, patch.model, count, []))
        advance(key)

    def in_succession(self, subject: Subject, name: str, method: Method, ends: Sequence[int], advance) -> None:
        """One patch, measured after the batches that end with these rows."""
        step, results = self.given.step, self.state["results"]
        series_name = f"{subject.name}, {name}, {IN_SUCCESSION} by {step}"
        labels = {"subject": subject.name, "method": name, "way": IN_SUCCESSION, "step": step}
        keys = {end: f"{series_name}, {end}" for end in ends}
        missing = [end for end in ends if keys[end] not in results]
        for end in ends:
            if end not in missing:
                advance(keys[end])
        if not missing:
            return
        folder = self.given.states / re.sub(r"[^a-z0-9.]+", "-", series_name.lower())
        start, kept = self._kept(folder, keys, missing[0])
        held: list[bool] = list(results[keys[start]]["held"]) if start else []
        total = results[keys[start]]["cpu_seconds_total"] if start else 0.0
        left_out = results[keys[start]]["left_out"] if start else 0
        with self.patch(method, kept) as patch:
            for end in [end for end in ends if end > start]:
                took = self.add(patch, subject, start, end)
                total += took["cpu_seconds"]
                left_out += took["details"].get("left_out", 0)
                took |= {"cpu_seconds_total": total, "left_out": left_out}
                if keys[end] not in results:
                    record = self.measure(subject, patch.model, end, held)
                    # the state first: a point that is in the file can be gone on from
                    with new_directory(folder / str(end)) as directory:
                        patch.save(directory)
                    self.store(keys[end], {**labels, "rows": end, **took, **record})
                    self._drop(folder, end)
                    advance(keys[end])
                held = list(results[keys[end]]["held"])
                start = end

    def _kept(self, folder: Path, keys: Mapping[int, str], before: int) -> tuple[int, Path | None]:
        """The last finished batch whose patch is kept: how many rows it ends with, and where."""
        ends = [end for end in keys if end < before and (folder / str(end)).is_dir()]
        return (max(ends), folder / str(max(ends))) if ends else (0, None)

    def _drop(self, folder: Path, last: int) -> None:
        """Remove the states before the last, which a series goes on from."""
        for item in folder.iterdir():
            if item.name.isdigit() and int(item.name) < last:
                for file in item.iterdir():
                    file.unlink()
                item.rmdir()


def run(study: Study, subjects: Sequence[Subject], methods: Mapping[str, Method]) -> None:
    """Measure what is missing, small patches first, then each series."""
    counts, step = sorted(set(study.given.counts)), study.given.step
    ends = list(range(step, max(counts) + 1, step)) if step else []
    pairs = [
        (subject, name, method)
        for subject in subjects
        for name, method in methods.items()
        if subject.needs_focus or not needs_focus(method)
    ]
    at_once = counts if study.given.at_once else []
    with tqdm(total=len(pairs) * (len(at_once) + len(ends)), desc="points") as bar:

        def advance(key: str) -> None:
            bar.set_postfix_str(key)
            bar.update()

        for count in at_once:
            for subject, name, method in pairs:
                study.at_once(subject, name, method, count, advance)
        for subject, name, method in pairs:
            study.in_succession(subject, name, method, ends, advance)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="Hub id, directory or .gguf file")
    options.add_argument("--json", type=Path, required=True, help="results; an existing file is gone on with")
    options.add_argument("--methods", nargs="+", default=METHODS, help="name or name:setting=value,...")
    options.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="rows of a patch")
    options.add_argument("--step", type=int, default=10, help="rows of a batch in succession; 0: at once only")
    options.add_argument("--at-once", action=argparse.BooleanOptionalAction, default=True, help="patches at once, too")
    options.add_argument("--data", type=Path, help="folder with the tasks' folders")
    options.add_argument("--tasks", nargs="*", default=[], choices=TASKS)
    options.add_argument("--facts", type=Path, help="facts, one a line, as in transfer.py")
    options.add_argument("--unseen", type=int, default=40, help="rows of a task that nothing repairs")
    options.add_argument("--demonstrations", type=int, default=3)
    options.add_argument("--margin", type=float, default=0.01)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--states", type=Path, help="where patches in succession are kept; default: beside the JSON")
    options.add_argument("--plot", help="draw here: PLOT-tldr.png, PLOT-facts.png")
    given = options.parse_args()
    given.states = given.states or given.json.with_suffix(".states")
    if given.tasks and given.data is None:
        options.error("--tasks need --data, the folder with the tasks' folders.")
    if not given.tasks and given.facts is None:
        options.error("There is nothing to repair; give --tasks with --data, or --facts.")
    if min(given.counts) < 1 or given.step < 0 or given.unseen < 1:
        options.error("--counts and --unseen begin at 1, --step at 0.")
    if not given.at_once and not given.step:
        options.error(
            "Neither at once nor in succession nothing is repaired; give a --step, or leave out --no-at-once."
        )
    # which points there are may change from run to run, how each is made may not
    free = ("methods", "counts", "step", "at_once", "tasks", "facts", "data", "states", "plot")
    state = resume(given.json, setting_of(given, *free))
    state["benchmark"] = "cumulative"
    methods = {name: parse_method(name) for name in given.methods}
    known = state.setdefault("methods", {})
    for name, method in methods.items():
        if known.setdefault(name, method.settings) != method.settings:
            raise SystemExit(f"{given.json} holds {name} with other settings; name another file.")
    # what is row 7 in one folder is another row in another
    for name in ("data", "facts"):
        path = getattr(given, name)
        if path is not None and state.setdefault(name, str(path)) != str(path):
            raise SystemExit(f"{given.json} holds results of {state[name]}; name another file.")
    with resumable(given.json):
        base, tokenizer = load(given)
        study = Study(base, tokenizer, given, state)
        subjects = [task_subject(base, tokenizer, given, task) for task in given.tasks]
        if given.facts is not None:
            subjects.append(facts_subject(base, tokenizer, given))
        run(study, subjects, methods)
    print(report(state))
    if given.plot:
        for name, records in lines(state):
            plot(name, records, Path(f"{given.plot}-{name}.png"))


if __name__ == "__main__":
    main()
