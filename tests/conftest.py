"""Fixtures for every test: a tiny model with a tokenizer for quick tests, and the demo's real model."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports huggingface_hub: what a test needs it makes itself, and nothing is asked of the Hub.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# What is found out about models is kept for this run alone, and for all of its workers, which inherit this.
if "PEFT_STAR_CACHE" not in os.environ:
    os.environ["PEFT_STAR_CACHE"] = tempfile.mkdtemp(prefix="peft_star-")
    atexit.register(shutil.rmtree, os.environ["PEFT_STAR_CACHE"], ignore_errors=True)
# Before anything imports torch: pytest-xdist's workers, and what they start, share the cores, a thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from peft_star.loading import demo_model_path, load_model
from support.byte_llama import build_model, build_tokenizer
from support.hub_server import WRITER, Hub
from support.storyteller import STARTUP, Storyteller

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a `.gguf` file."""
    try:
        return demo_model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make a directory that takes long just once for all of pytest-xdist's workers: `once(name, fill)`, where
    `fill(directory)` writes into it. Not to be written to otherwise."""
    together = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        together = together.parent

    def directory(name: str, fill: Callable[[Path], object]) -> Path:
        finished = together / name
        with FileLock(together / f"{name}.lock"):
            if not finished.exists():
                unfinished = tmp_path_factory.mktemp(name)
                fill(unfinished)
                unfinished.rename(finished)
        return finished

    return directory


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, once: Callable[..., Path]) -> Path:
    """SmolLM2-135M-Instruct as a directory with safetensors, which loads much faster than the `.gguf` file."""

    def save(directory: Path) -> None:
        for part in load_model(smollm2_gguf):
            part.save_pretrained(directory)

    return once("smollm2-135m-instruct", save)


@pytest.fixture(scope="session")
def story_hub() -> Iterator[Hub]:
    """The Hub of a worker's stories, whose address the `storyteller` knows."""
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def storyteller(story_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storyteller]:
    """Runs commands, scripts and blocks of Python, without importing everything for each of them."""
    variables = {"HF_ENDPOINT": story_hub.url, "HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    variables |= {"PYTHONPATH": f"{ROOT / 'src'}:{STARTUP}"}
    storyteller = Storyteller(variables)
    yield storyteller
    storyteller.close()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of 259 tokens."""
    return build_tokenizer()


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    """A fresh tiny Llama; the same weights each time."""
    return build_model()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama and its tokenizer, saved. Not to be written to."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    build_model().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON Lines: `write_rows("failures.jsonl", ("prompt", "completion"), ...)`."""

    def write(name: str, *rows: tuple[str, str]) -> Path:
        path = tmp_path / name
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
