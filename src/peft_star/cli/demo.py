"""The command `peft-star demo`: a real small model is wrong, is repaired, and its patch is saved and loaded again."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import typer
from peft import get_peft_model
from rich.table import Table

from .. import RepairArguments, StarConfig, repair
from ..failures import read_rows
from ..loading import demo_model_path, load_model, load_patch
from ..sharing.patch_files import check_patch_output
from .app import EXIT_UNSOLVED, Json, Overwrite, PatchOutput, command, finish
from .console import escape, format_size, print_report, progress, quiet, status, stderr_console, visible
from .patches import save_patch

MODEL_NAME = "SmolLM2-135M-Instruct"
NEW_TOKENS = 24


@command()
def demo(
    output: PatchOutput = Path("peft-star-demo"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Repair a real small model, SmolLM2-135M-Instruct, and show every step. Takes about a minute on a CPU."""
    result = run_demo(output, overwrite=overwrite, as_json=as_json)
    finish(result, as_json)
    if not result["success"]:
        raise typer.Exit(EXIT_UNSOLVED)


def demo_rows(name: str) -> list[dict[str, Any]]:
    """The packaged rows: "failures" (what the model gets wrong) or "retain" (what it gets right)."""
    return read_rows(Path(str(files("peft_star") / "data" / f"demo_{name}.jsonl")))


def run_demo(output: Path, *, overwrite: bool = False, as_json: bool = False) -> dict[str, Any]:
    """Repair SmolLM2-135M-Instruct and show every step on standard error.

    Args:
        output: Directory for the patch.
        overwrite: Whether a patch that lies there may be replaced.
        as_json: Show nothing; the result tells.

    Returns:
        What the model said before, after, and with the patch loaded again; the report; whether all of it succeeded.

    Raises:
        FileNotFoundError: The model is not installed.
        ValueError: `output` may not be written.
    """
    path = demo_model_path()
    check_patch_output(output, overwrite)
    console = stderr_console()
    console.quiet = as_json

    failures, retained = demo_rows("failures"), demo_rows("retain")

    console.rule(f"1. What {MODEL_NAME} says", align="left")
    with status(f"Loading {MODEL_NAME}", as_json), quiet():
        base, tokenizer = load_model(path)
        before = [first_line(base, tokenizer, row["prompt"]) for row in failures]
    for row, text in zip(failures, before, strict=True):
        console.print(f"\n{escape(row['prompt'])}[bold red]{escape(text)}[/]", soft_wrap=True)

    console.rule("2. Repair: locate the neurons, solve the prior, patch, verify", align="left")
    arguments = RepairArguments(disable_tqdm=True)
    with progress(as_json) as callback, quiet():
        model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
        report = repair(model, tokenizer, failures, arguments, retain=retained, callbacks=[callback])
    print_report(report, console)

    console.rule("3. What it says now", align="left")
    with status("Generating", as_json), quiet():
        after = [first_line(model, tokenizer, row["prompt"]) for row in failures]
    table = Table("prompt ends in", "before", "after")
    for row, old, new in zip(failures, before, after, strict=True):
        ending = row["prompt"].splitlines()[-1]
        table.add_row(visible(ending), f"[red]{visible(old)}[/]", f"[green]{visible(new)}[/]")
    console.print(table)

    console.rule("4. The patch, saved, and loaded on a fresh copy of the model", align="left")
    size = save_patch(model, report, output, "peft-star demo", overwrite=overwrite)
    console.print(f"Saved to {escape(str(output))}: {format_size(size)}.", soft_wrap=True)
    del model, base
    with status(f"Loading {MODEL_NAME} again, and the patch", as_json), quiet():
        base, tokenizer = load_model(path)
        again = load_patch(base, output)
        reloaded = [first_line(again, tokenizer, row["prompt"]) for row in failures]
    same = reloaded == after
    console.print("It says the same." if same else "[bold red]It says something else.[/]")
    console.print("\nTo load it anywhere:\n")
    console.print(
        "    import peft_star\n"
        "    from peft import PeftModel\n"
        f'    model = PeftModel.from_pretrained(base, "{escape(str(output))}")\n',
        soft_wrap=True,
    )
    texts = zip(failures, before, after, reloaded, strict=True)
    return {
        "success": report.success and same,
        "model": str(path),
        "patch": str(output),
        "bytes": size,
        "rows": [{**row, "before": old, "after": new, "reloaded": again} for row, old, new, again in texts],
        "report": report.to_dict(),
    }


def first_line(model: Any, tokenizer: Any, prompt: str) -> str:
    """The rest of the prompt's last line, as greedy generation completes it."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.split("\n")[0]
