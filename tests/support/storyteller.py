"""A process that has imported what takes long, and forks for whatever a story runs: `Storyteller`.

Importing torch and transformers takes longer than most commands. Its children are as processes of their own: streams,
folder, environment and exit code are what their client gives and gets.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

STARTUP = Path(__file__).parent / "startup"
# `peft-star` as a program on the PATH: it has the process fork, and ends as its child does
PROGRAM = """#!{python} -S
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = ["command", sys.argv[1:], os.getcwd(), dict(os.environ)]
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or 1))
"""


class Storyteller:
    """The process, from outside. It starts when it is first asked for something.

    Args:
        variables: Of the environment that it imports things in, beside those of this process.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.folder = tempfile.mkdtemp()  # a socket's address is short
        self.address = f"{self.folder}/address"
        self.environment = {**os.environ, **variables}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.address],
                env=self.environment,
                stdin=subprocess.PIPE,  # its end is this process's end
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        while not os.path.exists(self.address):
            assert self.process.poll() is None, "what stories need cannot be imported"
            time.sleep(0.05)

    def ask(
        self,
        kind: str,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        streams: Sequence[int | IO[Any]],
    ) -> socket.socket:
        """Start a "command", a "script" or an "interpreter"; its exit code comes as text when it ends."""
        self.start()
        client = socket.socket(socket.AF_UNIX)
        client.connect(self.address)
        numbers = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
        socket.send_fds(client, [json.dumps([kind, list(words), str(folder), dict(environment)]).encode()], numbers)
        return client

    def script(self, path: Path, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a Python script to its end."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
            client = self.ask("script", [str(path)], folder, environment, (nothing, out, err))
            code = int(client.recv(16) or 1)
            client.close()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess([str(path)], code, out.read(), err.read())

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)


# from here on in the process itself


def _interpret() -> None:
    """Run what comes, a block of JSON a line, in one namespace, as a reader does who types one after the other."""
    import io
    import traceback

    names: dict[str, Any] = {"__name__": "__main__"}
    answers = sys.stdout
    for line in sys.stdin:
        said, wrong = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(said):
                exec(compile(json.loads(line), "<block>", "exec"), names)
        except BaseException:
            wrong = traceback.format_exc()
        print(json.dumps([said.getvalue(), wrong]), file=answers, flush=True)


def _run(kind: str, words: list[str]) -> None:
    import runpy

    from peft_star.cli import main

    if kind == "command":
        main(words)
    elif kind == "script":
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")
    else:
        _interpret()


def _be_the_child(client: socket.socket, message: bytes, streams: Sequence[int]) -> None:
    """Do what a client asks for, tell it the exit code, and end."""
    code = 1
    try:
        kind, words, folder, environment = json.loads(message)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        _run(kind, words)
        code = 0
    except SystemExit as end:
        code = int(end.code if isinstance(end.code, int) else end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        client.sendall(str(code).encode())
        os._exit(code)


def serve(address: str) -> None:
    """Fork for each client until standard input ends."""
    import select

    import transformers.models.llama  # noqa: F401

    from peft_star.loading import demo_model_path

    try:
        import gguf

        gguf.GGUFReader(demo_model_path())  # for all children, see `startup`
    except (ImportError, FileNotFoundError):
        pass
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{address}.new")
    server.listen()
    os.rename(f"{address}.new", address)
    children = set()
    while server in select.select([server, 0], [], [])[0]:
        client, _ = server.accept()
        message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
        if (child := os.fork()) == 0:
            server.close()
            _be_the_child(client, message, streams)
        children.add(child)
        children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
        for stream in streams:
            os.close(stream)
        client.close()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1])
