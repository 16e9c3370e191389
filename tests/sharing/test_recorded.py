"""Patches on disk with their ledgers, changed without a base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_star import RepairArguments, check, log, repair, revert_patch
from peft_star.sharing.ledger import Ledger
from peft_star.sharing.patch_files import Patch
from peft_star.sharing.recorded import Recorded
from support.command_line import names
from support.ledgers import ledger, repaired, some_rows
from support.words import QUIET, decided, star, word_tokenizer, wrong_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """A patch of three repairs. Not to be written to."""
    directory = tmp_path_factory.mktemp("made") / "patch"
    repaired(tokenizer, some_rows(3)).save_pretrained(directory)
    return directory


@pytest.fixture
def patch(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "patch"))


def test_the_log_is_read_without_a_model(patch: Path) -> None:
    found = log(patch)
    assert isinstance(found, Ledger) and len(found.entries) == 3
    recorded = Recorded.read(patch)
    assert recorded.ledger == found and recorded.unaccounted() < 1e-5


def test_a_patch_without_a_ledger_has_an_empty_one(tmp_path: Path) -> None:
    star().save_pretrained(tmp_path)
    assert len(log(tmp_path)) == 0 and Recorded.read(tmp_path).unaccounted() == 0
    with pytest.raises(ValueError, match="has no entry '1'"):
        revert_patch(tmp_path, "1")


def test_what_an_entry_changed_is_taken_off_exactly(patch: Path, tmp_path: Path, tokenizer) -> None:
    """The last entry out is the patch before the last repair."""
    before = repaired(tokenizer, some_rows(2))
    entry = revert_patch(patch, "3", tmp_path / "out")
    assert entry.id == log(patch).entries[2].id and log(patch).entries[2].stands
    model = PeftModel.from_pretrained(decided(), tmp_path / "out")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits, before.eval()(tokens).logits, rtol=1e-4, atol=1e-3)
    assert wrong_tokens(model, tokenizer, some_rows(3)) == 1 and check(model, tokenizer).ok
    assert [one.stands for one in ledger(model).entries] == [True, True, False]


def test_a_patch_is_changed_in_place_and_nothing_else_is_lost(patch: Path) -> None:
    (patch / "notes.txt").write_text("mine")
    (patch / "README.md").write_text("# My own words\n")
    (patch / "repair_report.json").write_text("{}")
    revert_patch(patch, "1")
    assert (patch / "notes.txt").read_text() == "mine" and "My own words" in (patch / "README.md").read_text()
    # what was reported was of another state
    assert "repair_report.json" not in names(patch)
    assert not log(patch).entries[0].stands
    Patch.read(patch)
    # all of them, one by one: a patch that does nothing is one
    revert_patch(patch, "2")
    revert_patch(patch, "3")
    assert not any(delta.any() for delta in Patch.read(patch).deltas.values())
    with pytest.raises(ValueError, match="was taken out already"):
        revert_patch(patch, "3")


def test_the_lora_twin_goes_along(tokenizer, tmp_path: Path) -> None:
    model = repaired(tokenizer, some_rows(2))
    model.peft_config["default"].lora_twin = True
    model.save_pretrained(tmp_path / "patch")
    revert_patch(tmp_path / "patch", "1", tmp_path / "out")
    tokens = torch.arange(3, 20)[None]
    found = [PeftModel.from_pretrained(decided(), path) for path in (tmp_path / "out", tmp_path / "out" / "lora")]
    with torch.no_grad():
        a, b = (model.eval()(tokens).logits for model in found)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_an_output_that_holds_something_is_not_replaced(patch: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        revert_patch(patch, "1", tmp_path / "full")
    assert names(tmp_path / "full") == ["file"]


def test_modules_to_save_stay(tmp_path: Path, tokenizer) -> None:
    """A patch that also holds whole modules keeps them."""
    model = star(num_layers=0.67, num_neurons=12, modules_to_save=["norm"])
    repair(model, tokenizer, some_rows(1), RepairArguments(**QUIET))
    model.save_pretrained(tmp_path / "patch")
    revert_patch(tmp_path / "patch", "1", tmp_path / "out")
    assert Patch.read(tmp_path / "out").others == Patch.read(tmp_path / "patch").others != ()


def test_a_ledger_of_another_patch_is_damage(patch: Path) -> None:
    path = patch / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "ledger_sha256": "0" * 64}))
    for read in (log, lambda patch: PeftModel.from_pretrained(decided(), patch)):
        with pytest.raises(ValueError, match="repair_ledger.json is damaged"):
            read(patch)
