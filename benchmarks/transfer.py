"""Does a repair fix the problem, or only the prompt? Facts said in other words, and API changes in other contexts.

    python benchmarks/transfer.py --model MODEL --json transfer.json --facts facts.jsonl --rows 0 25 \\
        --methods star memit rome alphaedit lora logit-bias --examples 1 2 4 --plot transfer.png

Facts are CounterFact's (Meng et al. 2022), one JSON object a line with `prompt`, `subject`, `target_new`,
`rephrase_prompt` and `locality_prompt`. Each gets a patch of its own, with `--together` all of them one patch:

    rewrite    the new object right on the prompt, all tokens of it
    rephrase   the same on the rephrased prompt
    locality   the token after a neighbour's prompt (same relation, another subject) as before; and the KL there

Migrations are API changes of Python libraries, which come with the benchmarks (`data/migrations.jsonl`). Each is
repaired from its first 1, 2 or 4 `edit` rows:

    solved     failing tokens of these rows
    fixed      `related` rows (other contexts of the same change) that were wrong and are right, all tokens
    kept       `near` rows (alike, and nothing to change) that were right and still are

Three of them teach a new name rather than unlearn an old one, and have a table of their own, too. Editors, which have
to be told a subject, are run on facts only. The KL on code is on 256 tokens of Python's `heapq`; CPU seconds are
medians over patches. Every finished patch is kept in the JSON file: an interrupted run goes on from there, and so does
one with more methods, rows or examples.
"""

from __future__ import annotations

import argparse
import heapq
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from figures import drawing, label, looks, save
from harness import load, resume, run_units, setting_of
from interface import MAX_BATCH_TOKENS, Method
from methods import Star
from peft_star.engine.engine import Engine
from peft_star.engine.passes import teacher_forced
from peft_star.evaluation import TextProbe
from peft_star.failures import encode_rows
from peft_star.models.inputs import input_device
from prompts import read_jsonl
from side_effects import parse_method

MIGRATIONS = Path(__file__).parent / "data" / "migrations.jsonl"
# the base hardly ever writes the old form of these
NEW_NAMES = ("cross_validation_to_model_selection", "np_in1d_to_isin", "pydantic_dict_to_model_dump")
DEFAULT_METHODS = ["star", "memit", "rome", "alphaedit", "lora", "logit-bias"]
# methods that can do without a row's focus, and use it where there is one
TAKES_FOCUS: tuple[type[Method], ...] = (Star,)
Row = dict[str, Any]


def needs_focus(method: Method) -> bool:
    return getattr(method, "needs_focus", False)


def rows_of(facts: Sequence[Row], prompt: str = "prompt") -> list[Row]:
    return [{"prompt": fact[prompt], "completion": f" {fact['target_new']}"} for fact in facts]


def consistent(facts: Sequence[Row]) -> list[Row]:
    """The first fact of each prompt: two objects of one cannot both be said."""
    first: dict[str, Row] = {}
    for fact in facts:
        first.setdefault(fact["prompt"], fact)
    return list(first.values())


def given_to(method: Method, facts: Sequence[Row], focus: bool) -> list[Row]:
    """What a method is to repair: with the subject as `focus` only where it reads that column."""
    rows = rows_of(facts)
    if needs_focus(method) or focus and isinstance(method, TAKES_FOCUS):
        return [{**row, "focus": fact["subject"]} for row, fact in zip(rows, facts)]
    return rows


def right(model: nn.Module, tokenizer, rows: Sequence[Row]) -> list[bool]:
    """Whether all completion tokens of each row are right, given those before them."""
    engine, encoded = Engine(model, MAX_BATCH_TOKENS), encode_rows(rows, tokenizer)
    found = teacher_forced(engine, engine.batches(encoded)).right
    return [bool(part.all()) for part in found.split([len(row.completion_ids) for row in encoded])]


@torch.no_grad()
def following(model: nn.Module, tokenizer, prompt: str) -> torch.Tensor:
    """Log-probabilities (V) of the token after a prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=input_device(model))
    return model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1).cpu()


class Study:
    """The unpatched model, what it says without a patch, and how a patch is measured."""

    def __init__(self, base: nn.Module, tokenizer, *, margin: float, focus: bool):
        self.base, self.tokenizer, self.margin, self.focus = base, tokenizer, margin, focus
        self.code = TextProbe(base, tokenizer, inspect.getsource(heapq), max_tokens=256)
        self.following = cache(partial(following, base, tokenizer))
        self._right: dict[str, list[bool]] = {}

    def facts(self, method: Method, facts: Sequence[Row]) -> dict[str, Any]:
        """One patch of these facts; lists have an entry for each."""
        rows = given_to(method, facts, self.focus)
        before = [self.following(fact["locality_prompt"]) for fact in facts]
        with method.patched(self.base, self.tokenizer, rows, margin=self.margin) as outcome:
            model = outcome.model
            after = [following(model, self.tokenizer, fact["locality_prompt"]) for fact in facts]
            return {
                "rewrite": right(model, self.tokenizer, rows_of(facts)),
                "rephrase": right(model, self.tokenizer, rows_of(facts, "rephrase_prompt")),
                "locality": [int(now.argmax()) == int(was.argmax()) for now, was in zip(after, before)],
                "locality_kl": [float((was.exp() * (was - now)).sum()) for now, was in zip(after, before)],
                "code_kl": self.code(model).kl,
                "outcome": outcome.to_dict(),
            }

    def migration(self, method: Method, change: Row, examples: int) -> dict[str, Any]:
        """One patch of a change's first edit rows; `related` and `near` are pairs of rows: as wanted, and all."""
        before = {kind: self._before(change, kind) for kind in ("related", "near")}
        with method.patched(self.base, self.tokenizer, change["edit"][:examples], margin=self.margin) as outcome:
            now = {kind: right(outcome.model, self.tokenizer, change[kind]) for kind in before}
            wrong = [is_right for is_right, was_right in zip(now["related"], before["related"]) if not was_right]
            good = [is_right for is_right, was_right in zip(now["near"], before["near"]) if was_right]
            return {
                "related": [sum(wrong), len(wrong)],
                "near": [sum(good), len(good)],
                "code_kl": self.code(outcome.model).kl,
                "outcome": outcome.to_dict(),
            }

    def _before(self, change: Row, kind: str) -> list[bool]:
        key = f"{change['name']} {kind}"
        if key not in self._right:
            self._right[key] = right(self.base, self.tokenizer, change[kind])
        return self._right[key]


def units(study: Study, given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every patch that is asked for, by key; its record says which patch it is."""
    methods = {name: parse_method(name) for name in given.methods}
    first, last = given.rows or (0, None)
    facts = read_jsonl(given.facts)[first:last] if given.facts else []
    groups = [consistent(facts)] if given.together and facts else [[fact] for fact in facts]
    for number, group in enumerate(groups, start=first):
        for name, method in methods.items():
            name = f"{name}, with focus" if given.focus and isinstance(method, TAKES_FOCUS) else name
            labels = {"method": name, "facts": len(group), "first": number}
            yield _unit(labels, partial(study.facts, method, group))
    for examples in given.examples:
        for change in read_jsonl(given.migrations):
            for name, method in methods.items():
                if not needs_focus(method):
                    labels = {"method": name, "examples": examples, "change": change["name"]}
                    yield _unit(labels, partial(study.migration, method, change, examples))


def _unit(labels: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> tuple[str, Callable[[], dict[str, Any]]]:
    return ", ".join(f"{key} {value}" for key, value in labels.items()), lambda: labels | measure()


def lines(results: Mapping[str, Any], *keys: str, changes: Sequence[str] | None = None) -> dict[tuple, list[Any]]:
    """The records that have all these labels, by their values; of migrations those of some `changes`, or all."""
    found: dict[tuple, list[Any]] = {}
    for record in results.values():
        if all(key in record for key in keys) and (changes is None or record["change"] in changes):
            found.setdefault(tuple(record[key] for key in keys), []).append(record)
    return found


def cpu_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Median over patches: the first one pays for what is known of the model from then on."""
    return median(record["outcome"]["details"]["cpu_seconds"] / record.get("facts", 1) for record in records)


def kl_on_code(records: Sequence[Mapping[str, Any]]) -> float:
    return mean(record["code_kl"] for record in records)


def facts_table(results: Mapping[str, Any]) -> str:
    """A line for each method and number of facts in a patch."""
    table = [
        "| method | patches | facts in each | rewrite | rephrase | locality | KL there | KL on code | CPU s a fact |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (size, method), records in sorted(lines(results, "facts", "method").items(), key=lambda line: line[0][0]):
        rewrite, rephrase, locality, divergence = (
            mean(value for record in records for value in record[name])
            for name in ("rewrite", "rephrase", "locality", "locality_kl")
        )
        table.append(
            f"| {label(method)} | {len(records)} | {size} | {rewrite:.2f} | {rephrase:.2f} | {locality:.2f} | "
            f"{divergence:.4f} | {kl_on_code(records):.4f} | {cpu_seconds(records):.1f} |"
        )
    return "\n".join(table)


def share(records: Sequence[Mapping[str, Any]], kind: str) -> float:
    """Of all changes' rows together; NaN when there is none to fix or keep."""
    done, rows = (sum(column) for column in zip(*(record[kind] for record in records)))
    return done / rows if rows else float("nan")


def migrations_table(results: Mapping[str, Any], changes: Sequence[str] | None = None) -> str:
    """A line for each method and number of edit rows, over some changes or all."""
    table = [
        "| method | edit rows | changes | solved | related fixed | near kept | KL on code | CPU s a change |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (examples, method), records in lines(results, "examples", "method", changes=changes).items():
        solved, failures = (sum(record["outcome"][name] for record in records) for name in ("solved", "failures"))
        table.append(
            f"| {label(method)} | {examples} | {len(records)} | {solved} / {failures} | "
            f"{share(records, 'related'):.2f} | {share(records, 'near'):.2f} | {kl_on_code(records):.4f} | "
            f"{cpu_seconds(records):.1f} |"
        )
    return "\n".join(table)


def report(results: Mapping[str, Any]) -> str:
    """The tables of what there are results of."""
    parts = []
    if lines(results, "facts"):
        parts.append(f"### Facts\n\n{facts_table(results)}")
    if lines(results, "examples"):
        parts.append(f"### Migrations\n\n{migrations_table(results)}")
    if lines(results, "examples", changes=NEW_NAMES):
        parts.append(f"### Migrations that teach a new name\n\n{migrations_table(results, NEW_NAMES)}")
    return "\n\n".join(parts)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Related rows fixed against near rows kept: a point for each method and number of edit rows."""
    found = lines(results, "method", "examples")
    with drawing() as plt:
        figure, axis = plt.subplots(figsize=(7.6, 4.8))
        for method, look in looks(list(dict.fromkeys(method for method, _ in found))).items():
            points = sorted(
                (examples, share(records, "near"), share(records, "related"))
                for (name, examples), records in found.items()
                if name == method
            )
            axis.plot([kept for _, kept, _ in points], [fixed for *_, fixed in points], **look.keywords, linewidth=0.8)
            for examples, *place in points:
                axis.annotate(str(examples), place, (4, 4), textcoords="offset points", fontsize=8, color=look.color)
        axis.set_xlabel("near rows kept")
        axis.set_ylabel("related rows fixed")
        axis.set_title("API changes, repaired from as many examples as the numbers say")
        figure.legend(loc="outside right upper")
        save(figure, path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="Hub id, directory or .gguf file")
    options.add_argument("--json", type=Path, required=True, help="results; an existing file is gone on with")
    options.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, help="name or name:setting=value,...")
    options.add_argument("--facts", type=Path, help="facts, one a line; left out: migrations only")
    options.add_argument("--rows", type=int, nargs=2, metavar=("START", "STOP"), help="of the facts (default: all)")
    options.add_argument("--together", action="store_true", help="all facts in one patch")
    options.add_argument(
        "--focus",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="name the subject also to methods that can do without it",
    )
    options.add_argument("--migrations", type=Path, default=MIGRATIONS, help="API changes, one a line")
    options.add_argument("--examples", type=int, nargs="*", default=[1, 2, 4], help="edit rows; none: facts only")
    options.add_argument("--margin", type=float, default=0.01)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--plot", type=Path, help="draw the migrations here")
    given = options.parse_args()
    # which patches there are may change from run to run, how each is made may not
    free = ("methods", "facts", "rows", "together", "focus", "migrations", "examples", "plot")
    state = resume(given.json, setting_of(given, *free))
    known = state.setdefault("methods", {})
    for name in given.methods:
        settings = parse_method(name).settings
        if known.setdefault(name, settings) != settings:
            raise SystemExit(f"{given.json} holds {name} with other settings; name another file.")
    # what is a fact's number in one file is another fact in another
    if given.facts and state.setdefault("facts", str(given.facts)) != str(given.facts):
        raise SystemExit(f"{given.json} holds results of {state['facts']}; name another file.")
    base, tokenizer = load(given)
    study = Study(base, tokenizer, margin=given.margin, focus=given.focus)
    finished = run_units(units(study, given), state, given.json)
    print(report(state["results"]))
    if given.plot is not None and lines(state["results"], "examples"):
        plot(state["results"], given.plot)
    if not finished:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
