"""lm-eval with patches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_star import lm_eval


def run_lm_eval(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peft_star.lm_eval", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_lm_eval_loads_a_patch(tiny_dir: Path, patched, tmp_path: Path):
    pytest.importorskip("lm_eval")
    patched.save_pretrained(tmp_path / "patch")
    task = Path(__file__).parents[2] / "examples" / "lm_eval_task"
    values = []
    for arguments in (f"pretrained={tiny_dir}", f"pretrained={tiny_dir},peft={tmp_path / 'patch'}"):
        result = run_lm_eval(
            *("--model", "hf", "--model_args", arguments, "--tasks", "peft_star_idioms", "--device", "cpu"),
            *("--include_path", str(task), "--output_path", str(tmp_path / "out"), "--log_samples"),
        )
        assert result.returncode == 0, result.stderr[-2000:]
        samples = max(tmp_path.glob("out/**/samples_*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        lines = samples.read_text().splitlines()
        assert len(lines) == 10
        values.append([json.loads(line)["filtered_resps"] for line in lines])
    assert values[0] != values[1]


def test_lm_eval_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as exit_:
        lm_eval.main()
    assert exit_.value.code == 2
    assert "pip install 'peft-star[lm-eval]'" in capsys.readouterr().err
