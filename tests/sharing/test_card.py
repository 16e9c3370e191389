"""The model card: what it says, what it never says, and whose words it keeps."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_star import RepairReport, StarConfig, export_lora
from peft_star.report import BrokenToken, FailureRecord, PatchedLayer, RowRecord
from peft_star.sharing.card import model_card, read_card, write_card
from peft_star.sharing.patch_files import CARD_NAME, check_patch_output
from support.byte_llama import build_model


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    """A patch as PEFT saves it, generic card included, whose base model is a path."""
    return save(tmp_path / "patch", "/home/someone/models/tiny-base")


def save(directory: Path, base: str | None, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = build_model()
    model.name_or_path = model.config._name_or_path = base or ""
    config = StarConfig(**{"task_type": "CAUSAL_LM", "num_neurons": 6, "init_weights": False, **changes})
    get_peft_model(model, config).save_pretrained(directory, save_embedding_layers=False)
    return directory


def report(failures: int = 1, retained: int = 0, **changes: Any) -> RepairReport:
    """A report of rows with one token each, all of them solved and the last retained one broken."""
    failed = [
        FailureRecord(n, 1, "def f(x):", "return", 5, "pass", 6, "return", 5, -0.4, 0.3, True) for n in range(failures)
    ]
    rows = [RowRecord("failures", n, "def f(x):", "return", 1, 0, 1, False, True) for n in range(failures)]
    broken = [n == retained - 1 for n in range(retained)]
    rows += [RowRecord("retain", n, "a", "b", 1, 1, int(not bad), True, not bad) for n, bad in enumerate(broken)]
    tokens = [BrokenToken("retain", n, 1, "a", "b", 1, "c", 2) for n, bad in enumerate(broken) if bad]
    layers = [PatchedLayer("model.layers.0.mlp.down_proj", [1, 2, 3], 0.5)]
    return RepairReport(failed, rows, tokens, layers, steps=4, seconds={"patch": 1.5}, **changes)


def config(base: str | None = "someone/some-model", **changes: Any) -> StarConfig:
    return StarConfig(**{"task_type": "CAUSAL_LM", "base_model_name_or_path": base, **changes})


def test_of_a_base_on_the_hub() -> None:
    card = ModelCard(model_card(config(base_fingerprint="star1:xyz"), repo_id="me/patch", command="peft-star repair"))
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "someone/some-model",
        "pipeline_tag": "text-generation",
        "tags": ["peft_star", "star", "model-repair"],
    }
    assert "[someone/some-model](https://huggingface.co/someone/some-model)" in card.text
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/patch")' in card.text
    assert "`star1:xyz`" in card.text
    assert "```bash\npeft-star repair\n```" in card.text


@pytest.mark.parametrize(
    "base",
    [
        "/home/someone/models/tiny-base",
        "./models/tiny-base",
        "models/deeper/tiny-base/",
        "~/tiny-base",
        "C:\\models\\tiny-base",
    ],
)
def test_of_a_base_on_this_machine(base: str) -> None:
    card = model_card(config(base))
    assert "`tiny-base`" in card
    assert "base_model:" not in card
    assert not re.search(r"someone|models|C:|~", card)


def test_of_a_gguf_base() -> None:
    card = model_card(config("/data/model.Q8_0.gguf"), lora=True)
    assert card.count('from_pretrained("path/to/its/directory", gguf_file="model.Q8_0.gguf")') == 2
    assert "/data" not in card


def test_of_a_base_without_a_name() -> None:
    for base in (None, ""):
        assert "of its base model" in model_card(config(base), report())


@pytest.mark.parametrize(
    ("task", "pipeline", "loader"),
    [
        ("SEQ_CLS", "text-classification", "AutoPeftModelForSequenceClassification"),
        ("FEATURE_EXTRACTION", "feature-extraction", "AutoPeftModelForFeatureExtraction"),
        (None, None, "AutoModelForCausalLM"),
    ],
)
def test_other_tasks(task: str | None, pipeline: str | None, loader: str) -> None:
    card = ModelCard(model_card(config(task_type=task)))
    assert card.data.pipeline_tag == pipeline
    assert f"{loader}.from_pretrained" in card.text


@pytest.mark.parametrize("base", ["someone/some-model", "/data/tiny.gguf", "/data/tiny", None])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", None])
@pytest.mark.parametrize("subfolder", [None, "mine"])
def test_the_code_of_a_card_is_python_that_exists(base: str | None, task: str | None, subfolder: str | None) -> None:
    card = model_card(config(base, task_type=task, revision="v1"), lora=True, subfolder=subfolder)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2 and "import peft_star" not in blocks[1]
    for block in blocks:
        compile(block, "card", "exec")
        for line in block.splitlines():
            if "import" in line:
                exec(line, {})


def test_what_was_repaired_and_checked() -> None:
    card = model_card(config(), report(failures=30, retained=4, versions={"torch": "2.9"}), plot=True)
    assert "30 of 30 failing tokens solved" in card and "10 more" in card
    assert "Rows that had to stay right: 4. Right before the patch: 4. Broken by it: 1." in card
    assert "3 neurons in 1 feed-forward layer of" in card
    assert "](report.png)" in card and "Made with torch 2.9." in card
    alone = model_card(config(), report(interrupted=True))
    assert "No rows that had to stay right were given" in alone and "was interrupted" in alone
    assert "report.png" not in alone


# in a directory


def test_it_takes_the_place_of_a_generic_card(patch: Path) -> None:
    assert "More Information Needed" in (patch / CARD_NAME).read_text()
    report(retained=1).save(patch / "repair_report.json")
    assert write_card(patch, command="peft-star repair tiny-base f.jsonl") == patch / CARD_NAME
    fields, text = read_card(patch / CARD_NAME)
    assert "More Information Needed" not in text and "# STAR patch of tiny-base" in text
    assert "24 neurons in 4 feed-forward layers of `tiny-base`" in text
    assert "someone" not in str(fields) + text
    ModelCard.load(patch / CARD_NAME)  # the Hub's client can read it


def test_it_is_written_anew_as_long_as_nobody_edited_it(patch: Path) -> None:
    write_card(patch, command="peft-star repair tiny-base f.jsonl")
    before = (patch / CARD_NAME).read_text()
    write_card(patch)
    assert (patch / CARD_NAME).read_text() == before  # there is nothing to add
    report().save(patch / "repair_report.json")
    export_lora(patch, patch / "lora")
    write_card(patch, repo_id="me/patch")
    after = (patch / CARD_NAME).read_text()
    assert "# patch\n" in after and "What was repaired" in after and 'subfolder="lora"' in after
    assert "peft-star repair tiny-base f.jsonl" in after  # only the first card knew


def test_a_card_without_report_is_not_kept_for_another_patch(tmp_path: Path) -> None:
    first, second = save(tmp_path / "first", "me/tiny"), save(tmp_path / "second", "me/tiny", num_neurons=3)
    write_card(first, report())
    shutil.copy(first / CARD_NAME, second / CARD_NAME)
    write_card(second)
    assert "What was repaired" not in (second / CARD_NAME).read_text()
    shutil.copy(first / CARD_NAME, tmp_path / "card")
    write_card(first)
    assert (first / CARD_NAME).read_text() == (tmp_path / "card").read_text()


@pytest.mark.parametrize("own", [True, False])
def test_what_people_wrote_is_kept(patch: Path, own: bool) -> None:
    if own:
        write_card(patch)
        text = (patch / CARD_NAME).read_text().replace("## How to load it", "Mind the gap.\n\n## How to load it")
    else:
        fields = "base_model: /home/someone/tiny\nlicense: mit\ntags:\n- base_model:adapter:/home/x\n"
        text = f"---\n{fields}---\nMind the gap.\n"
    (patch / CARD_NAME).write_text(text)
    report().save(patch / "repair_report.json")
    write_card(patch, repo_id="me/patch")
    kept = (patch / CARD_NAME).read_text()
    assert "Mind the gap." in kept and "# patch\n" not in kept
    assert "someone" not in kept and "/home" not in kept
    assert own or "license: mit" in kept


def test_metadata_that_people_added_is_kept(patch: Path) -> None:
    write_card(patch)
    text = (patch / CARD_NAME).read_text()
    (patch / CARD_NAME).write_text(text.replace("library_name: peft\n", "library_name: peft\nlicense: apache-2.0\n"))
    write_card(patch, report(), repo_id="me/patch")
    text = (patch / CARD_NAME).read_text()
    assert "license: apache-2.0" in text and "# patch\n" in text


def test_no_card_without_a_patch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no patch"):
        write_card(tmp_path)


def test_a_patch_with_its_twin_can_be_overwritten(patch: Path) -> None:
    export_lora(patch, patch / "lora")
    check_patch_output(patch, True)
    (patch / "lora" / "notes").mkdir()
    with pytest.raises(ValueError, match="also holds the directory lora"):
        check_patch_output(patch, True)


def test_types_are_shipped() -> None:
    import peft_star

    assert (Path(peft_star.__file__).parent / "py.typed").is_file()


def test_what_a_configuration_says_runs_nothing_in_a_card() -> None:
    evil = {"base_model_name_or_path": "./`x` <img src=x>\x1b[2J", "revision": 'main"); print("owned"); ("'}
    evil |= {"base_fingerprint": "`<b>\u202e", "peft_type": "STAR", "task_type": "CAUSAL_LM"}
    text = model_card(evil, lora=True)
    assert "owned" not in text and not {"\x1b", "\u202e"} & set(text)
    assert not {"<img", "<b>"} & set(re.findall(r"<\w+>?", re.sub(r"`[^`\n]*`", "", text).replace("\\<", "")))
    assert "owned" not in model_card({**evil, "base_model_name_or_path": "you/base"}, lora=True)
    assert 'revision="v1.0/x"' in model_card({"base_model_name_or_path": "you/base", "revision": "v1.0/x"})
