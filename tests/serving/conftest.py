"""A real patch, and the engines that serve it: vLLM and llama.cpp, where `make test-serving` has installed them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoTokenizer

from peft_star import RepairArguments, StarConfig, repair
from peft_star.failures import read_rows
from peft_star.loading import load_model

ROOT = Path(__file__).parents[2]
ENGINES = Path(os.environ.get("PEFT_STAR_ENGINES", ROOT / ".engines"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import serving  # noqa: E402


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return read_rows(ROOT / "examples" / "failures.jsonl")


@pytest.fixture(scope="session")
def asked(rows: list[dict], smollm2_dir: Path) -> list[tuple[str, int]]:
    """The prompts, and how many tokens to generate from each."""
    return serving.questions(rows, AutoTokenizer.from_pretrained(smollm2_dir))


@pytest.fixture(scope="session")
def exact(rows: list[dict]) -> Callable[[list[str]], list[bool]]:
    """Which rows an engine's texts complete."""
    return partial(serving.exact, rows)


@pytest.fixture(scope="session")
def served_patch(smollm2_gguf: Path, rows: list[dict], once: Callable[..., Path]) -> Path:
    """SmolLM2 repaired as it is by default: for the types of its file, with room for the others it is served in."""

    def fill(directory: Path) -> None:
        base, tokenizer = load_model(smollm2_gguf)
        model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
        arguments = RepairArguments(disable_tqdm=True)
        report = repair(model, tokenizer, rows, arguments, retain=read_rows(ROOT / "examples" / "retain.jsonl"))
        assert report.success, report.to_markdown()
        model.save_pretrained(directory)

    return once("served-patch", fill)


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder with node-llama-cpp."""
    folder = ENGINES / "llama.cpp"
    if shutil.which("node") is None or not (folder / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip(f"node-llama-cpp is not installed in {folder}; make test-serving does it, where npm can")
    return folder


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter that has vLLM."""
    python = ENGINES / "vllm" / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode:
        pytest.skip(f"vLLM is not installed in {python.parents[1]}; make test-serving does it, where pip can")
    return python
