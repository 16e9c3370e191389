"""The command `peft-star repair`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import get_peft_model

from .. import RepairArguments, RepairInterrupted, StarConfig, Unfinished
from .. import repair as run_repair
from ..engine.distributed import launched
from ..failures import read_rows
from ..loading import load_patch
from ..row_checks import check_contradictions
from ..sharing.download import short_name
from ..sharing.hub import check_repo_id, check_token
from ..sharing.patch_files import check_patch_output
from .app import (
    EXIT_INTERRUPTED,
    EXIT_UNSOLVED,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Overwrite,
    PatchOutput,
    Private,
    Resume,
    Revision,
    Token,
    command,
    fail,
    finish,
    load_base,
)
from .console import escape, format_size, is_main, print_report, progress, quiet, stderr_console
from .options import options_of, parse_amount
from .patches import check_patches, find_patches, push_patch, save_patch

LEFT_OUT = ("disable_tqdm",)  # the progress shown is the command's own
CONFIG = options_of(StarConfig, {"num_neurons": "--neurons"}, only=("num_neurons", "neuron_pattern"))
ARGUMENTS = options_of(
    RepairArguments,
    {
        "max_steps": "--steps",
        "learning_rate": "--lr",
        "verify_generation": "--generate/--no-generate",
    },
    first=("mode", "algorithm", "generalization", "max_steps"),
    left_out=LEFT_OUT,
)
LAYERS = str(StarConfig.num_layers)
DTYPE = "auto"


@command()
def repair(
    model: Model,
    failures: Annotated[
        Path,
        typer.Argument(
            metavar="FAILURES.jsonl", help='One {"prompt": ..., "completion": ...} a line; .csv and .parquet go, too.'
        ),
    ],
    output: PatchOutput,
    *,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATCH", help="A patch of MODEL to build upon: what it has repaired must stay right, too."
        ),
    ] = None,
    retain: Annotated[
        Path | None, typer.Option(metavar="RETAIN.jsonl", help="Rows of the same form that must stay right.")
    ] = None,
    related: Annotated[
        Path | None,
        typer.Option(
            metavar="RELATED.jsonl", help="Rows of the same form that are only looked at: does it carry over?"
        ),
    ] = None,
    config: Annotated[dict[str, Any], CONFIG],
    layers: Annotated[
        str,
        typer.Option(
            help="The last layers: a share such as 0.25, a number, 'all', 'occlusion' or 'occlusion:0.5', or indices "
            "such as 3,7,9."
        ),
    ] = LAYERS,
    arguments: Annotated[dict[str, Any], ARGUMENTS],
    dtype: Dtype = DTYPE,
    device_map: DeviceMap = None,
    revision: Revision = None,
    token: Token = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload the patch to this repository on the Hub.")
    ] = None,
    private: Private = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Find where MODEL fails, patch the neurons that cause it, verify, and save the patch.

    Exits with 0 when every failure is solved and nothing retained broke, and with 1 when not. Launched in several
    processes (`torchrun --nproc-per-node 2 -m peft_star repair ...`), it deals the rows out to them.
    """
    selection = parse_layers(layers)
    run_arguments = RepairArguments(**arguments, disable_tqdm=True)
    star_config = StarConfig(task_type="CAUSAL_LM", revision=revision, **config, **selection)
    found = find_patches([adapter] if adapter else [], token=token)
    # a patch that is built upon may be replaced by what is built
    sources = [patch.directory for patch in found if patch.directory.resolve() != output.expanduser().resolve()]
    check_patch_output(output, overwrite, inputs=(failures, retain, related, model, *sources))
    rows = read_rows(failures)
    others = {"retain": read_rows(retain) if retain else None, "related": read_rows(related) if related else None}
    check_contradictions(rows, others["retain"] or ())
    if push_to_hub:
        check_repo_id(push_to_hub)
        check_token(token)
    elif private:
        raise ValueError("--private is about --push-to-hub, which is not given.")

    target = output.expanduser().resolve()
    unfinished = Unfinished(target.with_name(f".{target.name}.unfinished"), resume)
    given: dict[str, Any] = {**others, "unfinished": unfinished}
    interrupted = False
    with launched() as device:
        place = {"device_map": device_map or device, "dtype": dtype}
        base, tokenizer = load_base(model, as_json, **place, revision=revision, token=token)
        check_patches(base, found, run_arguments.allow_other_base, "builds upon")
        with quiet():
            patched = get_peft_model(base, star_config) if not found else load_patch(base, found[0].directory)
        if found:
            _ask_for(patched.peft_config["default"], {**config, **selection})
        with progress(as_json) as callback, quiet():
            try:
                report = run_repair(patched, tokenizer, rows, run_arguments, **given, callbacks=[callback])
            except RepairInterrupted as error:
                report, interrupted = error.report, True
    if not is_main():
        return

    # as a reader can repeat it: options that differ from their defaults, and no path of this machine
    words = ["peft-star", "repair", short_name(model), failures.name, "-o", "PATCH"]
    words += ["--adapter", short_name(adapter)] if adapter else []
    words += ["--retain", retain.name] if retain else []
    words += ["--related", related.name] if related else []
    words += CONFIG.words(config)
    words += ["--layers", layers] if layers != LAYERS else []
    words += ARGUMENTS.words(arguments)
    words += ["--dtype", dtype] if dtype != DTYPE else []
    words += ["--revision", revision] if revision else []
    size = save_patch(patched, report, output, shlex.join(words), overwrite=overwrite)

    if not interrupted:
        unfinished.remove()

    result = {**report.to_dict(), "patch": str(output), "bytes": size, "pushed_to": None}
    result["resumed"] = unfinished.resumed
    if not as_json:
        if resume:
            went_on = "Went on where an earlier run stopped." if unfinished.resumed else "Found nothing to go on from."
            stderr_console().print(went_on)
        print_report(report, stderr_console())
        stderr_console().print(f"Patch saved to {escape(str(output))} ({format_size(size)}).", soft_wrap=True)
    if interrupted:
        finish(result, as_json)
        fail(f"Interrupted; what was finished is in {output}.", EXIT_INTERRUPTED)
    if push_to_hub:
        try:
            result["pushed_to"] = push_patch(output, push_to_hub, as_json, token=token, private=private or None)
        except (OSError, ValueError) as error:
            raise OSError(f"The patch is saved in {output}, but could not be pushed. {error}") from error
    finish(result, as_json)
    if not report.success:
        raise typer.Exit(EXIT_UNSOLVED)


def _ask_for(config: Any, values: dict[str, Any]) -> None:
    """Let a patch's configuration have the options that are not at their defaults; else its own settings hold."""
    for name, value in values.items():
        if value != getattr(StarConfig, name):
            setattr(config, name, value)
            if name == "num_neurons" and config.scope:
                config.scope["num_neurons"] = value


def parse_layers(text: str) -> dict[str, Any]:
    """What `--layers` says of a [`StarConfig`]: `layer_selection`, `num_layers` or both."""
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
        return {**selection, "num_layers": parse_amount("--layers", amount)}
    except ValueError:
        raise ValueError(
            f"--layers is {text!r}; give a whole number of at least 1, a share greater than 0 and up to 1.0, 'all', "
            "'occlusion', 'occlusion:' with such a number or share, or indices such as 3,7,9."
        ) from None
