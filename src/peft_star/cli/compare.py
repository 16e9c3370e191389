"""The command `peft-star compare`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from ..evaluation.side_by_side import Pair, SideBySide, read_prompts, side_by_side
from ..loading import load_patch
from ..row_checks import number_of
from .app import (
    AllowOtherBase,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Patch,
    PatchRevision,
    Revision,
    Token,
    command,
    finish,
    load_base,
)
from .console import escape, quiet, status, stderr_console, visible
from .patches import check_patches, find_patches

SHOWN_PAIRS = 20
SHOWN_PROMPT = 60  # characters of a prompt's last line


@command()
def compare(
    model: Model,
    patch: Patch,
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS.jsonl", help='One {"prompt": ...} a line; other columns do not count.')
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens generated behind a prompt.")] = 64,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    token: Token = None,
    patch_revision: PatchRevision = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Show what MODEL generates with PATCH and without it, and how many texts change at all."""
    texts = read_prompts(prompts)
    patches = find_patches([patch], revision=patch_revision, token=token)
    base, tokenizer = load_base(model, as_json, dtype=dtype, device_map=device_map, revision=revision, token=token)
    check_patches(base, patches, allow_other_base, "compares")
    with status("Loading the patch", as_json), quiet():
        patched = load_patch(base, patches[0].directory)
    with _bar(2 * len(texts), as_json) as advance, quiet():
        result = side_by_side(patched, tokenizer, texts, max_new_tokens=max_new_tokens, progress=advance)
    if not as_json:
        _print(result, texts)
    finish({"model": model, "patch": patch, "max_new_tokens": max_new_tokens, **result.to_dict()}, as_json)


@contextlib.contextmanager
def _bar(total: int, as_json: bool) -> Iterator[Callable[[int], None]]:
    console = stderr_console()
    if as_json or not console.is_terminal:
        yield lambda count: None
        return
    with Progress(console=console, transient=True) as progress:
        task: Any = progress.add_task("Generating", total=total)
        yield lambda count: progress.advance(task, count)


def _print(result: SideBySide, prompts: Sequence[Any]) -> None:
    console, changed = stderr_console(), result.changed
    if changed:
        table = Table("prompt", "ends in", "base", "patched", show_lines=True)
        for column in table.columns[1:]:
            column.overflow = "fold"
        for pair in changed[:SHOWN_PAIRS]:
            prompt = prompts[pair.row]
            prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            ending = prompt.rstrip("\n").split("\n")[-1][-SHOWN_PROMPT:]
            cells = (_marked(pair, pair.base, pair.base_ended, "red"), _marked(pair, pair.patched, pair.patched_ended))
            table.add_row(str(number_of(prompts, pair.row)), visible(ending), *cells)
        console.print(table)
    if len(changed) > SHOWN_PAIRS:
        console.print(f"... and {len(changed) - SHOWN_PAIRS} more; --json has them all.")
    console.print(f"{len(changed)} of {len(result.pairs)} texts change.")


def _marked(pair: Pair, text: str, ended: bool, color: str = "green") -> str:
    """A text with what lies behind the first difference coloured, and its first word marked."""
    same, rest = text[: pair.at], text[pair.at :]
    word = len(rest) - len(rest.lstrip()) + len((rest.split() or [""])[0])
    first = f"[bold underline {color}]{escape(rest[:word])}[/]" if rest else ""
    end = "[dim](ends)[/]" if ended else ""
    return f"[dim]{escape(same)}[/]{first}[{color}]{escape(rest[word:])}[/]{end}"
