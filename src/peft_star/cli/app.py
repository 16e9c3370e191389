"""The command `peft-star`.

Messages, tables and progress go to standard error; standard output carries the one JSON document of `--json`, and
nothing else. Exit codes: 0 done, 1 done but not everything was repaired, 2 bad input, 130 interrupted.
"""

# torch, transformers and peft are imported by the commands that need them, not here.
from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from ..files import bytes_of, check_output, new_directory
from ..loading import REPORT_NAME, check_fit, find_patch, load_model, load_patch, read_patch_config, read_patch_modules
from ..method.arguments import RepairArguments
from ..sharing.patch_files import check_patch_output
from .console import format_size, is_main, print_report, progress, quiet, status, stderr_console
from .saving import save_patch

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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what OUTPUT holds, once the new is complete.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
DeviceMap = Annotated[str | None, typer.Option(help="Where to load MODEL: auto, cuda, cpu ...", show_default="cpu")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a MODEL on the Hub.")]
PatchRevision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the PATCHes on the Hub.", show_default=False)
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the Hub a private one.")]
Token = Annotated[str | None, typer.Option(help="Access token for the Hub (or set HF_TOKEN).", show_default=False)]


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    app(args=args, prog_name="peft-star")


def _fail(message: str, code: int = EXIT_BAD_INPUT) -> NoReturn:
    # an error may be one process's own
    console = stderr_console(always=code == EXIT_BAD_INPUT)
    console.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose bad input ends in one sentence and exit code 2 instead of a traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except BrokenPipeError:
            raise  # whoever read our output went away
        except (ValueError, OSError, ImportError) as error:
            if os.environ.get("PEFT_STAR_DEBUG"):
                raise
            _fail(" ".join(str(error).split()) or type(error).__name__)
        except KeyboardInterrupt:
            _fail("Interrupted; nothing was written.", EXIT_INTERRUPTED)

    return wrapper


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from .. import __version__

        typer.echo(f"peft-star {__version__}")
        raise typer.Exit()


@app.command()
@_command
def repair(
    model: Model,
    failures: Annotated[
        Path, typer.Argument(metavar="FAILURES.jsonl", help='One {"prompt": ..., "completion": ...} a line.')
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATCH", help="Directory for the patch.")],
    retain: Annotated[
        Path | None, typer.Option(metavar="RETAIN.jsonl", help="Rows of the same form that must stay right.")
    ] = None,
    neurons: Annotated[
        str, typer.Option(help="Neurons in each patched layer: a number, or a share such as 0.1.")
    ] = "64",
    layers: Annotated[
        str,
        typer.Option(
            help="The last layers: a share such as 0.25, a number, 'all', 'occlusion' or 'occlusion:0.5', or indices "
            "such as 3,7,9."
        ),
    ] = "0.25",
    neuron_pattern: Annotated[
        str, typer.Option(help="Rank neurons within each layer (layer-wise) or over all of them (model-wise).")
    ] = "layer-wise",
    mode: Annotated[
        str, typer.Option(help="multiple: one prior for all failures; single: one after the other.")
    ] = RepairArguments.mode,
    algorithm: Annotated[
        str,
        typer.Option(
            help="protected: push each failure as strongly as it needs and protect background text; prior-guided: the "
            "paper's Algorithm 1."
        ),
    ] = RepairArguments.algorithm,
    generalization: Annotated[
        float,
        typer.Option(
            help="With protected: above 0 (5, say), prompts in which the expected tokens are plausible move further."
        ),
    ] = RepairArguments.generalization,
    steps: Annotated[
        int, typer.Option(help="At most this many steps for one set of failures.")
    ] = RepairArguments.max_steps,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = RepairArguments.learning_rate,
    norm: Annotated[str, typer.Option(help="Norm of the semantic delta: std, rms, max or l2.")] = RepairArguments.norm,
    margin: Annotated[
        float, typer.Option(help="Lead in probability at which a token counts as solved.")
    ] = RepairArguments.margin,
    no_generate: Annotated[
        bool, typer.Option("--no-generate", help="Check tokens only; do not also generate before and after.")
    ] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    token: Token = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload the patch to this repository on the Hub.")
    ] = None,
    private: Private = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find where MODEL fails, patch the neurons that cause it, verify, and save the patch.

    Exits with 0 when every failure is solved and nothing retained broke, and with 1 when not. Launched in several
    processes (`torchrun --nproc-per-node 2 -m peft_star repair ...`), it deals the rows out to them.
    """
    from ..failures import read_rows
    from ..sharing.hub import check_repo_id, check_token

    selection = {**_parse_layers(layers), "num_neurons": _parse_amount("--neurons", neurons)}
    check_patch_output(output, overwrite, inputs=(failures, retain, model))
    rows = read_rows(failures)
    retained = read_rows(retain) if retain else None
    if push_to_hub:
        check_repo_id(push_to_hub)
        check_token(token)
    elif private:
        raise ValueError("--private is about --push-to-hub, which is not given.")
    options = {
        "neurons": neurons,
        "layers": layers,
        "neuron_pattern": neuron_pattern,
        "mode": mode,
        "algorithm": algorithm,
        "generalization": generalization,
        "steps": steps,
        "lr": lr,
        "norm": norm,
        "margin": margin,
        "no_generate": no_generate,
        "dtype": dtype,
        "revision": revision,
    }

    from peft import get_peft_model

    from .. import RepairInterrupted, StarConfig
    from .. import repair as run_repair
    from ..engine.distributed import launched

    arguments = RepairArguments(
        learning_rate=lr,
        max_steps=steps,
        mode=mode,
        algorithm=algorithm,
        generalization=generalization,
        norm=norm,
        margin=margin,
        verify_generation=not no_generate,
        disable_tqdm=True,  # the progress shown is this module's own
    )
    config = StarConfig(task_type="CAUSAL_LM", neuron_pattern=neuron_pattern, revision=revision, **selection)

    interrupted = False
    with launched() as device:
        place = {"device_map": device_map or device, "dtype": dtype}
        base, tokenizer = _load(model, as_json, **place, revision=revision, token=token)
        with quiet():
            patched = get_peft_model(base, config)
        with progress(as_json) as callback, quiet():
            try:
                report = run_repair(patched, tokenizer, rows, arguments, retain=retained, callbacks=[callback])
            except RepairInterrupted as error:
                report, interrupted = error.report, True
    if not is_main():
        return
    size = save_patch(patched, report, output, _repair_command(model, failures, retain, options))

    result = {**report.to_dict(), "patch": str(output), "bytes": size, "pushed_to": None}
    if not as_json:
        print_report(report, stderr_console())
        stderr_console().print(f"Patch saved to {escape(str(output))} ({format_size(size)}).", soft_wrap=True)
    if interrupted:
        _finish(result, as_json)
        _fail(f"Interrupted; what was finished is in {output}.", EXIT_INTERRUPTED)
    if push_to_hub:
        try:
            result["pushed_to"] = _push(output, push_to_hub, as_json, token=token, private=private or None)
        except (OSError, ValueError) as error:
            raise OSError(f"The patch is saved in {output}, but could not be pushed. {error}") from error
    _finish(result, as_json)
    if not report.success:
        raise typer.Exit(EXIT_UNSOLVED)


@app.command()
@_command
def inspect(
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="A patch's directory, or its Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a PATCH on the Hub.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what PATCH touches and what its repair reported. Needs no base model."""
    directory = find_patch(patch, revision=revision, token=token)
    config = read_patch_config(directory)
    modules, others = read_patch_modules(directory)
    report = None
    if (directory / REPORT_NAME).is_file():
        from ..report import RepairReport

        report = RepairReport.load(directory / REPORT_NAME)
    size = bytes_of(directory)
    result = {
        "patch": patch,
        "base_model": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "neurons": sum(len(module["neurons"]) for module in modules),
        "parameters": sum(len(module["neurons"]) * module["outputs"] for module in modules),
        "bytes": size,
        "modules": modules,
        "modules_to_save": others,
        "config": config,
        "report": report.to_dict() if report else None,
    }
    if not as_json:
        console = stderr_console()
        console.print(f"[bold]{escape(patch)}[/], a STAR patch of {format_size(size)}", soft_wrap=True)
        console.print(f"Base model: {escape(str(result['base_model']))}", soft_wrap=True)
        console.print(
            f"{len(modules)} layers, {result['neurons']} neurons, {result['parameters']} parameters"
            + (f"; also saved: {escape(', '.join(others))}" if others else "")
        )
        table = Table("module", "neurons", "outputs", "norm", "largest", box=None, pad_edge=False)
        for module in modules:
            table.add_row(
                escape(module["name"]),
                str(len(module["neurons"])),
                str(module["outputs"]),
                f"{module['norm']:.4g}",
                f"{module['max']:.4g}",
            )
        console.print(table)
        if report:
            print_report(report, console, layers=False)
        else:
            console.print("No repair report.")
    _finish(result, as_json)


def _check_patches(
    base: Any,
    patches: list[str],
    directories: list[Path],
    configs: list[dict[str, Any]],
    allow_other_base: bool,
    does: str,
) -> None:
    """Raise ValueError unless every patch fits this base and was solved for its weights; `does`: what is done then."""
    from ..models.fingerprint import check_base

    for patch, directory, config in zip(patches, directories, configs, strict=True):
        check_fit(base, directory, patch)
        try:
            check_base(base, config, allow_mismatch=allow_other_base)
        except ValueError as error:
            raise ValueError(f"{patch}: {error} (--allow-other-base {does} it all the same.)") from error


@app.command()
@_command
def merge(
    model: Model,
    patches: Annotated[list[str], typer.Argument(metavar="PATCH...", help="Patches, applied in this order.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the merged model.")],
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    token: Token = None,
    patch_revision: PatchRevision = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Merge PATCHes that were solved for other weights, too.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write MODEL with PATCHes merged into its weights, as a full model that needs neither peft nor peft_star."""
    directories = [find_patch(patch, revision=patch_revision, token=token) for patch in patches]
    configs = [read_patch_config(directory) for directory in directories]
    check_output(output, overwrite, "config.json", inputs=(model, *directories))
    base, tokenizer = _load(model, as_json, dtype=dtype, device_map=device_map, revision=revision, token=token)

    # before the first merge: a merged patch is a change of the base, too
    _check_patches(base, patches, directories, configs, allow_other_base, "merges")
    for number, directory in enumerate(directories):
        patched = load_patch(base, directory, f"patch{number}")
        base = patched.merge_and_unload(safe_merge=True)
    with status("Saving", as_json), new_directory(output) as temporary, quiet():
        base.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    size = bytes_of(output)
    if not as_json:
        count = f"{len(patches)} patch{'es' if len(patches) > 1 else ''}"
        stderr_console().print(f"Merged {count}: {escape(str(output))} ({format_size(size)}).", soft_wrap=True)
    _finish({"model": model, "patches": patches, "output": str(output), "bytes": size}, as_json)


@app.command()
@_command
def push(
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="A patch's directory.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A repository on the Hub, such as you/your-patch.")],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made when it is missing.")] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Message of the commit.", show_default=False)
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Add the same patch as a plain LoRA in lora/, for those without peft_star.")
    ] = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Upload PATCH to the Hub: adapter, card, report, picture and LoRA twin, in one commit.

    The repository is created when it does not exist. Paths of this machine do not go along.
    """
    options = {"commit_message": message} if message else {}
    directory = find_patch(patch, token=token)
    url = _push(
        directory, repo, as_json, token=token, private=private or None, revision=revision, lora=lora, **options
    )
    _finish({"patch": patch, "repo": repo, "revision": revision, "pushed_to": url}, as_json)


@app.command()
@_command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATCH", help="Directory for the patch.")] = Path(
        "peft-star-demo"
    ),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Repair a real small model, SmolLM2-135M-Instruct, and show every step. Takes about a minute on a CPU."""
    from .demo import run_demo

    result = run_demo(output, overwrite=overwrite, as_json=as_json)
    _finish(result, as_json)
    if not result["success"]:
        raise typer.Exit(EXIT_UNSOLVED)


# options


def _parse_amount(option: str, text: str) -> int | float:
    """A count ("64") or a share ("0.1")."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if value > 0 and (kind is int or value <= 1):
                return value
    raise ValueError(
        f"{option} is {text!r}; give a whole number of at least 1, or a share greater than 0 and up to 1.0."
    )


def _parse_layers(text: str) -> dict[str, Any]:
    if text in ("all", "occlusion"):
        return {"layer_selection": text}
    if "," in text:
        try:
            # a trailing comma tells one index from a count
            return {"layer_selection": [int(index) for index in text.removesuffix(",").split(",")]}
        except ValueError:
            raise ValueError(f"--layers is {text!r}; indices are whole numbers with commas between them.") from None
    amount = text.removeprefix("occlusion:")
    selection = {"layer_selection": "occlusion"} if amount != text else {}
    try:
        return {**selection, "num_layers": _parse_amount("--layers", amount)}
    except ValueError:
        raise ValueError(
            f"--layers is {text!r}; give a whole number of at least 1, a share greater than 0 and up to 1.0, 'all', "
            "'occlusion', 'occlusion:' with such a number or share, or indices such as 3,7,9."
        ) from None


def _repair_command(model: str, failures: Path, retain: Path | None, options: dict[str, Any]) -> str:
    """The command as a reader can repeat it: options that differ from their defaults, and no path of this machine."""
    from ..sharing.card import short_name

    defaults = {name: item.default for name, item in signature(repair).parameters.items()}
    parts = ["peft-star", "repair", short_name(model), failures.name, "-o", "PATCH"]
    parts += ["--retain", retain.name] if retain else []
    for name, value in options.items():
        if value != defaults[name]:
            parts += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(parts)


def _load(model: str, as_json: bool, **kwargs: Any) -> tuple[Any, Any]:
    with status(f"Loading {model}", as_json), quiet():
        return load_model(model, **kwargs)


def _push(directory: Path, repo: str, as_json: bool, **kwargs: Any) -> str:
    from ..sharing.hub import push as push_patch

    with status(f"Pushing to {repo}", as_json), quiet():
        url = push_patch(directory, repo, **kwargs)
    if not as_json:
        stderr_console().print(f"Pushed to {escape(url)}", soft_wrap=True)
    return url


def _finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, indent=1))
