"""The code blocks of a page of documentation, and running them in one folder, in their order."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?^ *```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$", re.M | re.S
)
_OUTPUT = re.compile(r"(?:-o|--output) (\S+)")
# Importing torch and transformers takes longer than most commands: a process that has done so forks for each of them.
_SERVER = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
import transformers.models.llama
from peft_star.cli import main
while True:
    client, _ = server.accept()
    message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    words, folder = json.loads(message)
    child, code = os.fork(), 1
    if child == 0:
        os.chdir(folder)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        try:
            main(words)
        except SystemExit as exit_:
            code = exit_.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    for stream in streams:
        os.close(stream)
    client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    client.close()
"""
_CLIENT = """#!{python}
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [json.dumps([sys.argv[1:], os.getcwd()]).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or 1))
"""
# runs what it is given in one namespace, as a reader does who types the blocks of a page one after the other
_INTERPRETER = """
import contextlib, io, json, sys, traceback
names, answers = {"__name__": "__main__"}, sys.stdout
for line in sys.stdin:
    said, wrong = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(json.loads(line), "<block>", "exec"), names)
    except BaseException:
        wrong = traceback.format_exc()
    print(json.dumps([said.getvalue(), wrong]), file=answers, flush=True)
"""


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
        folder: Where all of it happens.
        variables: Of the environment, beside those of this process.
        prelude: What the page's Python takes for granted.
    """

    def __init__(self, folder: Path, variables: dict[str, str], prelude: str = "") -> None:
        programs = folder / "bin"
        programs.mkdir()
        address = f"{tempfile.mkdtemp()}/commands"  # a socket's address is short
        python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
        commands = _CLIENT.format(python=sys.executable, address=address)
        for name, script in {"python": python, "peft-star": commands}.items():
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        self.folder = folder
        self.environment = {**os.environ, **variables, "PATH": f"{programs}:{os.environ['PATH']}"}
        self.prelude, self.interpreter, self.server = prelude, None, None
        self.address = Path(address)

    def run(self, block: Block) -> str:
        """Run a block and return what it printed; an AssertionError says what went wrong."""
        return {"bash": self.shell, "console": self.console, "python": self.python}[block.language](block.code)

    def shell(self, code: str) -> str:
        for name in _OUTPUT.findall(code):
            shutil.rmtree(self.folder / name, ignore_errors=True)  # a page may make again what it had
            if (self.folder / name).is_file():
                (self.folder / name).unlink()
        if self.server is None and "peft-star" in code:
            self.server = subprocess.Popen(
                [sys.executable, "-c", _SERVER, self.address], env=self.environment, stderr=subprocess.DEVNULL
            )
            while not self.address.exists():
                assert self.server.poll() is None, "the commands cannot be imported"
                time.sleep(0.05)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def console(self, code: str) -> str:
        """The commands of a session; what they print may differ."""
        return self.shell("\n".join(line[2:] for line in code.splitlines() if line.startswith("$ ")))

    def python(self, code: str) -> str:
        if self.interpreter is None:
            self.interpreter = subprocess.Popen(
                [sys.executable, "-c", _INTERPRETER],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            code = f"{self.prelude}\n{code}"
        self.interpreter.stdin.write(json.dumps(code) + "\n")
        self.interpreter.stdin.flush()
        said, wrong = json.loads(self.interpreter.stdout.readline())
        assert wrong is None, f"{code}\n{wrong}"
        return said

    def close(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()
        shutil.rmtree(self.address.parent)
        if self.interpreter is not None:
            self.interpreter.stdin.close()
            self.interpreter.wait(timeout=60)
