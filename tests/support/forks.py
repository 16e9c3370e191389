"""The command line in processes that start at once, to be killed: one process imports, and forks for each run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SERVER = """
import json, os, sys
answers, sys.stdout = sys.stdout, sys.stderr
from peft_star.cli.app import main
for line in sys.stdin:
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            main(json.loads(line))
        except SystemExit as exit_:
            os._exit(exit_.code or 0)
        os._exit(99)
    print(child, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


class Forks:
    """Runs of the command line, one at a time."""

    def __init__(self) -> None:
        # a fork has no other threads than the one that forks
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *args: Any, kill: Callable[[], None] | None = None) -> int:
        """Run the command line; where `kill` is given, it is killed when that returns. Returns the exit code, −9 when
        it was killed in time."""
        self.process.stdin.write(json.dumps([str(arg) for arg in args]) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill is not None:
            kill()
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def timed(forks: Forks, *args: Any) -> tuple[int, float]:
    """The exit code of a run, and its seconds."""
    start = time.monotonic()
    return forks.run(*args), time.monotonic() - start
