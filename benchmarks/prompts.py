"""Few-shot prompts of retrieved demonstrations, as in the paper's section 4.3 (BM25 over the retrieval split)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_star.failures import read_rows

TASKS = ("conala", "ia32", "tldr")


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def few_shot_rows(data: Path, task: str, rows: int, demonstrations: int = 3) -> list[dict[str, str]]:
    """The first rows of a task's inference split, each behind its nearest retrieved demonstrations, best last."""
    import bm25s

    folder = Path(data) / task
    for name in ("retrieval.jsonl", "inference.jsonl"):
        if not (folder / name).is_file():
            raise SystemExit(
                f"{folder / name} is missing; --data must hold {', '.join(TASKS)}, each with both splits."
            )
    corpus, wanted = read_jsonl(folder / "retrieval.jsonl"), read_jsonl(folder / "inference.jsonl")
    # spread over the whole split: neighbours in the file are near-duplicates of each other
    step = max(1, len(wanted) // rows)
    wanted = wanted[::step][:rows]
    index = bm25s.BM25()
    index.index(bm25s.tokenize([row["prompt"] for row in corpus], show_progress=False), show_progress=False)
    queries = bm25s.tokenize([row["prompt"] for row in wanted], show_progress=False)
    found, _ = index.retrieve(queries, k=demonstrations, show_progress=False)
    built = []
    for row, numbers in zip(wanted, found):
        shots = [f"# {corpus[n]['prompt']}\n{corpus[n]['completion']}\n\n" for n in reversed(numbers.tolist())]
        built.append({"prompt": "".join(shots) + f"# {row['prompt']}\n", "completion": row["completion"]})
    return built


def row_options(options: argparse.ArgumentParser, what: str) -> None:
    """Options that name rows: a file of them, or the tasks' folder. `what` is done with them."""
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument("--failures", type=Path, help=f"JSON Lines of rows to {what}")
    source.add_argument("--data", type=Path, help="folder with conala/, ia32/, tldr/, whose rows are taken")
    options.add_argument("--rows", type=int, default=8, help="rows of each task")


def given_rows(given: argparse.Namespace) -> Sequence[dict[str, Any]]:
    """The rows that these options name."""
    if given.failures:
        return read_rows(given.failures)
    return [row for task in TASKS for row in few_shot_rows(given.data, task, given.rows)]
