"""The command `peft-star evaluate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from ..evaluation import (
    Comparison,
    Evaluation,
    Harm,
    OwnTextsProbe,
    TextProbe,
    TextsHarm,
    compare,
    read_prompts,
    write_json,
)
from ..evaluation import evaluate as run_evaluation
from ..failures import read_rows
from ..files import check_writable, read_json
from ..loading import REPORT_NAME, load_patch
from ..report import RepairReport
from .app import (
    EXIT_INTERRUPTED,
    AllowOtherBase,
    DeviceMap,
    Dtype,
    Json,
    Model,
    PatchRevision,
    Revision,
    Token,
    command,
    fail,
    finish,
    load_base,
)
from .console import escape, quiet, status, stderr_console
from .patches import FoundPatch, check_patches, find_patches
from .spread import SpreadCommand

METRICS = {
    "rows exactly right": "exact",
    "edit similarity": "edit_similarity",
    "BLEU": "bleu",
    "ROUGE-L": "rouge_l",
}


@command(cls=SpreadCommand)
def evaluate(
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.jsonl", help='One {"prompt": ..., "completion": ...} a line; .csv and .parquet go, too.'
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="PATCH ...", help="Patches to evaluate, all on the model at once."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE ...", help="Text, prose or code, to measure the patches' harm on."),
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each --text that are read.")] = 256,
    own_texts: Annotated[
        bool | None,
        typer.Option(
            "--own-texts/--no-own-texts",
            help=(
                "Measure how many texts that MODEL says by itself come out unchanged, to prompts that come with the "
                "package. By default unless --no-generation."
            ),
        ),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts", metavar="FILE ...", help='The same of your own prompts, one {"prompt": ...} a line.'
        ),
    ] = None,
    no_generation: Annotated[
        bool, typer.Option("--no-generation", help="Score teacher-forced predictions only, which is much faster.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT.json", help="Also write the results to this file.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    token: Token = None,
    patch_revision: PatchRevision = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Score MODEL on DATA, teacher-forced and generated, and with PATCHes beside it.

    `--json` prints one JSON document on standard output; `--json OUT.json` writes it to a file instead, as `-o` does.
    """
    texts, asked = text or [], prompts or []
    rows = read_rows(data)
    for option, given in (("--text", texts), ("--prompts", asked), ("--own-texts", own_texts)):
        if given and not adapter:
            raise ValueError(f"{option} measures the harm that patches do; give --adapter, too.")
    sources: list[tuple[Path | None, Any]] = [(path, read_prompts(path)) for path in asked]
    if own_texts or own_texts is None and not no_generation:
        sources.insert(0, (None, None))
    contents = [_read_text(path) for path in texts]
    if output is not None:
        _check_output_file(output, (data, *texts, *asked, model))
    patches = find_patches(adapter or [], revision=patch_revision, token=token)

    base, tokenizer = load_base(model, as_json, dtype=dtype, device_map=device_map, revision=revision, token=token)
    check_patches(base, patches, allow_other_base, "evaluates")

    def run(name: str, network: Any) -> Evaluation:
        with _bar(name, len(rows) * (1 if no_generation else 2), as_json) as advance, quiet():
            return run_evaluation(network, tokenizer, rows, generate=not no_generation, progress=advance)

    result: dict[str, Any] = {
        "model": model,
        "data": str(data),
        "adapters": [_costs(patch) for patch in patches],
        "base": None,
        "patched": None,
        "comparison": None,
        "own_texts": None,
        "texts": None,
        "interrupted": False,
    }
    before = after = comparison = harms = owns = None
    try:
        if patches:
            probes = [TextProbe(base, tokenizer, content, text_tokens) for content in contents]
            voices = _voices(base, tokenizer, [found for _, found in sources], as_json)
        before = run("base", base)
        result["base"] = before.to_dict()
        if patches:
            patched = _put_on(base, patches, as_json)
            after = run("patched", patched)
            comparison = compare(before, after)
            result |= {"patched": after.to_dict(), "comparison": comparison.to_dict()}
            owns = [probe(patched) for probe in voices]
            result["own_texts"] = [
                {"prompts": None if path is None else str(path), **item.to_dict()}
                for (path, _), item in zip(sources, owns)
            ]
            harms = [probe(patched) for probe in probes]
            result["texts"] = [{"text": str(path), **item.to_dict()} for path, item in zip(texts, harms)]
    except KeyboardInterrupt:
        if before is None:
            raise
        result["interrupted"] = True
    if not as_json:
        _print(before, after, comparison)
        _print_own_texts([(path, item) for (path, _), item in zip(sources, owns or [])])
        _print_texts(list(zip(texts, harms or [])))
    if output is not None:
        write_json(output.expanduser(), result)
        if not as_json:
            stderr_console().print(f"Written to {escape(str(output))}.", soft_wrap=True)
    finish(result, as_json)
    if result["interrupted"]:
        fail(
            "Interrupted; " + ("the base model alone was evaluated." if after is None else "no harm was measured."),
            EXIT_INTERRUPTED,
        )


def _voices(base: Any, tokenizer: Any, prompts: list[Any], as_json: bool) -> list[OwnTextsProbe]:
    """What the base says by itself to each set of prompts, None being the package's."""
    if not prompts:
        return []
    with status("Generating the model's own texts", as_json), quiet():
        return [OwnTextsProbe(base, tokenizer, found) for found in prompts]


def _read_text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def _check_output_file(path: Path, inputs: tuple[str | Path, ...]) -> None:
    """Refuse, before any work is done, a file that could not or should not be written at the end."""
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a directory; the output is a file.")
    for item in inputs:
        if Path(item).expanduser().exists() and path.exists() and path.samefile(Path(item).expanduser()):
            raise ValueError(f"{path} is the input {item}; choose another file for the output.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no directory {path.absolute().parent}.")
    check_writable(path)
    if path.is_file() and path.stat().st_size:
        try:
            earlier = read_json(path)
        except ValueError:
            earlier = None
        if not isinstance(earlier, dict) or not {"base", "patched", "comparison"} <= earlier.keys():
            raise ValueError(f"{path} is no earlier evaluation, so it is not replaced; choose another file.")


def _put_on(base: Any, patches: list[FoundPatch], as_json: bool) -> Any:
    """The model with all patches on it, stacked."""
    names = [f"patch{number}" for number in range(len(patches))]
    with status("Loading the patches", as_json), quiet():
        patched = base
        for name, patch in zip(names, patches):
            patched = load_patch(patched, patch.directory, name)
        patched.base_model.set_adapter(names, inference_mode=True)
    return patched


def _costs(patch: FoundPatch) -> dict[str, Any]:
    """What the patch's repair reported: its failures, and seconds for each."""
    path = patch.directory / REPORT_NAME
    if not path.is_file():
        return {"patch": patch.name, "failures": None, "solved": None, "seconds": None, "seconds_per_failure": None}
    report = RepairReport.load(path)
    seconds, count = sum(report.seconds.values()) or None, len(report.failures)
    return {
        "patch": patch.name,
        "failures": count,
        "solved": report.num_solved,
        "seconds": seconds,
        "seconds_per_failure": seconds / count if seconds and count else None,
    }


@contextlib.contextmanager
def _bar(name: str, total: int, as_json: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one plain line elsewhere, nothing with `--json`."""
    console = stderr_console()
    if as_json or not console.is_terminal:
        if not as_json:
            console.print(f"Evaluating: {name}")
        yield lambda count: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"Evaluating: {name}", total=total)
        yield lambda count: progress.advance(task, count)


def _print(before: Evaluation, after: Evaluation | None, comparison: Comparison | None) -> None:
    console = stderr_console()
    console.print(f"{len(before.rows)} rows, {before.tokens} completion tokens")
    table = Table("", "base", *(("patched", "difference") if after else ()), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(label: str, was: float, now: float | None, better: int = 1) -> None:
        cells = [f"{was:.4f}"]
        if now is not None:
            color = "dim" if now == was else "green" if (now - was) * better > 0 else "red"
            cells += [f"{now:.4f}", f"[{color}]{now - was:+.4f}[/]"]
        table.add_row(f"  {label}", *cells)

    table.add_row("[bold]teacher-forced[/]")
    add("tokens right", before.exact_match, after.exact_match if after else None)
    add("perplexity", before.perplexity, after.perplexity if after else None, better=-1)
    for kind in ("teacher_forced", "generated"):
        if kind == "generated" and before.generated:
            table.add_row("[bold]generated[/]")
        for label, name in METRICS.items():
            if scores := getattr(before, kind):
                add(label, getattr(scores, name), getattr(getattr(after, kind), name) if after else None)
    console.print(table)
    if comparison:
        table = Table(box=None, show_header=False, pad_edge=False)
        for label, part, whole, share in (
            ("failing tokens solved", comparison.solved, comparison.failures, comparison.solved_share),
            ("right tokens broken", comparison.broken, comparison.right, comparison.broken_share),
        ):
            table.add_row(label, f"{part} of {whole} ({share:.2%})")
        table.add_row("rows fixed, broken", f"{len(comparison.rows_fixed)}, {len(comparison.rows_broken)}")
        if comparison.generations_fixed is not None and comparison.generations_broken is not None:
            fixed, broken = len(comparison.generations_fixed), len(comparison.generations_broken)
            table.add_row("generations fixed, broken", f"{fixed}, {broken}")
        console.print(table)


def _print_own_texts(harms: list[tuple[Path | None, TextsHarm]]) -> None:
    """What stays of the texts that the model says by itself, by whose prompts they answer."""
    console = stderr_console()
    table = Table("own texts", "unchanged", "first words", "tokens changed", "KL", box=None, pad_edge=False)
    for path, item in harms:
        if item.texts:
            table.add_row(
                "package's prompts" if path is None else escape(path.name),
                f"{item.unchanged} of {item.texts} ({item.unchanged_share:.2%})",
                f"{item.first_words} of {item.texts}",
                f"{item.changed} of {item.tokens} ({item.changed / item.tokens:.2%})",
                f"{item.kl:.4g}",
            )
        else:
            source = "the package's prompts" if path is None else escape(path.name)
            console.print(f"The model has no texts of its own to {source}, so none could change.", soft_wrap=True)
    if table.row_count:
        console.print(table)


def _print_texts(harms: list[tuple[Path, Harm]]) -> None:
    """The harm to other text."""
    if not harms:
        return
    table = Table("text", "tokens", "KL", "perplexity", "right tokens broken", box=None, pad_edge=False)
    for path, item in harms:
        table.add_row(
            escape(path.name),
            str(item.tokens),
            f"{item.kl:.4g}",
            f"{item.perplexity_before:.4g} -> {item.perplexity_after:.4g} (x{item.perplexity_ratio:.3f})",
            f"{item.broken} of {item.right_before} ({item.broken_share:.2%})",
        )
    stderr_console().print(table)
