"""The command `peft-star`: one command a file, on the ground that `app.py` lays."""

# the commands register themselves; in this order, `peft-star --help` shows them
from . import repair, inspect, report, compare, evaluate, merge, export, push, demo  # noqa: F401, I001
from .app import main

__all__ = ["main"]
