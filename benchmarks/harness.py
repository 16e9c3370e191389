"""What the benchmarks share: options, rows, the record of machine and versions, and results that survive a stop."""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm.auto import tqdm
from transformers import set_seed

from peft_star.evaluation import TextProbe, write_json
from peft_star.loading import load_model
from prompts import TASKS, few_shot_rows

__all__ = [
    "Harm",
    "load",
    "machine",
    "parser",
    "resumable",
    "resume",
    "run_units",
    "setting_of",
    "task_rows",
    "write_json",
]

UNRELATED = Path(__file__).parent.parent / "LICENSE"


class Harm(TextProbe):
    """Harm to unrelated text: 256 tokens of the Apache licence."""

    def __init__(self, base, tokenizer):
        super().__init__(base, tokenizer, UNRELATED.read_text(), max_tokens=256)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks on the paper's rows have."""
    common = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_argument("--model", required=True, help="Hub id, directory or .gguf file")
    common.add_argument("--data", type=Path, required=True, help="folder with conala/, ia32/, tldr/")
    common.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    common.add_argument("--rows", type=int, default=50, help="rows of each task")
    common.add_argument("--demonstrations", type=int, default=3)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--json", type=Path, required=True, help="results; an existing file is gone on with")
    return common


def setting_of(given: argparse.Namespace, *without: str) -> dict[str, Any]:
    """The options as JSON types, without the output file and those that may change between runs into one file."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    return {key: value for key, value in values.items() if key not in ("json", *without)}


def task_rows(given: argparse.Namespace) -> dict[str, list[dict[str, str]]]:
    """By task its rows, each behind its demonstrations."""
    return {task: few_shot_rows(given.data, task, given.rows, given.demonstrations) for task in given.tasks}


def load(given: argparse.Namespace, dtype: str = "float32"):
    """The model and its tokenizer, with all random numbers seeded."""
    # transformers says this of itself whenever an adapter is put on a model
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    set_seed(given.seed)
    return load_model(given.model, dtype=dtype, device_map=getattr(given, "device", None))


def machine() -> dict[str, Any]:
    """The processor and the versions that figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def resume(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """The state of a run: `setting`, `machine`, and the `results` that the file at `path` holds already.

    Raises:
        SystemExit: The file holds results of another setting, or is no such file.
    """
    state: dict[str, Any] = {"setting": setting, "machine": machine(), "results": {}}
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            same, results = earlier["setting"] == setting, earlier["results"]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{path} holds no results of a benchmark; name another file.") from None
        if not same:
            raise SystemExit(f"{path} holds a run with other settings; name another file.")
        state |= {key: value for key, value in earlier.items() if key not in state}
        state["results"] = results
    return state


def run_units(
    units: Iterable[tuple[str, Callable[[], Any]]], state: dict[str, Any], path: Path, desc: str = "patches"
) -> bool:
    """Fill `state["results"]` by key, saving after each; Ctrl-C ends it with all finished ones kept.

    Returns:
        `bool`: Whether all are done.
    """
    units, results = list(units), state["results"]
    try:
        done = sum(key in results for key, _ in units)
        with tqdm(total=len(units), initial=done, desc=desc) as bar:
            for key, unit in units:
                if key not in results:
                    bar.set_postfix_str(key)
                    results[key] = unit()
                    write_json(path, state)
                    bar.update()
    except KeyboardInterrupt:
        print(f"Interrupted; {path} holds what is done, and the same command goes on from there.", flush=True)
        return False
    return True


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Ctrl-C ends the benchmark with exit code 130, and says where its finished results are."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted; {path} holds what is finished, and the same command goes on from there.")
        raise SystemExit(130) from None
