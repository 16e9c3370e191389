"""The code blocks of a page of documentation, and running them in one folder, in their order."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from support.storyteller import PROGRAM, Storyteller

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?^ *```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$", re.M | re.S
)
_OUTPUT = re.compile(r"(?:-o|--output) (\S+)")
# what many pages begin with
PATCH, ROWS = "my-patch", ("failures.jsonl", "retain.jsonl")
REPAIR = f"peft-star repair MODEL {ROWS[0]} --retain {ROWS[1]} -o {PATCH}"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, the line that it begins in, and why it is not run ("": it is)."""

    language: str
    code: str
    line: int
    reason: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["code"], text[: found.start()].count("\n") + 1, found["reason"] or "")
        for found in _BLOCK.finditer(text)
    ]


class Reader:
    """Somebody who follows a page: a folder, a shell and an interpreter that remembers.

    Args:
        storyteller: Runs the commands and the interpreter.
        folder: Where all of it happens.
        prelude: What the page's Python takes for granted.
        done: A folder in which `REPAIR` has been run. Where a page says it of the same rows, its patch is copied.
    """

    def __init__(self, storyteller: Storyteller, folder: Path, prelude: str = "", done: Path | None = None) -> None:
        programs = folder / "bin"
        programs.mkdir()
        python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
        commands = PROGRAM.format(python=sys.executable, address=storyteller.address)
        for name, script in {"python": python, "peft-star": commands}.items():
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        self.storyteller, self.folder, self.prelude, self.done = storyteller, folder, prelude, done
        self.environment = {**storyteller.environment, "PATH": f"{programs}:{os.environ['PATH']}"}
        self.interpreter: tuple[IO[str], IO[str], socket.socket] | None = None

    def run(self, block: Block) -> str:
        """Run a block and return what it printed; an AssertionError says what went wrong."""
        return {"bash": self.shell, "console": self.console, "python": self.python}[block.language](block.code)

    def shell(self, code: str) -> str:
        for name in _OUTPUT.findall(code):
            shutil.rmtree(self.folder / name, ignore_errors=True)  # a page may make again what it had
            if (self.folder / name).is_file():
                (self.folder / name).unlink()
        if "peft-star" in code:
            self.storyteller.start()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self._without_what_is_done(code)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def _without_what_is_done(self, code: str) -> str:
        if self.done is None or any((self.done / name).read_bytes() != _bytes(self.folder / name) for name in ROWS):
            return code
        copy = f"cp -r {shlex.quote(str(self.done / PATCH))} {PATCH}"
        known, lines = sorted(REPAIR.split()), code.splitlines()
        return "\n".join(copy if sorted(line.partition(" #")[0].split()) == known else line for line in lines)

    def console(self, code: str) -> str:
        """The commands of a session; what they print may differ."""
        return self.shell("\n".join(line[2:] for line in code.splitlines() if line.startswith("$ ")))

    def python(self, code: str) -> str:
        if self.interpreter is None:
            self.interpreter = self._start_interpreter()
            code = f"{self.prelude}\n{code}"
        blocks, answers, _ = self.interpreter
        blocks.write(json.dumps(code) + "\n")
        blocks.flush()
        said, wrong = json.loads(answers.readline())
        assert wrong is None, f"{code}\n{wrong}"
        return said

    def _start_interpreter(self) -> tuple[IO[str], IO[str], socket.socket]:
        (its_input, ours), (answers, its_output) = os.pipe(), os.pipe()
        with open(os.devnull, "w") as nothing:
            streams = (its_input, its_output, nothing)
            client = self.storyteller.ask("interpreter", [], self.folder, self.environment, streams)
        os.close(its_input)
        os.close(its_output)
        return os.fdopen(ours, "w"), os.fdopen(answers), client

    def close(self) -> None:
        if self.interpreter is not None:
            blocks, answers, client = self.interpreter
            blocks.close()
            client.recv(16)
            for stream in (answers, client):
                stream.close()


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
