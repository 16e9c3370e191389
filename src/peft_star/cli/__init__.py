"""The command `peft-star`: one command a file, on the ground that `app.py` lays."""

from . import evaluate, export  # noqa: F401 (they register their commands)
from .app import main

__all__ = ["main"]
