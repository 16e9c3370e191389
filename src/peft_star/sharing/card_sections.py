"""The sections of a patch's card: how to load it, what it repairs, what was checked for damage."""

from __future__ import annotations

from ..report import RepairReport, code
from .download import short_name
from .patch_files import LORA_DIR, PLOT_NAME, Patch

SHOWN_ROWS = 20

_CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}


def size(report: RepairReport | None, patch: Patch | None) -> str:
    counts = [len(neurons) for neurons in patch.neurons.values()] if patch else []
    if not counts and report:
        counts = [len(layer.neurons) for layer in report.layers]
    if not counts:
        return ""
    return f"{sum(counts)} neurons in {len(counts)} feed-forward layer{'s' if len(counts) > 1 else ''} of "


def usage(
    where: str, base: str | None, name: str | None, revision: str | None, task: str, subfolder: str | None
) -> list[str]:
    kind = _CLASSES.get(task, "")
    inside = f', subfolder="{subfolder}"' if subfolder else ""
    lines = ["import peft_star  # makes PEFT know the method"]
    if base and kind and not subfolder:
        lines += [
            f"from peft import AutoPeftModel{kind}",
            "",
            f'model = AutoPeftModel{kind}.from_pretrained("{where}")',
        ]
        after = f"It loads {base} and puts the patch on it. "
    else:
        kind = _auto_class(task)
        lines += [
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f"base = {kind}.from_pretrained({_source(base, name, revision)})",
            f'model = PeftModel.from_pretrained(base, "{where}"{inside})',
        ]
        after = ""
    after += "`model = model.merge_and_unload()` makes it an ordinary model; `peft-star merge` does the same on disk."
    code = "\n".join(lines)
    return [f"## How to load it\n\nWith `pip install peft-star`:\n\n```python\n{code}\n```\n\n{after}"]


def _source(base: str | None, name: str | None, revision: str | None) -> str:
    """The arguments with which transformers loads the base model."""
    if not base and name and name.lower().endswith(".gguf"):
        return f'"path/to/its/directory", gguf_file="{short_name(name)}"'
    at = f', revision="{revision}"' if base and revision else ""
    return f'"{base or "path/to/the/base-model"}"{at}'


def _auto_class(task: str) -> str:
    # without a task a language model is most likely: it is what can be repaired
    return "AutoModel" + ("" if task == "FEATURE_EXTRACTION" else _CLASSES.get(task, "ForCausalLM"))


def twin(where: str, base: str | None, name: str | None, revision: str | None, task: str) -> list[str]:
    kind = _auto_class(task)
    code = "\n".join(
        (
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f"base = {kind}.from_pretrained({_source(base, name, revision)})",
            f'model = PeftModel.from_pretrained(base, "{where}", subfolder="{LORA_DIR}")',
        )
    )
    return [
        "### Without peft_star\n\n"
        f"The directory `{LORA_DIR}/` holds the same patch as a plain LoRA, exact up to float rounding, for PEFT "
        f"alone, vLLM or llama.cpp:\n\n```python\n{code}\n```"
    ]


def repaired(report: RepairReport, plot: bool, where: str) -> list[str]:
    picture = (
        "\n\n![Each failing token's lead over its strongest rival before and after, and the patch's size by layer]"
        f"({PLOT_NAME})"
    )
    return [
        f"## What was repaired\n\n{report.to_markdown(SHOWN_ROWS).strip()}{picture if plot else ''}"
        f"\n\n`peft-star report {where} -o report.html` shows all of it as a page, with a map of the patched neurons."
    ]


def damage(report: RepairReport) -> list[str]:
    figures = report.summary()
    lines = []
    retained = [row for row in report.rows if row.source == "retain"]
    if retained:
        right = sum(row.exact_before for row in retained)
        lines.append(
            f"- Rows that had to stay right: {len(retained)}. Right before the patch: {right}. "
            f"Broken by it: {figures['retained_rows_broken'] or 'none'}."
        )
    else:
        lines.append("- No rows that had to stay right were given, so only the failing rows themselves were checked.")
    lines.append(
        f"- Tokens of all these rows that were right before the patch and are wrong after it: "
        f"{figures['tokens_broken'] or 'none'}."
    )
    for name, seen in figures.get("served", {}).items():
        lines.append(
            f"- Failing rows that are right when the model computes as {code(name)}, of {figures['rows']}: "
            f"{seen['rows_exact_before']} before, {seen['rows_exact_after']} after."
        )
    if "rows_generated_exact_after" in figures:
        lines.append(
            f"- Failing rows that greedy generation completes exactly, of {figures['rows']}: "
            f"{figures['rows_generated_exact_before']} before, {figures['rows_generated_exact_after']} after."
        )
    if report.interrupted:
        lines.append("- The repair was interrupted before it was done.")
    text = "\n".join(lines)
    return [f"## What was checked for damage\n\n{text}\n\nNothing is known about any other text."]
