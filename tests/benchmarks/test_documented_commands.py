"""The documentation's commands of benchmarks are understood by the benchmarks, though nobody has hours to run them."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Begun(BaseException):
    """The work has begun: the command was understood."""


def begin(*args: object, **kwargs: object) -> None:
    raise Begun


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ *(?:\w+=\w+ )*python (benchmarks/\w+\.py .*)$", text, re.M):
            yield f"{page.relative_to(ROOT)}: {line.split()[0]}", line


@pytest.mark.parametrize("line", [line for _, line in commands()], ids=[name for name, _ in commands()])
def test_a_documented_command_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *words = shlex.split(line)
    module = importlib.import_module(Path(script).stem)
    (tmp_path / "facts.jsonl").write_text(json.dumps({"prompt": "a b", "completion": " c", "focus": "a"}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    for name in ("load", "load_model", "read_rows", "given_rows", "resume", "task_rows"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, begin)
    with pytest.raises(Begun):
        module.main()
    # with a name that is none it would not have
    if "--methods" in words:
        words.insert(words.index("--methods") + 1, "no-such-method")
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.setattr(module, "resume", lambda *args, **kwargs: {})
        with pytest.raises((SystemExit, ValueError, KeyError)):
            module.main()
