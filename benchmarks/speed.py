"""How long a repair takes, beside SGD, MINT, LoRA and the least that a method with gradients can take.

    python benchmarks/speed.py --model MODEL --data DIR --rows 10 --repeats 3 --json speed.json --plot speed

Every row gets a patch of its own from every method. All stop by the same rule: every failing token of the row solved
by the margin and nothing broken, or the method's limit of steps; what they solved stands beside their times. The
methods and the floor take turns on each row, and who begins changes with every turn. MINT knows one mode, `single`;
the others run in the mode of `--arguments` (`multiple`, unless it says otherwise).

What is timed is `repair()` with `verify_generation=False` and `serve=()`, unless `--arguments` says otherwise
(`--arguments '{"serve": ["base"], "verify_generation": null}'`: at its defaults), and what the other methods do
between making room for the patch and taking it off. How long it takes to find the patch, without a look at what it
does, is told beside it: the phases from trace to patch. Making room (`get_peft_model`, or copying weights) and taking
off are listed on their own, and so is what belongs to a model and not to a repair (the head's semantic bases,
activations on background text, the check that layers can be replayed): the first repair of a model less a second
repair of the same row. `PEFT_STAR_CACHE=0` keeps the bases of a large head from being read from an earlier run's
file.

The floor of a row is one full forward-backward and one full forward of the row alone, tokenised before. Full
forward-backward: a forward through all layers with logits at the completion's tokens, the cross entropy summed over
the failing ones, and its gradient with respect to the input of every FFN's second matrix; no gradient of a weight, and
nothing below the lowest FFN's second matrix. Full forward: the same forward without autograd.

Seconds are by the clock (`wall`) and of the processor, all threads together (`cpu`). With one thread on a processor
the latter leave out what other programs do on the machine, and decide; otherwise the clock does. Repeats of a (row,
method) count with their median. Finished ones are kept in the JSON file: an interrupted run goes on from there, and so
does one with more methods, repeats or rows of MINT.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from harness import load, parser, resume, run_units, setting_of, task_rows
from methods import METHODS
from peft_star import RepairArguments
from speed_measure import Study, method_of
from speed_report import by_row, metered, plot_methods, plot_phases, report

DEFAULT_METHODS = ["sgd", "mint", "lora", "star"]


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, choices=METHODS, metavar="METHOD")
    options.add_argument("--repeats", type=positive, default=1, help="runs of each method on each row; MINT has one")
    options.add_argument("--mint-rows", type=positive, help="MINT on the first so many rows of each task only")
    options.add_argument("--config", type=json.loads, default={}, help="StarConfig fields as JSON")
    options.add_argument("--arguments", type=json.loads, default={}, help="RepairArguments fields as JSON")
    options.add_argument("--threads", type=positive, default=1, help="PyTorch's threads on the processor")
    options.add_argument("--device", help="where the model goes, such as cuda; the default is the processor")
    options.add_argument("--plot", type=Path, metavar="PREFIX", help="draw PREFIX-phases.png and PREFIX-methods.png")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    state = resume(given.json, setting_of(given, "methods", "repeats", "mint_rows", "plot"))
    state["benchmark"] = "speed"
    arguments = dict(given.arguments)
    margin, mode = arguments.pop("margin", RepairArguments.margin), arguments.pop("mode", RepairArguments.mode)
    try:
        RepairArguments(margin=margin, mode=mode)
        methods = {name: method_of(name, given.config, arguments) for name in given.methods}
    except (TypeError, ValueError) as error:
        options.error(f"--config or --arguments: {error}")
    known = state.setdefault("methods", {})
    for name, method in methods.items():
        if known.setdefault(name, method.settings) != method.settings:
            raise SystemExit(f"{given.json} holds {name} with other settings; name another file.")
    rows = task_rows(given)
    base, tokenizer = load(given)
    study = Study(base, tokenizer, margin, mode)
    # processor time says nothing of an accelerator, and of several threads it is a sum
    state["clock"] = "cpu" if given.threads == 1 and study.device.type == "cpu" else "wall"
    units = list(study.units(rows, methods, given.repeats, given.mint_rows))
    if any(key not in state["results"] for key, _ in units):
        once = study.warm_up(rows, methods)
        # a later run adds the methods that it brings
        once["first repair"] |= state.get("once", once)["first repair"]
        state["once"] = once
    run_units(units, state, given.json, "repairs")
    if not by_row(state):
        return
    print(report(state))
    if given.plot is not None:
        if metered(state):
            plot_phases(state, given.plot.with_name(f"{given.plot.name}-phases.png"))
        plot_methods(state, given.plot.with_name(f"{given.plot.name}-methods.png"))


if __name__ == "__main__":
    main()
