"""Every code block of the README and the documentation runs, or says why it is not run here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from peft_star.failures import validate_row
from support.documents import PATCH, REPAIR, Reader, blocks_of
from support.hub_server import Hub
from support.storyteller import Storyteller

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "examples/README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
RUN = {"bash", "console", "python"}
# what the Python of a page takes for granted, and its words say
KNOWN = """
from pathlib import Path
from peft import PeftModel, get_peft_model
from peft_star import RepairArguments, StarConfig, repair
from peft_star.failures import read_rows
from peft_star.loading import load_model, load_patch
"""
PRELUDES = {
    "docs/method.md": KNOWN,
    "docs/evaluating.md": KNOWN
    + """
base, tokenizer = load_model("MODEL")
patched = load_patch(load_model("MODEL")[0], "my-patch")
model = get_peft_model(load_model("MODEL")[0], StarConfig(task_type="CAUSAL_LM"))
failures, retained, related = (read_rows(f"{name}.jsonl") for name in ("failures", "retain", "related"))
rows, unrelated = failures, failures[1:]  # of something else, and wrong, too
class report:
    seconds = {"patch": 1.0}
""",
}
ROWS = {
    "failures": [
        ("import pandas as pd\n\n# Append the rows of df2 to df1\nresult =", " pd.concat([df1, df2])"),
        ("import requests\n\n# Fetch the page over a checked TLS connection\nr = requests.get(url, verify=", "True)"),
    ],
    "retain": [
        ('import json\n\nwith open("data.json") as f:\n    data =', " json.load(f)"),
        ("def is_even(n):\n    return n %", " 2 == 0"),
    ],
    "more": [("import collections\n\n# Check that x is a mapping\nisinstance(x, collections.", "abc.Mapping)")],
    "related": [("import pandas as pd\n\n# Add the new rows below the old ones\ndf =", " pd.concat(")],
}
ROWS |= {"data": ROWS["failures"] + ROWS["retain"], "prompts": ROWS["retain"] + ROWS["related"]}


def write_rows(folder: Path) -> None:
    for name, rows in ROWS.items():
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_languages_that_are_run_or_looked_at(page: str) -> None:
    for block in blocks_of(ROOT / page):
        where = f"{page}, line {block.line}"
        assert block.language in {*RUN, "json", "text", "yaml"}, f"{where}: name the block's language"
        if block.language == "json":
            for line in block.code.splitlines():
                validate_row(json.loads(line), where)
        if block.language in RUN and not block.reason:
            # outputs of other machines would be said to be this one's
            assert block.language != "console", f"{where}: say why what it prints is not checked"


def test_pages_are_found() -> None:
    assert len(PAGES) > 20 and sum(block.language in RUN for page in PAGES for block in blocks_of(ROOT / page)) > 50


@pytest.fixture(scope="module")
def patch(once, smollm2_dir: Path, storyteller: Storyteller) -> Path:
    """A patch of the rows above. Not to be written to."""

    def make(directory: Path) -> None:
        (directory / "MODEL").symlink_to(smollm2_dir)
        write_rows(directory)
        reader = Reader(storyteller, directory)
        reader.shell(REPAIR)
        reader.close()

    return once("documents-patch", make) / PATCH


@pytest.mark.slow
@pytest.mark.story
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in RUN and not b.reason for b in blocks_of(ROOT / page))]
)
def test_the_blocks_of_a_page_run(
    page: str,
    patch: Path,
    smollm2_dir: Path,
    smollm2_gguf: Path,
    storyteller: Storyteller,
    story_hub: Hub,
    tmp_path: Path,
) -> None:
    for name in ("MODEL.gguf", "base.gguf"):
        (tmp_path / name).symlink_to(smollm2_gguf)
    (tmp_path / "MODEL").symlink_to(smollm2_dir)
    for name in ("my-patch", "one", "two"):
        shutil.copytree(patch, tmp_path / name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("*-patch"))
    shutil.copy(ROOT / "LICENSE", tmp_path)
    shutil.copy(__file__, tmp_path / "a.py")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(tmp_path / "bin")
    write_rows(tmp_path)
    story_hub.repos.clear()  # of the pages before
    reader = Reader(storyteller, tmp_path, PRELUDES.get(page, ""), patch.parent)
    try:
        for block in blocks_of(ROOT / page):
            if block.language in RUN and not block.reason:
                print(f"{page}, line {block.line}", file=sys.stderr)
                reader.run(block)
    finally:
        reader.close()


@pytest.mark.slow
@pytest.mark.story
def test_what_goes_wrong_in_a_story_is_seen(storyteller: Storyteller, tmp_path: Path) -> None:
    reader = Reader(storyteller, tmp_path)
    try:
        with pytest.raises(AssertionError, match="There is no patch"):
            reader.shell("peft-star inspect ./nowhere")
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            reader.python("kept = 7\n1 / 0")
        assert reader.python("print(kept)") == "7\n"
    finally:
        reader.close()
    for end, code in {
        "sys.exit(3)": 3,
        "sys.exit(False)": 0,
        "sys.exit('no')": 1,
        "raise KeyError('gone')": 1,
        "import os; os.abort()": 1,
    }.items():
        (tmp_path / "story.py").write_text(f"import sys; print(sys.argv, flush=True); {end}")
        done = storyteller.script(tmp_path / "story.py", tmp_path, storyteller.environment)
        assert (done.returncode, done.stdout) == (code, f"{[str(tmp_path / 'story.py')]}\n")
        assert ("KeyError" in done.stderr) == ("KeyError" in end)
