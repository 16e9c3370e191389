"""The tables and pictures of `cumulative.py`: what a patch holds, and what it costs, by its number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import drawing, label, looks, save

AT_ONCE, IN_SUCCESSION = "at once", "in succession"
FACTS = "facts"
Record = dict[str, Any]


def lines(state: Mapping[str, Any]) -> Iterator[tuple[str, list[Record]]]:
    """By subject its records: by method, way and number of rows."""
    records = list(state["results"].values())
    order = list(dict.fromkeys(record["method"] for record in records))

    def place(record: Record) -> tuple:
        return order.index(record["method"]), record["way"], record.get("step", 0), record["rows"]

    for name in sorted({record["subject"] for record in records}, key=lambda name: (name == FACTS, name)):
        yield name, sorted((record for record in records if record["subject"] == name), key=place)


def way_of(record: Record) -> str:
    return f"{record['way']} by {record['step']}" if "step" in record else record["way"]


def share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def own_share(record: Record) -> float:
    return share(record["own_texts"]["unchanged"], record["own_texts"]["texts"])


def of(part: int, whole: int) -> str:
    return f"{part} / {whole}" if whole else "-"


def unseen_cells(record: Record) -> list[str]:
    unseen, count = record["unseen"], record["rows"]
    if "rephrased" in unseen:
        return [of(unseen["rephrased"], count), of(unseen["neighbours"], count)]
    before, now = (share(unseen[name], unseen["tokens"]) for name in ("right_before", "right"))
    return [f"{before:.1%} -> {now:.1%}", of(unseen["broken"], unseen["right_before"])]


def table(name: str, records: Sequence[Record]) -> str:
    """A line for each method, way and number of rows."""
    facts = name == FACTS
    heads = ["method", "way", "rows", "solved", "broken", "rows right", "earlier right"]
    heads += ["rephrased right", "neighbours as before"] if facts else ["unseen tokens right", "unseen broken"]
    heads += ["own texts unchanged", "KL there", "KL on prose", "perplexity", "KL on code", "CPU s"]
    table = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for record in records:
        own, prose, left = record["own_texts"], record["texts"]["prose"], record["left_out"]
        cells = [label(record["method"]), way_of(record), str(record["rows"])]
        cells += [of(record["solved"], record["failures"]), of(record["broken"], record["right"])]
        cells += [of(record["rows_right"], record["rows"]) + (f" ({left} left out)" if left else "")]
        cells += [of(record["earlier_right"], record["earlier"]), *unseen_cells(record)]
        cells += [of(own["unchanged"], own["texts"]), f"{own['kl']:.3g}", f"{prose['kl']:.3g}"]
        cells += [f"x{prose['perplexity_ratio']:.3g}", f"{record['texts']['code']['kl']:.3g}"]
        cells += [f"{record['cpu_seconds_total']:.0f}"]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def report(state: Mapping[str, Any]) -> str:
    """The tables of what there are results of."""
    return "\n\n".join(f"#### {name}\n\n{table(name, records)}" for name, records in lines(state))


PANELS: tuple[tuple[str, Callable[[Record], float], str], ...] = (
    ("failing tokens solved", lambda record: share(record["solved"], record["failures"]), "linear"),
    ("earlier rows still right", lambda record: share(record["earlier_right"], record["earlier"]), "linear"),
    ("own texts unchanged", own_share, "linear"),
    ("KL on prose, nats a token", lambda record: max(record["texts"]["prose"]["kl"], 1e-6), "log"),
)


def plot(name: str, records: Sequence[Record], path: Path) -> None:
    """What is solved and what it costs by number of rows: at once in solid lines, in succession in dashed ones."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    with drawing() as plt:
        figure, axes = plt.subplots(1, len(PANELS), figsize=(13.6, 3.8), sharex=True)
        for axis, (title, value, scale) in zip(axes, PANELS):
            for method, look in looks(methods).items():
                for way in dict.fromkeys(map(way_of, records)):
                    points = [
                        (record["rows"], value(record))
                        for record in records
                        if record["method"] == method and way_of(record) == way
                    ]
                    style = {"linestyle": "-"} if way == AT_ONCE else {"linestyle": "--", "markerfacecolor": "white"}
                    known = {**look.keywords, "label": f"{look.label}, {way}"}
                    if points:
                        axis.plot(*zip(*points), **known, **style)
            axis.set_title(title)
            axis.set_xlabel("rows repaired")
            axis.set_yscale(scale)
            if scale == "linear":
                axis.set_ylim(-0.03, 1.03)
        handles = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
        figure.suptitle(name)
        save(figure, path)
