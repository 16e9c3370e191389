"""The model card of a patch: what it repairs, what was checked, and how to load it with and without this package.

A patch that was written as a LoRA gets a card of its own, which says what it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from peft import PeftConfig

from ..report import RepairReport, code
from .download import looks_like_path
from .patch_files import (
    CARD_NAME,
    CONFIG_NAME,
    LORA_DIR,
    PLOT_NAME,
    REPORT_NAME,
    WEIGHTS_NAME,
    Patch,
    patch_folders,
    read_patch_config,
)

SHOWN_ROWS = 20

# the ranks that vLLM reserves memory for; an adapter of any rank up to that loads
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

_TAGS = ("peft_star", "star", "model-repair")
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}

_HEADER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# what PEFT adds to a card when a patch is saved over an earlier one
_PEFT_ADDS = re.compile(r"(?<=-->)\s*### Framework versions\s+- PEFT \S+\s*\Z")
# the last line of this package's cards: hashes of the text, to tell whether somebody edited it, and of the weights
_SIGNATURE = re.compile(r"\n<!-- peft_star: card ([0-9a-f]+), patch ([0-9a-f]+|none) -->\s*\Z")
_COMMAND = re.compile(r"^## How it was made\n\n```bash\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
# what PEFT and transformers put into the template of huggingface_hub
_GENERIC = ("### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model")


def hub_id(name: str | None) -> str | None:
    """`name` when it is a model's id on the Hub, None when it is a path of this machine or nothing at all."""
    if not name or looks_like_path(name) or Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def short_name(name: str) -> str:
    """A Hub id as it is, and of a path the last part: the rest tells about a machine."""
    return hub_id(name) or [part for part in re.split(r"[\\/]", name) if part][-1:][0]


def model_card(
    config: PeftConfig | Mapping[str, Any],
    report: RepairReport | None = None,
    *,
    repo_id: str | None = None,
    subfolder: str | None = None,
    command: str | None = None,
    patch: Patch | None = None,
    lora: bool = False,
    plot: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """The text of a patch's card.

    A base model that is no Hub id is named by its file and fingerprint only: the Hub refuses paths, and a path tells
    about the machine of the repair.

    Args:
        config: The patch's configuration, as an object or as the dict in its `adapter_config.json`.
        report: What the repair reported.
        repo_id: The repository that the patch goes to.
        subfolder: Where in the repository the patch lies, if not at the top.
        command: The command that made the patch.
        patch: What the patch holds; without it the report's layers are counted.
        lora: Whether the same patch lies beside as a plain LoRA, in `lora/`.
        plot: Whether the report's picture lies beside.
        metadata: Fields of an earlier card to keep, such as a license.
    """
    read = config.get if isinstance(config, Mapping) else lambda name, default=None: getattr(config, name, default)
    name, task = read("base_model_name_or_path"), str(read("task_type") or "").removeprefix("TaskType.")
    base = hub_id(name)
    fields = dict(metadata or {})
    for key in ("base_model", "pipeline_tag"):
        fields.pop(key, None)
    fields["library_name"] = "peft"
    if base:
        fields["base_model"] = base
    if task in _PIPELINES:
        fields["pipeline_tag"] = _PIPELINES[task]
    fields["tags"] = list(dict.fromkeys((*_TAGS, *_own_tags(fields.get("tags")))))

    if base:
        base_text = f"[{base}](https://huggingface.co/{base})"
    else:
        base_text = f"`{short_name(name)}`" if name else "its base model"
    title = repo_id.split("/")[-1] if repo_id else f"STAR patch of {short_name(name) if name else 'a language model'}"
    sections = [
        f"# {title}",
        f"A patch of {_size(report, patch)}{base_text}, made with peft_star. It repairs single tokens that the "
        "model gets wrong: it changes the neurons that cause them, and no other weight.",
    ]
    fingerprint = read("base_fingerprint")
    if fingerprint and fingerprint != "unknown":
        sections.append(
            "The patch fits the weights that it was made for and no others; their fingerprint, as "
            f"`peft_star.fingerprint(model)` gives it: `{fingerprint}`"
        )
    where = repo_id or "path/to/this/directory"
    sections += _usage(where, base, name, read("revision"), task, subfolder)
    sections += _twin(where, base, name, read("revision"), task) if lora else []
    if report:
        sections += _repaired(report, plot, where) + _damage(report)
    if command:
        sections.append(f"## How it was made\n\n```bash\n{command}\n```")
    if report and report.versions:
        sections.append("Made with " + ", ".join(f"{key} {value}" for key, value in report.versions.items()) + ".")
    sections.append(
        "The method is STAR: Gu, Chen, Aleti, Zhang, *A Semantic-based Optimization Approach for Repairing LLMs: Case "
        "Study on Code Generation*."
    )
    return _header(fields) + "\n" + "\n\n".join(sections) + "\n"


def write_card(
    directory: str | Path,
    report: RepairReport | None = None,
    *,
    repo_id: str | None = None,
    command: str | None = None,
    is_base: Callable[[str], bool] | None = None,
) -> Path:
    """Write the card of the patch in `directory`, in place of a generic one.

    A card that somebody wrote or edited is kept; only a `base_model` in its metadata that is no Hub id is taken out.
    So is this package's own card when there is nothing to add: the patch is the same and no report is given.

    Args:
        directory: A patch as `save_pretrained` wrote it: at the top, or one directory for each named adapter.
        report: What the repair reported; by default the `repair_report.json` in the directory.
        repo_id: The repository that the patch goes to.
        command: The command that made the patch; by default what an earlier card says.
        is_base: Tells whether a base model's name, valid as a Hub id, is one; by default every valid name is.

    Returns:
        The path of the card.

    Raises:
        ValueError: There is no patch in `directory`, or its configuration or report is damaged.
    """
    directory = Path(directory)
    path = directory / CARD_NAME
    folder = patch_folders(directory)[0]
    if report is None and (folder / REPORT_NAME).is_file():
        report = RepairReport.load(folder / REPORT_NAME)
    config = read_patch_config(folder)
    base = hub_id(config.get("base_model_name_or_path"))
    if base and is_base and not is_base(base):
        config["base_model_name_or_path"] = f"./{base}"  # a path, whatever it looks like

    weights = folder / WEIGHTS_NAME
    patch_hash = hashlib.sha256(weights.read_bytes()).hexdigest()[:12] if weights.is_file() else "none"
    fields, text = read_card(path)
    text = _PEFT_ADDS.sub("", text)
    signature = _SIGNATURE.search(text)
    own = signature is not None and signature[1] == _hash(_SIGNATURE.sub("", text))
    same = signature is not None and signature[2] == patch_hash
    if (own and report is None and same) or not (own or _is_generic(text)):
        clean_card(path, is_base)
        return path
    if own and command is None:
        known = _COMMAND.search(text)
        command = known[1] if known else None
    patch = None
    with contextlib.suppress(ValueError):  # a card must not cost the repair whose patch it describes
        patch = Patch.read(folder)
    card = model_card(
        config,
        report,
        repo_id=repo_id,
        subfolder=folder.name if folder != directory else None,
        command=command,
        patch=patch,
        lora=(directory / LORA_DIR / CONFIG_NAME).is_file(),
        plot=(directory / PLOT_NAME).is_file(),
        metadata=fields,
    )
    body = _HEADER.sub("", card)
    path.write_text(f"{card}\n<!-- peft_star: card {_hash(body)}, patch {patch_hash} -->\n", encoding="utf-8")
    return path


def clean_card(path: Path, is_base: Callable[[str], bool] | None = None) -> None:
    """Take out of a card's metadata what the Hub refuses: a base model that is a path."""
    fields, text = read_card(path)
    base = fields.get("base_model")
    if not fields or not isinstance(base, str):
        return
    if not hub_id(base) or (is_base and not is_base(base)):
        del fields["base_model"]
        fields["tags"] = _own_tags(fields.get("tags"))
        path.write_text(_header(fields) + text, encoding="utf-8")


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text; both empty when there is no card, the former when it cannot be read."""
    if not path.is_file():
        return {}, ""
    card = path.read_text(encoding="utf-8", errors="replace")
    header = _HEADER.match(card)
    if not header:
        return {}, card
    try:
        fields = yaml.safe_load(header[1])
    except yaml.YAMLError:
        return {}, card
    return (fields if isinstance(fields, dict) else {}), card[header.end() :]


def lora_card(rank: int, counts: Sequence[int], base: str | None) -> str:
    """The text of the card of a patch that was written as a LoRA.

    Args:
        rank: The LoRA's rank.
        counts: The number of neurons of each module.
        base: What the base model was called.
    """
    base = hub_id(base)  # a path on the machine of the export means nothing to readers
    fields = {**({"base_model": base} if base else {}), "library_name": "peft", "tags": ["lora", "peft-star"]}
    vllm = next((f"--max-lora-rank {choice}" for choice in _VLLM_RANKS if rank <= choice), None)
    vllm = f"start the server with `--enable-lora {vllm}`" if vllm else f"rank {rank} is more than it can load"
    padding = " Modules with fewer neurons are padded with zeros to that rank." if len(set(counts)) > 1 else ""
    return f"""{_header(fields)}
# A model patch as LoRA

This is a STAR patch of {sum(counts)} neurons in {len(counts)} modules, written by `peft_star` as a plain LoRA adapter
of rank {rank}. It is exact, not an approximation: a neuron is a column of an FFN's second matrix, `lora_A` holds the
one-hot selectors of the patched neurons and `lora_B` what is added to them. With `lora_alpha` = `r` the scaling is 1,
and logits equal those of the original patch up to float rounding.{padding}

It needs PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base or "path/to/the/base-model"}")
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```

- vLLM: {vllm}.
- llama.cpp: `python convert_lora_to_gguf.py --base path/to/the/base-model path/to/this/directory`, or, of the original
  patch, `peft-star export path/to/the/patch -o lora.gguf --to gguf`.

Where a scale can be given, give 1. The original patch is smaller, and it is what `peft_star` can repair further.
"""


def _is_generic(text: str) -> bool:
    """Whether nobody has written anything into a card: all of it is the template's."""
    template = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = {line.strip() for line in text.splitlines()} - template - {""}
    return all(line.startswith(_GENERIC) for line in lines)


def _hash(text: str) -> str:
    return hashlib.sha256("\n".join(text.split()).encode()).hexdigest()[:12]


def _header(fields: Mapping[str, Any]) -> str:
    return f"---\n{yaml_dump(dict(fields))}---\n"


def _own_tags(tags: Any) -> list[str]:
    # PEFT writes a tag `base_model:adapter:<path>`; the Hub makes its own from `base_model`
    return [str(tag) for tag in tags or [] if not str(tag).startswith("base_model:")] if isinstance(tags, list) else []


def _size(report: RepairReport | None, patch: Patch | None) -> str:
    counts = [len(neurons) for neurons in patch.neurons.values()] if patch else []
    if not counts and report:
        counts = [len(layer.neurons) for layer in report.layers]
    if not counts:
        return ""
    return f"{sum(counts)} neurons in {len(counts)} feed-forward layer{'s' if len(counts) > 1 else ''} of "


def _usage(
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


def _twin(where: str, base: str | None, name: str | None, revision: str | None, task: str) -> list[str]:
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


def _repaired(report: RepairReport, plot: bool, where: str) -> list[str]:
    picture = (
        "\n\n![Each failing token's lead over its strongest rival before and after, and the patch's size by layer]"
        f"({PLOT_NAME})"
    )
    return [
        f"## What was repaired\n\n{report.to_markdown(SHOWN_ROWS).strip()}{picture if plot else ''}"
        f"\n\n`peft-star report {where} -o report.html` shows all of it as a page, with a map of the patched neurons."
    ]


def _damage(report: RepairReport) -> list[str]:
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
