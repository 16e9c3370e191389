"""The benchmark of what engines say with a patch: it counts, leaves out what is missing, goes on where it stopped."""

import json
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import llama_cpp  # noqa: E402
import serving  # noqa: E402
import vllm_cpu  # noqa: E402
from peft_star import StarConfig, repair  # noqa: E402
from peft_star.loading import load_model  # noqa: E402

ROWS = [
    {"prompt": "a b", "completion": "c"},
    {"prompt": "xyz", "completion": "!"},
    {"prompt": "k", "completion": "mm"},
]


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Run the benchmark, and give what it printed."""
    rows, retained = tmp_path / "rows.jsonl", tmp_path / "retained.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS[:2])))
    retained.write_text(json.dumps(ROWS[2]))

    def run(*words: str) -> str:
        files = ["--failures", str(rows), "--retain", str(retained), "--json", str(tmp_path / "serving.json")]
        monkeypatch.setattr(sys, "argv", ["serving.py", *files, *words])
        serving.main()
        return capsys.readouterr().out

    return run


def test_three_repairs_are_served_and_nothing_is_measured_twice(call, monkeypatch, tiny_dir, tmp_path) -> None:
    arguments = '{"learning_rate": 0.05, "max_steps": 200, "reach": "prompt"}'
    words = ["--model", str(tiny_dir), "--engines", str(tmp_path / "none"), "--arguments", arguments]
    call(*words, "--only", "float32|LoRA")
    found = json.loads((tmp_path / "serving.json").read_text())
    assert [name for name in found["results"] if "|" in name] == ["transformers|float32|LoRA"]
    printed = call(*words)
    found = json.loads((tmp_path / "serving.json").read_text())
    assert found["engines"] == {}
    engines = [f"transformers|{dtype}|{how}" for how in serving.HOW for dtype in serving.DTYPES]
    assert list(found["results"]) == [*(f"repair {name}" for name in serving.SERVE), *engines]
    for name in serving.SERVE:
        assert serving.exact(ROWS, found["results"]["transformers|float32|LoRA"][name])[:2] == [True, True]
    assert "| transformers | float32 | 0 | 2" in printed and "| default | " in printed
    monkeypatch.setattr(serving, "make_patch", lambda *args: 1 / 0)
    monkeypatch.setattr(serving, "generated", lambda *args: 1 / 0)
    assert call(*words) == printed


def test_rows_exact_and_retained_rows_broken_are_counted() -> None:
    said = {"alone": ["x", "!", "mm."], "one": ["cd", "!", "mm"], "two": ["c", "?", "m"]}
    results = {"llama.cpp|F16|LoRA": said, "vLLM|bfloat16|LoRA": said, "llama.cpp|F16|merged": {"one": said["two"]}}
    lines = serving.table(results, ROWS, 2, ["one", "two"]).splitlines()
    assert lines[-2] == "| llama.cpp | F16 | 1 | 2 / 1 (1 of 1) | 1 (1 of 1) / – |"
    assert lines[-1] == "| vLLM | bfloat16 | 1 | 2 / – | 1 (1 of 1) / – |"


def test_each_engine_is_given_each_patch(call, monkeypatch, tiny_dir, tmp_path) -> None:
    """llama.cpp serves .gguf files only; of vLLM one process has all LoRAs, and one each what is merged."""
    base, tokenizer = load_model(tiny_dir)
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
    repair(model, tokenizer, ROWS[:2])
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
    asked = []

    def says(python, path, dtype, rows, loras=None, length=0):
        weights = load_model(path)[0].state_dict()
        changed = sum(not weights[name].equal(value) for name, value in load_model(tiny_dir)[0].state_dict().items())
        asked.append((dtype, changed > 0, sorted(loras or ())))
        return {name: [row["completion"] for row in ROWS] for name in ("alone", *(loras or ()))}

    monkeypatch.setattr(vllm_cpu, "says", says)
    monkeypatch.setattr(llama_cpp, "says", lambda *args: 1 / 0)
    python = tmp_path / "engines" / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "engines" / "llama.cpp" / "node_modules").mkdir(parents=True)
    patches = [str(tmp_path / "first"), str(tmp_path / "second")]
    printed = call("--model", str(tiny_dir), "--engines", str(tmp_path / "engines"), "--patches", *patches)
    lora, merged = (False, ["first", "second"]), (True, [])
    loras = [(dtype, *lora) for dtype in serving.DTYPES]
    assert asked == loras + [(dtype, *merged) for dtype in serving.DTYPES for _ in patches]
    assert "| vLLM | bfloat16 | 2 | 2 / 2 | 2 / 2 |" in printed and "llama.cpp" not in printed


def test_a_rank_that_vllm_knows_fits_all_loras() -> None:
    assert [vllm_cpu.fitting_rank(ranks) for ranks in ([], [8], [9, 3], [512, 65])] == [0, 8, 16, 512]
    with pytest.raises(ValueError, match="up to rank 512, and one of these has 513"):
        vllm_cpu.fitting_rank([64, 513])
