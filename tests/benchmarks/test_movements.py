"""The benchmark of how far what serves a model moves gaps: what it computes, and what it holds llama.cpp against."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import llama_cpp  # noqa: E402
import movements  # noqa: E402
from peft_star.engine.engine import Engine  # noqa: E402
from peft_star.engine.passes import teacher_forced  # noqa: E402
from peft_star.failures import encode_rows  # noqa: E402
from peft_star.loading import load_model  # noqa: E402

ROWS = [{"prompt": "a b", "completion": "c d"}, {"prompt": "xyz", "completion": "!"}]


@pytest.fixture
def printed(monkeypatch, tmp_path, capsys):
    """Run the benchmark, and give the lines of its table."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))

    def run(*words: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["movements.py", "--failures", str(path), *words])
        movements.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]

    return run


def test_arithmetics_are_compared_with_the_models_own(printed, tiny_dir, tmp_path) -> None:
    found = {name: float(size) for name, size, *_ in printed("--model", str(tiny_dir), "--engines", str(tmp_path))}
    assert list(found) == ["computed: bf16", "computed: fp16", "computed: q8_0"]
    assert found["computed: bf16"] > found["computed: fp16"] > 0


def test_llama_cpp_is_held_against_what_stands_for_it(printed, monkeypatch, tiny_dir, tmp_path) -> None:
    model, tokenizer = load_model(tiny_dir)
    rows = encode_rows(ROWS, tokenizer)
    engine = Engine(model.eval(), 2048)
    with torch.no_grad():
        gaps = teacher_forced(engine, engine.batches(rows)).gap
    (_, moved) = movements.computed(model, rows, ("q8_0",))
    asked = []

    def engine_gaps(folder, base, given, lora, length):
        asked.append([tokens[start:] for tokens, start in given])
        values = iter((gaps + 2 * moved["q8_0"]).tolist())
        return [[next(values) for _ in tokens] for tokens in asked[-1]]

    monkeypatch.setattr(llama_cpp, "unpack", lambda *args: None)
    monkeypatch.setattr(llama_cpp, "gaps", engine_gaps)
    (tmp_path / "llama.cpp" / "node_modules").mkdir(parents=True)
    lines = {name: values for name, *values in printed("--model", str(tiny_dir), "--engines", str(tmp_path))}
    assert asked == [[row.completion_ids for row in rows]] * 3
    size, largest, correlation = lines["llama.cpp: Q8_0"]
    assert float(size) == pytest.approx(2 * moved["q8_0"].square().mean().sqrt().item(), abs=1e-3)
    assert correlation == "1.00" and largest == lines["computed: q8_0"][1]
    # nothing is computed that would stand for float32
    assert lines["llama.cpp: F32"][2] == ""
