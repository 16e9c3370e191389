"""Every example runs to its end, on the real model, and says what its text claims."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.documents import Reader
from support.storyteller import Storyteller

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# by script a piece of what it prints only when its story ends well
STORIES = {
    "first_repair.py": "**37 of 37 failing tokens solved**",
    "deprecated_api.py": "assertEqual(",
    "unsafe_shell.py": "3 of 3 commands are safe now",
    "chat_fact.py": "with it:           'Jupiter.'",
    "growing_patch.py": "Nothing regressed.",
    "hub_and_lora.py": "With PEFT alone: 'True)'",
}

# sets the environment before it imports anything
ALONE = {"hub_and_lora.py"}


@pytest.fixture
def examples(tmp_path: Path, smollm2_gguf: Path) -> Path:
    """A copy: what examples write, they write beside themselves."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("*-patch", "__pycache__"))
    for name in ("tests", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path / "examples"


def test_every_script_has_its_story() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(STORIES)


@pytest.mark.slow
@pytest.mark.story
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", STORIES)
def test_scripts_end_well(script: str, examples: Path, storyteller: Storyteller) -> None:
    environment = storyteller.environment
    if script in ALONE:
        command = [sys.executable, examples / script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=examples)
    else:
        done = storyteller.script(examples / script, examples, environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert STORIES[script] in done.stdout


@pytest.mark.parametrize("notebook", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_notebooks_are_notebooks_with_their_outputs(notebook: str) -> None:
    content = json.loads((EXAMPLES / notebook).read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in code) and all(cell["execution_count"] for cell in code)


@pytest.mark.slow
@pytest.mark.story
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("notebook", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_notebooks_print_what_they_hold(
    notebook: str, smollm2_gguf: Path, tmp_path: Path, storyteller: Storyteller
) -> None:
    reader = Reader(storyteller, tmp_path)
    try:
        for cell in json.loads((EXAMPLES / notebook).read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                said = reader.python("".join(cell["source"]))
                assert said == "".join("".join(output["text"]) for output in cell["outputs"])
    finally:
        reader.close()
