"""Side effects of one repair: generalization, specificity, and harm to text that nobody repaired (paper Table 5).

    python benchmarks/side_effects.py --model MODEL --data DIR --rows 100 --cases 40 \\
        --json side_effects.json --plot side_effects

A case repairs one failure. Nine related failures, of other rows and with the same expected token, say how the repair
generalizes; 14 unrelated ones, with other expected tokens, how specific it is (paper sections 4 and 4.3). These are
failures themselves, so that they do not show harm to what was right: that is measured on prose (the Apache licence)
and on code (completions of CoNaLa's retrieval split, one a line), 600 tokens each.

Each method is run at several strengths, always on the unpatched model: it goes on until the expected token's
probability is ahead of every other by the margin, or its steps run out; the share of cases in which it got there is in
the table. The margin is every method's stopping rule, so each has a curve.

A method may be given with settings of its own: `--methods star star:max_steps=40,num_neurons=16 sgd`.

The few-shot prompts' failures are searched for first, one forward pass a row. What was found and every finished
(case, method, margin) is kept in the JSON file: an interrupted run goes on from there, and so does one with more
cases, methods or margins.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from figures import bootstrap, drawing, label, looks, offsets, save, with_interval
from harness import UNRELATED as PROSE
from harness import load, parser, resumable, resume, setting_of, task_rows, write_json
from interface import MAX_BATCH_TOKENS, Method
from methods import METHODS, make_method
from peft_star.engine.engine import Engine
from peft_star.engine.passes import teacher_forced
from peft_star.evaluation import Gaps, TextProbe, gaps, side_effects
from peft_star.failures import Row, encode_rows
from prompts import read_jsonl

RELATED, UNRELATED = 9, 14
PROBE_TOKENS = 600
DEFAULT_METHODS = ["star", "star-paper", "star-layer", "star-neuron", "mint", "sgd", "lora", "logit-bias"]
MARGINS = [0.01, 0.3, 0.6, 0.9, 0.95]
KAPPAS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Failure:
    """One failing token: the task and number of its row, the medium token's position, and the expected token."""

    task: str
    row: int
    position: int
    expected: int

    @property
    def source(self) -> tuple[str, int]:
        return self.task, self.row


@dataclass(frozen=True)
class Case:
    """One repair and what its side effects are measured on; all of different rows."""

    repaired: Failure
    related: tuple[Failure, ...]
    unrelated: tuple[Failure, ...]


class Corpus:
    """The tokenised rows of the tasks, and their failures as rows of one completion token."""

    def __init__(self, tokenizer, rows: dict[str, list[dict[str, str]]]):
        self.tokenizer = tokenizer
        self.rows = {task: encode_rows(items, tokenizer) for task, items in rows.items()}
        # what the tokenizer puts before every text
        self.opening = len([token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id])

    def row(self, failure: Failure, index: int) -> Row:
        """The text up to the failing token as the prompt, the expected token as the completion."""
        ids = self.rows[failure.task][failure.row].input_ids[: failure.position + 1]
        return Row(index, self._text(ids[self.opening :]), self._text([failure.expected]), ids, (failure.expected,))

    def repairable(self, failure: Failure) -> dict[str, str] | None:
        """The same as text for a method; None when tokenising that again gives other tokens."""
        row = self.row(failure, 0)
        text = {"prompt": row.prompt, "completion": row.completion}
        if not all(text.values()):
            return None
        (again,) = encode_rows([text], self.tokenizer)
        return text if (again.prompt_ids, again.completion_ids) == (row.prompt_ids, row.completion_ids) else None

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def scan(base, corpus: Corpus, found: dict[str, list[list[int]]], store) -> list[Failure]:
    """Every failure of the rows. `found` holds [row, position, expected token] by task, and gets what it lacks."""
    engine = Engine(base, MAX_BATCH_TOKENS)
    for task, items in corpus.rows.items():
        if task in found:
            continue
        failing = []
        for row in tqdm(items, desc=f"failures of {task}"):
            predictions = teacher_forced(engine, engine.batches([row]))
            for position, right in zip(row.medium_positions, predictions.right.tolist()):
                if not right:
                    failing.append([row.index, position, row.input_ids[position + 1]])
        found[task] = failing
        store()
    return [Failure(task, *numbers) for task in corpus.rows for numbers in found[task]]


def draw_cases(failures: Sequence[Failure], repairable, seed: int) -> Iterator[Case]:
    """Cases without end of the data: a first one of every group of failures, then a second one of each, and so on.

    A group is the failures with one expected token, one of each row, in at least 10 rows. The n-th case is the same
    however many are drawn.

    Args:
        failures: All failures.
        repairable: From a failure to whether it can be repaired.
        seed: Of the order and of the choice.
    """
    groups: dict[int, list[Failure]] = {}
    for failure in random.Random(f"{seed}").sample(failures, len(failures)):
        group = groups.setdefault(failure.expected, [])
        if all(other.source != failure.source for other in group):
            group.append(failure)
    groups = {token: group for token, group in groups.items() if len(group) > RELATED}
    order = random.Random(f"{seed} groups").sample(sorted(groups), len(groups))
    sources = {token: (failure for failure in groups[token] if repairable(failure)) for token in order}
    while sources:
        for token in list(sources):
            repaired = next(sources[token], None)
            if repaired is None:
                del sources[token]
                continue
            shuffle = random.Random(f"{seed} {repaired}")
            related = shuffle.sample([other for other in groups[token] if other != repaired], RELATED)
            unrelated = _unrelated(failures, {failure.source for failure in (repaired, *related)}, token, shuffle)
            if len(unrelated) == UNRELATED:
                yield Case(repaired, tuple(related), tuple(unrelated))


def _unrelated(failures: Sequence[Failure], taken: set, token: int, shuffle: random.Random) -> list[Failure]:
    """Failures of rows that are not taken, with other expected tokens: as many different ones as there are."""
    others = [failure for failure in failures if failure.expected != token and failure.source not in taken]
    shuffle.shuffle(others)
    chosen: list[Failure] = []
    for distinct in (True, False):
        tokens, rows = {failure.expected for failure in chosen}, {failure.source for failure in chosen}
        for failure in others:
            if (
                len(chosen) < UNRELATED
                and failure.source not in rows
                and not (distinct and failure.expected in tokens)
            ):
                chosen.append(failure)
                tokens.add(failure.expected)
                rows.add(failure.source)
    return chosen


def probes(base, tokenizer, data: Path, tokens: int) -> dict[str, TextProbe]:
    """Text that has nothing to do with a repair: prose and code."""
    lines = [row["completion"] for row in read_jsonl(data / "conala" / "retrieval.jsonl")]
    # spread over the file, whose neighbours are variants of one another
    code = "\n".join(lines[:: max(1, len(lines) // tokens)])
    return {
        "prose": TextProbe(base, tokenizer, PROSE.read_text(encoding="utf-8"), tokens),
        "code": TextProbe(base, tokenizer, code, tokens),
    }


def measure(
    base, tokenizer, method: Method, margin: float, row: dict[str, str], rows: list[Row], before: Gaps, texts
) -> dict[str, Any]:
    """One repair by one method: what it solved and took, its side effects, and the harm it does."""
    with method.patched(base, tokenizer, [row], margin=margin) as outcome:
        after = gaps(outcome.model, tokenizer, rows, before=before)
        effects = side_effects(before, after, range(RELATED), range(RELATED, len(rows)))
        harm = {name: probe(outcome.model).to_dict() for name, probe in texts.items()}
        return {**outcome.to_dict(), "effects": effects.to_dict(), "harm": harm}


def run(base, tokenizer, corpus: Corpus, given: argparse.Namespace, state: dict[str, Any]) -> None:
    """Fill `state` with what is missing, saving after each repair; case by case, so that all curves grow together."""

    def store() -> None:
        write_json(given.json, state)

    failures = scan(base, corpus, state["failures"], store)
    drawn = draw_cases(failures, lambda failure: corpus.repairable(failure) is not None, given.seed)
    cases = list(itertools.islice(drawn, given.cases))
    if not cases:
        raise SystemExit(
            f"No expected token fails in {RELATED + 1} of these rows with {UNRELATED} other failures beside it; "
            "search more rows (--rows) or tasks (--tasks)."
        )
    if len(cases) < given.cases:
        print(f"These rows have {len(cases)} cases; search more of them (--rows) for {given.cases}.")
    state["cases"] = [
        {"expected": tokenizer.decode([case.repaired.expected]), "repaired": vars(case.repaired)} for case in cases
    ]
    made = {name: parse_method(name) for name in given.methods}
    texts = probes(base, tokenizer, given.data, PROBE_TOKENS)
    results = state["results"]
    with tqdm(total=len(cases) * len(made) * len(given.margins), desc="repairs") as bar:
        for number, case in enumerate(cases):
            rows = [corpus.row(failure, index) for index, failure in enumerate((*case.related, *case.unrelated))]
            before = None
            for name, method in made.items():
                for margin in given.margins:
                    done = results.setdefault(name, {}).setdefault(f"{margin:g}", {})
                    if str(number) not in done:
                        bar.set_postfix_str(f"case {number}, {name}, margin {margin:g}")
                        before = before or gaps(base, tokenizer, rows)
                        row = corpus.repairable(case.repaired)
                        done[str(number)] = measure(base, tokenizer, method, margin, row, rows, before, texts)
                        store()
                    bar.update()


def parse_method(text: str) -> Method:
    """A method from `name` or `name:setting=value,setting=value`.

    Raises:
        ValueError: There is no such method or setting.
    """
    name, _, rest = text.partition(":")
    settings = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: {item!r} is no setting; write name:setting=value,setting=value.")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return make_method(name, **settings)


def _harmonic(g: float, s: float) -> float:
    return 2 * g * s / (g + s) if g + s > 0 else 0.0


# columns of the table that figures and intervals are computed from, one row a case
COLUMNS = (
    *("g", "g2", "u", "u2", "signed", "fixed", "failing", "solved", "reached", "seconds"),
    *(f"{text}_{name}" for text in ("prose", "code") for name in ("kl", "log_ppl", "broken", "right")),
)


def _columns(record: dict[str, Any]) -> list[float]:
    effects, row = record["effects"], []
    row += [effects["g_mae"], effects["g_rmse"] ** 2, 1 - effects["s_mae"], (1 - effects["s_rmse"]) ** 2]
    row += [effects["signed_g"], effects["related_fixed"], effects["related_failing"]]
    row += [record["solved"], record["details"]["solved_by_margin"], record["seconds"]]
    for text in ("prose", "code"):
        harm = record["harm"][text]
        row += [harm["kl"], math.log(harm["perplexity_ratio"]), harm["broken"], harm["right_before"]]
    return row


def _share(part: str, whole: str):
    return lambda t: t[part].sum() / t[whole].sum() if t[whole].sum() else 0.0


MEASURES = {
    "g_mae": lambda t: t["g"].mean(),
    "s_mae": lambda t: 1 - t["u"].mean(),
    "gsh_mae": lambda t: _harmonic(t["g"].mean(), 1 - t["u"].mean()),
    "g_rmse": lambda t: math.sqrt(t["g2"].mean()),
    "s_rmse": lambda t: 1 - math.sqrt(t["u2"].mean()),
    "gsh_rmse": lambda t: _harmonic(math.sqrt(t["g2"].mean()), 1 - math.sqrt(t["u2"].mean())),
    "signed_g": lambda t: t["signed"].mean(),
    "related_fixed": _share("fixed", "failing"),
    "solved": lambda t: t["solved"].mean(),
    "reached": lambda t: t["reached"].mean(),
    "seconds": lambda t: float(np.median(t["seconds"])),
    "kappa": lambda t: t["code_kl"].mean() / t["g"].mean() ** 2 if t["g"].any() else math.nan,
    "prose_kl": lambda t: t["prose_kl"].mean(),
    "prose_perplexity": lambda t: math.exp(t["prose_log_ppl"].mean()),
    "prose_broken": _share("prose_broken", "prose_right"),
    "code_kl": lambda t: t["code_kl"].mean(),
    "code_perplexity": lambda t: math.exp(t["code_log_ppl"].mean()),
    "code_broken": _share("code_broken", "code_right"),
}


def point(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one method at one margin over its cases, each with its interval (`*_interval`).

    G, S and their RMSE are over all positions of all cases; the perplexity ratio is the geometric mean.
    """
    cases = np.array([_columns(record) for record in records], dtype=float)
    result: dict[str, Any] = {"cases": len(records)}
    for name, statistic in MEASURES.items():

        def over(array: np.ndarray, statistic=statistic) -> float:
            return float(statistic(dict(zip(COLUMNS, array.T))))

        result[name], result[f"{name}_interval"] = over(cases), bootstrap(cases, over)
    return result


def curves(state: dict[str, Any]) -> dict[str, dict[float, dict[str, Any]]]:
    """The figures by method and margin, each margin over its finished cases."""
    return {
        method: {
            float(margin): point(list(records.values()))
            for margin, records in sorted(margins.items(), key=lambda item: float(item[0]))
            if records
        }
        for method, margins in state["results"].items()
        if any(margins.values())
    }


def table(state: dict[str, Any]) -> str:
    """Generalization and specificity, then harm, as two Markdown tables."""
    points = curves(state)
    cases = max((item["cases"] for line in points.values() for item in line.values()), default=0)
    tokens = len({case["expected"] for case in state.get("cases", ())})
    effects = [
        f"{cases} repairs of one failure each, of {tokens} expected tokens; {RELATED} related and {UNRELATED} "
        "unrelated failures beside each. In brackets: 95% bootstrap intervals over the repairs.",
        "",
        "| method | margin | solved (margin reached) | G, MAE | S, MAE | GSH, MAE | G, S, GSH, RMSE | signed G | "
        "related fixed | s a repair |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    harm = [
        "| method | margin | κ = KL on code / G² | prose: KL | perplexity | right tokens broken | code: KL | "
        "perplexity | right tokens broken |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, line in points.items():
        for margin, p in line.items():
            name = f"| {label(method)} | {margin:g} |"
            effects.append(
                f"{name} {p['solved']:.0%} ({p['reached']:.0%}) | {with_interval(p, 'g_mae', '.3f')} | "
                f"{with_interval(p, 's_mae', '.3f')} | {with_interval(p, 'gsh_mae', '.3f')} | "
                f"{p['g_rmse']:.3f}, {p['s_rmse']:.3f}, {p['gsh_rmse']:.3f} | {p['signed_g']:+.3f} | "
                f"{with_interval(p, 'related_fixed', '.0%')} | {p['seconds']:.2f} |"
            )
            harm.append(
                f"{name} {with_interval(p, 'kappa', '.2f')} | {p['prose_kl']:.4f} | x{p['prose_perplexity']:.2f} | "
                f"{p['prose_broken']:.1%} | {with_interval(p, 'code_kl', '.4f')} | x{p['code_perplexity']:.2f} | "
                f"{p['code_broken']:.1%} |"
            )
    return "\n".join([*effects, "", *harm])


def _errorbars(axis, line: dict[float, dict[str, Any]], x: str, y: str, look) -> None:
    values = {name: [p[name] for p in line.values()] for name in (x, y)}
    spread = {name: offsets([p[f"{name}_interval"] for p in line.values()], values[name]) for name in (x, y)}
    bars = {"yerr": spread[y], "xerr": spread[x], "fmt": "none", "ecolor": look.color}
    axis.errorbar(values[x], values[y], **bars, elinewidth=0.8, alpha=0.35, capsize=0)
    axis.plot(values[x], values[y], **look.keywords)


def plot_trade_off(state: dict[str, Any], path: Path) -> None:
    """G against S, with lines of equal GSH."""
    points = curves(state)
    with drawing() as plt:
        figure, axis = plt.subplots(figsize=(8.6, 5.4))
        style = looks(list(points))
        for method, line in points.items():
            _errorbars(axis, line, "s_mae", "g_mae", style[method])
        low = min(0.9, *(p["s_mae_interval"][0] for line in points.values() for p in line.values()))
        top = 1.08 * max(0.1, *(p["g_mae_interval"][1] for line in points.values() for p in line.values()))
        if not math.isfinite(low + top):  # a single case has no intervals
            low, top = axis.get_xlim()[0], axis.get_ylim()[1]
        axis.set_xlim(low - 0.03 * (1 - low), 1 + 0.1 * (1 - low))
        axis.set_ylim(0, top)
        specificity = np.linspace(axis.get_xlim()[0], 1, 200)
        for score in np.arange(0.1, 1, 0.1):
            with np.errstate(divide="ignore"):
                generalization = np.where(
                    specificity > score / 2, score * specificity / (2 * specificity - score), np.nan
                )
            axis.plot(specificity, generalization, color="#999999", linewidth=0.7, linestyle=":", zorder=0)
            if 0 < generalization[-1] < top:
                axis.annotate(f"GSH {score:.1f}", (1, generalization[-1]), (3, 0), textcoords="offset points",
                              fontsize=8, color="#666666", va="center", annotation_clip=False)  # fmt: skip
        axis.set_xlabel("specificity S = 1 − mean |change of the gap| on unrelated failures")
        axis.set_ylabel("generalization G = mean |change of the gap|\non related failures")
        figure.legend(loc="outside right upper")
        save(figure, path)


def plot_harm(state: dict[str, Any], path: Path) -> None:
    """Signed G against the KL divergence on code, with lines of equal kappa."""
    points = curves(state)
    floor = 1e-6
    with drawing() as plt:
        figure, axis = plt.subplots(figsize=(8.6, 5.4))
        style = looks(list(points))
        for method, line in points.items():
            # a patch that changes nothing has no place on a logarithmic axis
            seen = {margin: p for margin, p in line.items() if p["code_kl"] > floor}
            if seen:
                _errorbars(axis, seen, "signed_g", "code_kl", style[method])
        axis.set_yscale("log")
        left, right = min(0.0, axis.get_xlim()[0]), axis.get_xlim()[1]
        bottom, top = axis.get_ylim()
        generalization = np.linspace(1e-3, right, 300)
        for kappa in KAPPAS:
            divergence = kappa * generalization**2
            axis.plot(generalization, divergence, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
            inside = np.flatnonzero((divergence > bottom) & (divergence < top))
            if inside.size:
                # where the line leaves the picture, at the right or at the top
                last = inside[-1]
                place = {"xytext": (3, 0), "va": "center"} if last == 299 else {"xytext": (0, 2), "ha": "center"}
                axis.annotate(f"κ = {kappa:g}", (generalization[last], divergence[last]), textcoords="offset points",
                              fontsize=8, color="#666666", annotation_clip=False, **place)  # fmt: skip
        axis.set_xlim(left, right)
        axis.set_ylim(bottom, top)
        axis.set_xlabel("signed G = mean change of the gap on related failures")
        axis.set_ylabel("KL divergence on code, nats a token")
        figure.legend(loc="outside right upper")
        save(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(rows=100)
    options.add_argument("--cases", type=int, default=20, help="repairs a method and margin")
    options.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, help=f"of {', '.join(METHODS)}")
    options.add_argument("--margins", type=float, nargs="+", default=MARGINS, help="strengths: probability margins")
    options.add_argument("--device", help="cpu (default), cuda, ...")
    options.add_argument("--plot", type=Path, help="draw PREFIX-trade-off.png and PREFIX-harm.png")
    given = options.parse_args()
    try:
        # through JSON, as they come back from a file
        used = json.loads(json.dumps({name: parse_method(name).settings for name in given.methods}))
    except ValueError as error:
        options.error(str(error))
    if not all(0 <= margin < 1 for margin in given.margins):
        options.error("--margins are probability margins; give numbers of at least 0 and below 1.")
    setting = setting_of(given, "data", "cases", "methods", "margins", "plot", "device")
    state = {"benchmark": "side_effects", "methods": {}, "failures": {}, "cases": []} | resume(given.json, setting)
    changed = [name for name in used if state["methods"].get(name, used[name]) != used[name]]
    if changed:
        raise SystemExit(f"{given.json} holds {changed[0]} with other settings; name another file.")
    state["methods"] |= used
    base, tokenizer = load(given)
    with resumable(given.json):
        run(base, tokenizer, Corpus(tokenizer, task_rows(given)), given, state)
    print(table(state))
    if given.plot is not None:
        plot_trade_off(state, given.plot.with_name(f"{given.plot.name}-trade-off.png"))
        plot_harm(state, given.plot.with_name(f"{given.plot.name}-harm.png"))


if __name__ == "__main__":
    main()
