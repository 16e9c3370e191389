"""What the commands stand on: the Typer app, the options that several of them share, exit codes and errors.

Messages, tables and progress go to standard error; standard output carries the one JSON document of `--json`, and
nothing else. Exit codes: 0 done, 1 done but not everything was repaired, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from .. import __version__
from ..loading import load_model
from ..text import harmless_json
from .console import escape, quiet, status, stderr_console
from .options import with_options

EXIT_OK, EXIT_UNSOLVED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="peft-star",
    help="Repair language models with sparse neuron patches (STAR), and share the patches as PEFT adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, a local directory, or a local .gguf file.")]
Patch = Annotated[str, typer.Argument(metavar="PATCH", help="A patch's directory, or its Hub id.")]
PatchOutput = Annotated[Path, typer.Option("--output", "-o", metavar="PATCH", help="Directory for the patch.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run of the same repair was stopped or killed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what OUTPUT holds, once the new is complete.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
DeviceMap = Annotated[str | None, typer.Option(help="Where to load MODEL: auto, cuda, cpu ...", show_default="cpu")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a MODEL on the Hub.")]
PatchRevision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the PATCHes on the Hub.", show_default=False)
]
OnePatchRevision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a PATCH on the Hub.", show_default=False)
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Take PATCHes that were solved for other weights than MODEL's, too.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the Hub a private one.")]
Token = Annotated[str | None, typer.Option(help="Access token for the Hub (or set HF_TOKEN).", show_default=False)]


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    app(args=args, prog_name="peft-star")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"peft-star {__version__}")
        raise typer.Exit()


def command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the command of its name, whose bad input ends in one sentence and exit code 2, not a traceback.

    A parameter that is annotated with [`Options`] stands for all of these.

    Args:
        settings: What `typer.Typer.command` takes.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        run = with_options(function)

        @functools.wraps(run)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            try:
                run(*args, **kwargs)
            except BrokenPipeError:
                raise  # whoever read our output went away
            # safetensors has a kind of error of its own for a disk that is full
            except (ValueError, OSError, ImportError, MemoryError, SafetensorError) as error:
                if os.environ.get("PEFT_STAR_DEBUG"):
                    raise
                fail(_sentence(error))
            except RuntimeError as error:
                if "home directory" not in str(error):  # of a path such as ~nobody/patch
                    raise
                fail("A path begins with ~ and the name of a user whom this machine does not know.")
            except KeyboardInterrupt:
                fail("Interrupted; nothing was written.", EXIT_INTERRUPTED)

        return app.command(**settings)(wrapper)

    return register


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    full = getattr(error, "errno", None) == errno.ENOSPC or isinstance(error, SafetensorError) and "No space" in text
    return (
        "No space is left where the output goes; nothing was written there. Free some, or choose another."
        if full
        else text
    )


def fail(message: str, code: int = EXIT_BAD_INPUT) -> NoReturn:
    """Say in one sentence why the command ends, and end it."""
    # an error may be one process's own
    console = stderr_console(always=code == EXIT_BAD_INPUT)
    console.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print a command's result, if it was asked for."""
    if as_json:
        typer.echo(harmless_json(json.dumps(result, ensure_ascii=False, indent=1)))


def load_base(model: str, as_json: bool, **kwargs: Any) -> tuple[Any, Any]:
    """The model and its tokenizer; `kwargs` are those of [`load_model`]."""
    with status(f"Loading {model}", as_json), quiet():
        return load_model(model, **kwargs)
