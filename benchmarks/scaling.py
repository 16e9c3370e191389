"""How a repair scales: many failures, its peak memory, a large head, and two processes.

    python benchmarks/scaling.py --model MODEL --data DIR --json scaling.json --plot scaling.png

- failures: seconds of a repair of 1,000 failing tokens by those of 100, on rows without demonstrations, with all of
  them solved (`max_harm=1`).
- memory: peak memory of a repair of one batch of rows, and of all rows of the largest number of failures, by that of
  one forward-backward of this batch. Both read the head at completion tokens only. "frozen" differentiates the hidden
  states alone, "trained" all weights, too.
- head: the factor of the Gram matrix of a random head, (V, d) of bfloat16: computed, and read from the disk.
- processes: two processes with a core each by one process with one core, on the same rows.

Each measurement runs in processes of its own, with `--threads` threads; finished ones are kept in the JSON file. A
memory is the largest resident set of a process (on a GPU, `max_memory_allocated`), weights and libraries included.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from figures import BLUE, GREY, drawing, save
from harness import parser, resume, run_units, setting_of
from interface import MAX_BATCH_TOKENS
from methods import Star
from peft_star.engine.batch import Batch
from peft_star.engine.distributed import launched
from peft_star.engine.engine import Engine
from peft_star.engine.passes import completion_logits, loss_at, teacher_forced
from peft_star.failures import encode_rows
from peft_star.loading import load_model
from peft_star.method.semantics import SemanticBases
from prompts import few_shot_rows, read_jsonl

PARTS = ("failures", "memory", "head", "processes")
TARGETS = {"failures": 10.0, "memory": 1.3, "processes": 0.6}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def all_rows(data: Path, tasks: list[str], demonstrations: int, seed: int) -> list[dict[str, str]]:
    """The rows of the tasks' inference splits in random order, without demonstrations or behind some; of rows with the
    same prompt one, as a repair can give it only one completion."""
    rows = []
    for task in tasks:
        plain = read_jsonl(data / task / "inference.jsonl")
        if demonstrations:
            plain = few_shot_rows(data, task, len(plain), demonstrations)
        else:
            plain = [{"prompt": f"# {row['prompt']}\n", "completion": row["completion"]} for row in plain]
        rows += plain
    random.Random(seed).shuffle(rows)
    return list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]


# what runs in processes of its own


def begin(threads: int, core: int | None = None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(threads)


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load(model: str, device: str | None = None):
    return load_model(model, dtype="float32", device_map=device or ("cuda" if torch.cuda.is_available() else None))


def repaired(base, tokenizer, rows: list[dict[str, str]], clock: str) -> dict[str, Any]:
    star = Star("star", max_harm=1.0)
    with star.install(base) as model:
        start = CLOCKS[clock]()
        report = star.repair(model, tokenizer, rows)
        seconds = CLOCKS[clock]() - start
    return {
        "seconds": seconds,
        "phases": report.seconds,
        "rows": len(rows),
        "failures": len(report.failures),
        "solved": report.num_solved,
        "steps": report.steps,
    }


def count_rows(given: dict[str, Any], wanted: list[int]) -> dict[str, int]:
    """How many of the rows hold as many failing tokens as are wanted."""
    begin(given["threads"])
    base, tokenizer = load(given["model"])
    engine = Engine(base, MAX_BATCH_TOKENS)
    found: dict[str, int] = {}
    failing, done = 0, 0
    rows = all_rows(Path(given["data"]), given["tasks"], given["demonstrations"], given["seed"])
    for row in encode_rows(rows, tokenizer):
        failing += int((~teacher_forced(engine, engine.batches([row])).right).sum())
        done += 1
        found |= {str(number): done for number in wanted if failing >= number and str(number) not in found}
        if len(found) == len(set(wanted)):
            return found
    raise SystemExit(f"The rows hold {failing} failing tokens, fewer than {max(wanted)}; give fewer --failures.")


def time_failures(given: dict[str, Any], rows: list[dict[str, str]], number: int) -> dict[str, Any]:
    begin(given["threads"])
    return {**repaired(*load(given["model"]), rows[:number], given["clock"]), "peak": peak()}


def batch_of(base, tokenizer, rows: list[dict[str, str]]) -> Batch:
    """The largest batch that the rows make."""
    batches = Engine(base, MAX_BATCH_TOKENS).batches(encode_rows(rows, tokenizer))
    return max(batches, key=lambda batch: batch.input_ids.numel())


def memory_of(given: dict[str, Any], rows: list[dict[str, str]], kind: str) -> dict[str, Any]:
    """Peak memory of a repair of one batch, or of its forward-backward."""
    begin(given["threads"])
    base, tokenizer = load(given["model"])
    batch = batch_of(base, tokenizer, rows)
    loaded = peak()
    if kind == "repair":
        chosen = [rows[row.index] for row in batch.items]
        return {**repaired(base, tokenizer, chosen, given["clock"]), "peak": peak(), "loaded": loaded}
    base.eval().requires_grad_(kind == "trained")
    base.enable_input_require_grads()
    loss_at(completion_logits(base, batch), batch, torch.arange(len(batch))).backward()
    return {"rows": len(batch.items), "tokens": batch.input_ids.numel(), "peak": peak(), "loaded": loaded}


def factor_head(given: dict[str, Any], kept: str) -> dict[str, Any]:
    """Seconds and memory of a head's factor, with `kept` as the cache's directory."""
    os.environ["PEFT_STAR_CACHE"] = kept
    begin(given["threads"])
    size, width = given["head"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.empty(size, width, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(given["seed"])
    for part in weight.split(1024):
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    before, start = peak(), CLOCKS["wall"]()
    SemanticBases(weight)
    seconds = CLOCKS["wall"]() - start
    return {"seconds": seconds, "extra": peak() - before, "weight": weight.nbytes, "gram": 8 * width**2}


def time_head(given: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as kept:
        return {kind: apart(factor_head, given, kept) for kind in ("computed", "from the disk")}


def member(rank: int, given: dict[str, Any], rows: list[dict[str, str]], cores: list[int], port: int, queue) -> None:
    """One of the processes that repair together, with a core of its own."""
    begin(1, cores[rank])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(cores))}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with launched() as device:
        queue.put(repaired(*load(given["model"], device), rows, given["clock"]))


def time_processes(given: dict[str, Any], rows: list[dict[str, str]], number: int) -> dict[str, Any]:
    """A repair in so many processes; its time is that of the slowest."""
    cores = sorted(os.sched_getaffinity(0))[:number]
    if len(cores) < number:
        raise SystemExit(f"Only {len(cores)} core can be used; leave 'processes' out of --parts.")
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = given, rows, cores, get_free_port(), queue
    torch.multiprocessing.spawn(member, arguments, nprocs=number)
    results = [queue.get() for _ in cores]
    return max(results, key=lambda result: result["seconds"])


def apart(function: Callable, *arguments: Any) -> Any:
    """What the function returns, run in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# tables and pictures


def summary(results: dict[str, Any], given: dict[str, Any]) -> list[dict[str, Any]]:
    """By part its ratio and what it is made of."""
    found = []

    def of(prefix: str) -> list[dict[str, Any]]:
        return [value for key, value in results.items() if key.startswith(prefix)]

    def entry(part: str, what: str, above: float, below: float, unit: str) -> None:
        found.append({"part": part, "what": what, "above": above, "below": below, "unit": unit})

    seconds = {number: [run["seconds"] for run in of(f"failures {number} |")] for number in given["failures"]}
    first, *others = [number for number in given["failures"] if seconds[number]] or [None]
    for number in others:
        what = f"{number:,} failing tokens by {first:,}"
        entry("failures", what, median(seconds[number]), median(seconds[first]), "s")
    peaks = {kind: [run["peak"] / 1e6 for run in of(f"memory {kind} |")] for kind in ("repair", "frozen", "trained")}
    peaks["repair of all"] = [run["peak"] / 1e6 for run in of(f"failures {given['failures'][-1]} |")]
    for repair in ("repair", "repair of all"):
        for kind in ("frozen", "trained"):
            if peaks[repair] and peaks[kind]:
                what = f"peak memory, {repair} by forward-backward, {kind}"
                entry("memory", what, median(peaks[repair]), median(peaks[kind]), "MB")
    alone, pair = ([run["seconds"] for run in of(f"processes {number} |")] for number in (1, 2))
    if alone and pair:
        entry("processes", "two processes by one", median(pair), median(alone), "s")
    return found


def table(results: dict[str, Any], given: dict[str, Any]) -> str:
    lines = ["| | | by | ratio | target |", "| --- | --- | --- | --- | --- |"]
    for item in summary(results, given):
        unit, ratio = item["unit"], item["above"] / item["below"]
        target = f"at most {TARGETS[item['part']]:g}"
        lines.append(
            f"| {item['what']} | {item['above']:.1f} {unit} | {item['below']:.1f} {unit} | {ratio:.2f} | {target} |"
        )
    repairs = {key: value for key, value in results.items() if "solved" in value and not key.startswith("memory")}
    if repairs:
        lines += [
            "",
            "| repair | rows | failing tokens | solved | steps | s |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for key, run in repairs.items():
            figures = f"{run['rows']} | {run['failures']} | {run['solved']} | {run['steps']} | {run['seconds']:.1f}"
            lines.append(f"| {key.replace(' |', ',')} | {figures} |")
    if "head" in results:
        size, width = given["head"]
        lines += ["", f"| head of {size:,} x {width:,} | s | extra memory | of it the Gram matrix |"]
        lines += ["| --- | --- | --- | --- |"]
        for name, run in results["head"].items():
            figures = f"{run['seconds']:.2f} | {run['extra'] / 1e6:.0f} MB | {run['gram'] / 1e6:.0f} MB"
            lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def picture(results: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    items = summary(results, given)
    with drawing() as plt:
        figure, axes = plt.subplots(figsize=(7, 0.6 * len(items) + 1.2))
        # each as a share of its target, so that one line says whether it is met
        shares = [item["above"] / item["below"] / TARGETS[item["part"]] for item in items]
        bars = axes.barh([item["what"] for item in items], shares, color=BLUE)
        axes.bar_label(bars, [f"{item['above'] / item['below']:.2f}" for item in items], padding=3)
        axes.axvline(1, color=GREY, linestyle="--", label="target")
        axes.set_xlim(0, 1.2 * max([1, *shares]))
        axes.invert_yaxis()
        axes.set_xlabel("ratio, as a share of its target")
        axes.legend(loc="lower right")
        save(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(demonstrations=0)
    options.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options.add_argument("--failures", nargs="+", type=int, default=[100, 1000], help="failing tokens, fewest first")
    options.add_argument("--shared", type=int, default=200, help="failing tokens that the processes share")
    options.add_argument("--head", nargs=2, type=int, default=[49152, 2048], metavar=("V", "D"))
    options.add_argument("--runs", type=int, default=3, help="of everything but the head; figures are medians")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu leaves out what others use of a core")
    options.add_argument("--plot", type=Path)
    given = options.parse_args()
    if given.failures != sorted(set(given.failures)):
        options.error("--failures are numbers in ascending order.")
    setting = setting_of(given, "parts", "runs", "plot", "rows")
    state = resume(given.json, setting)
    results = state["results"]
    wanted = [*given.failures, given.shared]
    if set(given.parts) - {"head"} and not run_units(
        [("rows", partial(apart, count_rows, setting, wanted))], state, given.json, "counting rows"
    ):
        return
    rows = all_rows(given.data, given.tasks, given.demonstrations, given.seed)
    counts = results.get("rows", {})
    units: list[tuple[str, Callable[[], Any]]] = []
    for run in range(given.runs):
        if "memory" in given.parts:
            for kind in ("repair", "frozen", "trained"):
                unit = partial(apart, memory_of, setting, rows[: counts[str(given.failures[-1])]], kind)
                units.append((f"memory {kind} | run {run}", unit))
        if "processes" in given.parts:
            chosen = rows[: counts[str(given.shared)]]
            for number in (1, 2):
                units.append((f"processes {number} | run {run}", partial(time_processes, setting, chosen, number)))
        if "failures" in given.parts:
            for number in given.failures:
                unit = partial(apart, time_failures, setting, rows, counts[str(number)])
                units.append((f"failures {number} | run {run}", unit))
    if "head" in given.parts:
        units.append(("head", partial(time_head, setting)))
    if not run_units(units, state, given.json, "measurements"):
        return
    results = {key: value for key, value in results.items() if key != "rows"}
    print(table(results, setting))
    if given.plot:
        picture(results, setting, given.plot)


if __name__ == "__main__":
    main()
