"""Rows for the benchmarks, laid out as the paper's tasks are."""

import json

import pytest


@pytest.fixture
def data(tmp_path):
    for task in ("conala", "ia32"):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        rows = [{"prompt": f"{task} {n}", "completion": f"{n}{task[0]}"} for n in range(4)]
        for name in ("retrieval", "inference"):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return tmp_path / "data"
