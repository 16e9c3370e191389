"""One page with all results: tables and pictures of every benchmark's JSON file, beside the paper's published figures.

    python benchmarks/report.py --folder results --out docs/results.md

Reads the files of the benchmarks in `SECTIONS`; any may be missing, and several models get a section each. A file says
itself which benchmark wrote it, or its name begins with the benchmark's. Pictures go into a folder beside the page.
What stands between the two marks of the reading is written by hand and kept when the page is made again.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cumulative_report
import effectiveness
import paper_figures
import side_effects
import sparsity
import speed_report
import trajectory
from figures import label
from interface import MODES
from methods import make_method

BEGIN = "<!-- reading: written by hand, kept when this page is made again -->"
END = "<!-- end of the reading -->"
NOT_RUN = "<!-- not run: needs the paper's data sets, and hours -->"  # by the tests of the documentation

State = dict[str, Any]


class Pictures:
    """Draws into a folder beside the page, and gives the Markdown that shows it."""

    def __init__(self, page: Path, prefix: str):
        self.folder, self.prefix = page.with_suffix(""), prefix

    def __call__(self, name: str, description: str, draw: Callable[[Path], None]) -> str:
        file = self.folder / f"{self.prefix}-{name}.png"
        draw(file)
        return f"![{description}]({self.folder.name}/{file.name})"


def _effectiveness(state: State, pictures: Pictures) -> str:
    methods = {name: make_method(name) for name in state["methods"]}
    for name, method in methods.items():
        method.settings = state["methods"][name]  # as measured, whatever the defaults are by now
    modes = [mode for mode in MODES if any(key.startswith(f"{mode}/") for key in state["results"])]
    text = effectiveness.report(state, methods, modes, state["setting"]["tasks"])
    return re.sub(r"^### ", "#### ", text, flags=re.MULTILINE)


def _side_effects(state: State, pictures: Pictures) -> str:
    trade_off = pictures(
        "trade-off", "Generalization against specificity", lambda path: side_effects.plot_trade_off(state, path)
    )
    harm = pictures("harm", "Generalization against harm", lambda path: side_effects.plot_harm(state, path))
    settings = [
        f"- {label(name)}: {', '.join(f'{key} {value}' for key, value in found.items())}."
        for name, found in state["methods"].items()
    ]
    return "\n\n".join([side_effects.table(state), trade_off, harm, "\n".join(settings)])


def _sparsity(state: State, pictures: Pictures) -> str:
    drawn = pictures("sparsity", "Failing tokens solved by sparsity", lambda path: sparsity.plot(state, path))
    return f"{drawn}\n\n{sparsity.table(state)}"


def _trajectory(state: State, pictures: Pictures) -> str:
    drawn = pictures("trajectory", "Paths over the loss surface", lambda path: trajectory.plot(state, path))
    return f"{drawn}\n\n{trajectory.table(state)}"


def _speed(state: State, pictures: Pictures) -> str:
    drawn = [pictures("speed", "Seconds of each method by row", lambda path: speed_report.plot_methods(state, path))]
    if speed_report.metered(state):
        drawn.append(
            pictures("phases", "Phases of a repair by row", lambda path: speed_report.plot_phases(state, path))
        )
    return "\n\n".join([*drawn, speed_report.report(state)])


def _cumulative(state: State, pictures: Pictures) -> str:
    parts = []
    for name, records in cumulative_report.lines(state):
        drawn = pictures(
            f"cumulative-{name}",
            f"What is solved, and what it costs, by rows repaired: {name}",
            lambda path, name=name, records=records: cumulative_report.plot(name, records, path),
        )
        parts.append(f"#### {name}\n\n{cumulative_report.table(name, records)}\n\n{drawn}")
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Section:
    """One benchmark's part of the page.

    Attributes:
        title: Its heading.
        render: From a state and [`Pictures`] to Markdown.
        options: From a state to options of the command that its setting does not hold; several: of as many commands.
        published: The paper's tables, with their headings.
    """

    title: str
    render: Callable[[State, Pictures], str]
    options: Callable[[State], dict[str, Any] | list[dict[str, Any]]] = lambda state: {}
    published: tuple[tuple[str, Callable[[], str]], ...] = ()


def _sparsity_options(state: State) -> dict[str, Any]:
    tasks = [name.rpartition("-")[0] for name in state["scan"]]
    figures = sorted({int(key.split()[1]) for key in state["results"]})
    rows = max((tasks.count(task) for task in tasks), default=0)
    return {"tasks": list(dict.fromkeys(tasks)), "rows": rows, "figures": figures}


def _side_effects_options(state: State) -> dict[str, Any]:
    margins = sorted({float(margin) for found in state["results"].values() for margin in found})
    return {"cases": len(state["cases"]), "methods": list(state["results"]), "margins": margins}


def _speed_options(state: State) -> dict[str, Any]:
    keys = [key.rsplit("/", 3)[1:] for key in state["results"]]
    mint = [int(number) for number, name, _ in keys if name == "mint"]
    options = {"repeats": 1 + max(int(repeat) for *_, repeat in keys), "mint_rows": 1 + max(mint) if mint else None}
    settings = {name: json.dumps(state["setting"][name]) for name in ("config", "arguments") if state["setting"][name]}
    return {"methods": list(state["methods"]), **options, **settings}


def _cumulative_options(state: State) -> list[dict[str, Any]]:
    """A command for each subject: they are of other methods and numbers of rows."""
    commands = []
    for name, records in cumulative_report.lines(state):
        once = [record["rows"] for record in records if record["way"] == cumulative_report.AT_ONCE]
        steps = sorted({record["step"] for record in records if "step" in record})
        # an option that is no option of this subject is left out
        of_facts = {"facts": "facts.jsonl", "data": None, "demonstrations": None, "unseen": None}
        options = of_facts if name == cumulative_report.FACTS else {"tasks": [name]}
        options |= {
            "methods": list(dict.fromkeys(record["method"] for record in records)),
            "counts": sorted({*once, max(record["rows"] for record in records)}),
        }
        commands += [{**options, "step": step} for step in steps or [0]]
    return commands


SECTIONS: dict[str, Section] = {
    "effectiveness": Section(
        "Effectiveness and efficiency (RQ1)",
        _effectiveness,
        lambda state: {"methods": list(state["methods"])},
        (
            ("Table 3: effectiveness", paper_figures.effectiveness_table),
            ("Table 4: seconds to solve a failure", paper_figures.seconds_table),
        ),
    ),
    "speed": Section("Speed of a repair", _speed, _speed_options),
    "sparsity": Section("Sparsity patterns (RQ2)", _sparsity, _sparsity_options),
    "side_effects": Section(
        "Side effects (RQ3)",
        _side_effects,
        _side_effects_options,
        (("Table 5: side effects", paper_figures.side_effects_table),),
    ),
    "trajectory": Section("Paths over the loss surface (paper Figure 3)", _trajectory),
    "cumulative": Section("What one patch can hold", _cumulative, _cumulative_options),
}


def read(path: Path) -> tuple[str, State]:
    """A benchmark's name and results.

    Raises:
        ValueError: The file is no benchmark's.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        kind = state.get("benchmark") or next((kind for kind in SECTIONS if path.stem.startswith(kind)), None)
        if kind not in SECTIONS or not state["results"] or "model" not in state["setting"]:
            raise KeyError(kind)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(
            f"{path} holds no results of {', '.join(SECTIONS)}; leave it out, or name it after its benchmark."
        ) from None
    return kind, state


def commands(kind: str, state: State) -> str:
    """The commands that measure the same again, one a line; the model and the data are the reader's."""
    options = SECTIONS[kind].options(state)
    found = options if isinstance(options, list) else [options]
    return "\n".join(_command(kind, {"data": "DIR", **state["setting"], **item}) for item in found)


def _command(kind: str, options: dict[str, Any]) -> str:
    words = ["python", f"benchmarks/{kind}.py", "--model", "MODEL"]
    words += ["--data", "DIR"] if options["data"] is not None else []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("model", "data") or value is None or value is True or isinstance(value, dict):
            continue
        if value is False:
            words.append(f"--no-{name.replace('_', '-')}")
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--json", f"{kind}.json"])


def conditions(state: State) -> str:
    """Machine, versions and seed in a line."""
    machine = dict(state["machine"])
    device = machine.pop("gpu", None) or machine.get("processor")
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft") if name in machine)
    return f"{device}, {machine.get('threads', '?')} thread(s); {versions}; seed {state['setting'].get('seed', 0)}."


def model_name(model: str) -> str:
    """A Hub id as it is, a path without the machine's folders."""
    return Path(model).name if Path(model).is_absolute() or model.count("/") != 1 else model


def reading(page: Path) -> str:
    """What is written by hand in the page at `page`, the marks included."""
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        if BEGIN in text and END in text:
            return text[text.index(BEGIN) : text.index(END) + len(END)]
    return f"{BEGIN}\n\n{END}"


def build(files: list[Path], page: Path, names: dict[str, str]) -> str:
    """The page's text; draws its pictures.

    Args:
        files: The benchmarks' JSON files.
        page: Where the page will be.
        names: What to call a model instead of its directory's name.
    """
    models: dict[str, dict[str, State]] = {}
    for path in files:
        kind, state = read(path)
        name = model_name(state["setting"]["model"])
        found = models.setdefault(names.get(name, name), {})
        if kind in found:
            raise ValueError(f"{path} is a second file of {kind} for {name}; leave one of them out.")
        found[kind] = state
    parts = [
        "# Results",
        "Made by `benchmarks/report.py` from what the benchmarks measured. In brackets: 95% bootstrap intervals. How "
        "each figure is measured is said at the top of its benchmark.",
        reading(page),
    ]
    for name, found in models.items():
        parts.append(f"## {name}")
        pictures = Pictures(page, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
        for kind, section in SECTIONS.items():
            if kind in found:
                state = found[kind]
                shown = f"{NOT_RUN}\n```bash\n{commands(kind, state)}\n```"
                parts += [f"### {section.title}", conditions(state), shown]
                parts.append(section.render(state, pictures))
    parts += [
        "## What the paper publishes",
        "Of other models, on Nvidia A100 GPUs; seconds are not comparable with those above, the pattern between the "
        "methods is.",
    ]
    for section in SECTIONS.values():
        for title, published in section.published:
            parts += [f"### {title}", published()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json-files", type=Path, nargs="+", default=[], help="the benchmarks' results")
    options.add_argument("--folder", type=Path, help="all .json files in and below it")
    options.add_argument("--names", nargs="+", default=[], metavar="DIRECTORY=NAME", help="what to call a model")
    options.add_argument("--out", type=Path, required=True, help="the page, .md")
    given = options.parse_args()
    files = [*given.json_files, *(sorted(given.folder.rglob("*.json")) if given.folder else [])]
    if not files:
        options.error("There are no results; give --json-files, or a --folder that holds them.")
    try:
        names = dict(item.split("=", 1) for item in given.names)
    except ValueError:
        options.error("--names are of the form DIRECTORY=NAME.")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        text = build(files, given.out, names)
    except ValueError as error:
        options.error(str(error))
    temporary = given.out.with_name(f".{given.out.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(given.out)
    print(f"{given.out}: {len(files)} file(s)")


if __name__ == "__main__":
    main()
