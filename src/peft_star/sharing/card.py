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
from huggingface_hub.utils import yaml_dump
from peft import PeftConfig

from ..report import RepairReport, code, escaped
from .card_sections import damage, repaired, size, twin, usage
from .download import hub_id, short_name
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
_HEADER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# what PEFT adds to a card when a patch is saved over an earlier one
_PEFT_ADDS = re.compile(r"(?<=-->)\s*### Framework versions\s+- PEFT \S+\s*\Z")
# the last line of this package's cards: hashes of the text, to tell whether somebody edited it, and of the weights
_SIGNATURE = re.compile(r"\n<!-- peft_star: card ([0-9a-f]+), patch ([0-9a-f]+|none) -->\s*\Z")
_COMMAND = re.compile(r"^## How it was made\n\n```bash\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
# what PEFT and transformers put into the template of huggingface_hub
_GENERIC = ("### Framework versions", "- PEFT ", "This is the model card of a 🤗 transformers model")


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
        base_text = code(short_name(name)) if name else "its base model"
    of = escaped(short_name(name)) if name else "a language model"
    title = repo_id.split("/")[-1] if repo_id else f"STAR patch of {of}"
    sections = [
        f"# {title}",
        f"A patch of {size(report, patch)}{base_text}, made with peft_star. It repairs single tokens that the "
        "model gets wrong: it changes the neurons that cause them, and no other weight.",
    ]
    fingerprint = read("base_fingerprint")
    if fingerprint and fingerprint != "unknown":
        sections.append(
            "The patch fits the weights that it was made for and no others; their fingerprint, as "
            f"`peft_star.fingerprint(model)` gives it: {code(fingerprint)}"
        )
    where = repo_id or "path/to/this/directory"
    # it becomes a part of code that readers run
    revision = read("revision")
    revision = revision if isinstance(revision, str) and re.fullmatch(r"[\w./-]+", revision) else None
    sections += usage(where, base, name, revision, task, subfolder)
    sections += twin(where, base, name, revision, task) if lora else []
    if report:
        sections += repaired(report, plot, where) + damage(report)
    if command:
        sections.append(f"## How it was made\n\n```bash\n{command}\n```")
    if report and report.versions:
        versions = ", ".join(f"{key} {value}" for key, value in report.versions.items())
        sections.append(f"Made with {escaped(versions)}.")
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
    form = "`lora_A` holds the\none-hot selectors of the patched neurons and `lora_B` what is added to them."
    padding = ""
    if rank < max(counts):
        form = "`lora_B` times\n`lora_A` is what is added to them, in as many directions as float32 tells apart."
    elif len(set(counts)) > 1:
        padding = " Modules with fewer neurons are padded with zeros to that rank."
    return f"""{_header(fields)}
# A model patch as LoRA

This is a STAR patch of {sum(counts)} neurons in {len(counts)} modules, written by `peft_star` as a plain LoRA adapter
of rank {rank}. It is exact, not an approximation: a neuron is a column of an FFN's second matrix, {form}
With `lora_alpha` = `r` the scaling is 1, and logits equal those of the original patch up to float rounding.{padding}

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
