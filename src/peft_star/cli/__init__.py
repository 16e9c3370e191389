"""The command `peft-star`: one command a file, on the ground that `app.py` lays."""

# the commands register themselves; in this order, `peft-star --help` shows them
from . import (  # noqa: I001
    repair,  # noqa: F401
    inspect,  # noqa: F401
    log,  # noqa: F401
    check,  # noqa: F401
    report,  # noqa: F401
    compare,  # noqa: F401
    evaluate,  # noqa: F401
    diff,  # noqa: F401
    revert,  # noqa: F401
    stack,  # noqa: F401
    merge,  # noqa: F401
    export,  # noqa: F401
    push,  # noqa: F401
    demo,  # noqa: F401
)
from .app import main

__all__ = ["main"]
