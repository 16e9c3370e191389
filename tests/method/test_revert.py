"""Taking one repair out: its failures fail again, the others stay solved, and the ledger still adds up to the
patch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from peft_star import RepairArguments, check, repair, revert
from peft_star.method.history import deltas_of
from peft_star.method.subject import Subject
from peft_star.sharing.changes import difference, norm
from support.ledgers import ledger, repaired, some_rows
from support.words import QUIET, decided, star, word_tokenizer, wrong_tokens

COUNT = 8


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def patch(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("patches")
    repaired(tokenizer, some_rows(COUNT)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("number", range(COUNT))
def test_any_of_eight_comes_out_and_the_others_stay(number: int, patch, tokenizer) -> None:
    rows = some_rows(COUNT)
    model = PeftModel.from_pretrained(decided(), patch)
    report = revert(model, tokenizer, str(number + 1))
    assert (report.failures, report.fail_again) == (1, 1)
    assert report.ok and len(report.check.rows) == COUNT - 1
    assert wrong_tokens(model, tokenizer, [rows[number]]) == 1
    assert wrong_tokens(model, tokenizer, rows[:number] + rows[number + 1 :]) == 0

    entries = ledger(model).entries
    assert len(entries) == COUNT and [entry.stands for entry in entries].index(False) == number
    assert {entry.id for entry in entries if entry.amended} == set(report.solved_again)
    found = deltas_of(Subject.of(model, tokenizer, RepairArguments()))
    assert norm(difference(found, ledger(model).total())) <= 1e-5 * norm(found)


def test_entries_that_broke_come_out_whole_later(patch, tokenizer) -> None:
    """What solves an entry again is a part of it from then on."""
    rows = some_rows(COUNT)
    model = PeftModel.from_pretrained(decided(), patch)
    again = revert(model, tokenizer, "1").solved_again
    assert again
    number = [entry.id for entry in ledger(model).entries].index(again[0])
    report = revert(model, tokenizer, again[0])
    assert report.fail_again == 1 and report.ok
    assert wrong_tokens(model, tokenizer, [rows[number]]) == 1


def test_all_of_them_leave_nothing(patch, tokenizer) -> None:
    model = PeftModel.from_pretrained(decided(), patch)
    for number in range(COUNT):
        assert revert(model, tokenizer, str(number + 1)).ok
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, decided()(tokens).logits)
    assert check(model, tokenizer).rows == [] and not ledger(model).standing
    # and the next repair finds what it found on the first day
    report = repair(model, tokenizer, some_rows(1), RepairArguments(**QUIET))
    assert report.success and report.earlier == {}


def test_what_cannot_be_taken_out(patch, tokenizer) -> None:
    model = PeftModel.from_pretrained(decided(), patch)
    revert(model, tokenizer, "2")
    with pytest.raises(ValueError, match="was taken out already"):
        revert(model, tokenizer, "2")
    with pytest.raises(ValueError, match="has no entry '99'"):
        revert(model, tokenizer, "99")
    with pytest.raises(ValueError, match="no ledger with entries"):
        revert(star(), tokenizer, "1")


def test_settings_of_a_file_that_are_none(patch, tokenizer) -> None:
    model = PeftModel.from_pretrained(decided(), patch)
    config = model.peft_config["default"]
    for entry in config.ledger.entries:
        config.ledger = config.ledger.replaced(replace(entry, arguments={"max_steps": "many", "unknown": 1}))
    with pytest.raises(ValueError, match="The settings of entry .* cannot be used: `max_steps`"):
        revert(model, tokenizer, "1")
    # with settings of one's own, those of the file do not matter
    config.ledger = config.ledger.replaced(replace(config.ledger.find("1"), reverted=""))
    model = PeftModel.from_pretrained(decided(), patch)
    model.peft_config["default"].ledger = config.ledger
    assert revert(model, tokenizer, "1", RepairArguments(**QUIET)).ok
