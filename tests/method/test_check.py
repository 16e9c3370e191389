"""`check` runs a ledger again, and says what is no longer as it was."""

from __future__ import annotations

import pytest
import torch

from peft_star import RepairArguments, check, repair
from peft_star.method.subject import Subject
from support.ledgers import ledger, repaired, some_rows
from support.words import QUIET, star, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model(tokenizer):
    return repaired(tokenizer, some_rows(4))


def silence(model, tokenizer):
    with torch.no_grad():
        for layer in Subject.of(model, tokenizer, RepairArguments()).layers().values():
            layer.star_delta["default"].zero_()


def test_what_holds_is_ok(model, tokenizer) -> None:
    report = check(model, tokenizer)
    assert report.ok and len(report.rows) == 4 and report.unchecked == []
    assert report.entries == [entry.id for entry in ledger(model).entries]
    assert all(row.generated_now for row in report.rows)
    assert report.summary() == {
        "ok": True,
        "entries": 4,
        "unchecked": 0,
        "failures": 4,
        "failures_regressed": 0,
        "retain": 0,
        "retain_regressed": 0,
        "related": 0,
        "related_regressed": 0,
    }
    assert "0 of 4 rows regressed" in report.to_markdown()
    assert all(row.generated_now is None for row in check(model, tokenizer, generation=False).rows)


def test_what_broke_is_told(model, tokenizer) -> None:
    silence(model, tokenizer)
    report = check(model, tokenizer)
    assert not report.ok and len(report.regressed) == 4
    row = report.regressed[0]
    assert row.wrong_after == [] and row.wrong_now == [0] and row.said.startswith("w")
    assert row.generated_after and row.generated_now is False
    text = report.to_markdown()
    assert "4 of 4 rows regressed" in text and f"| {row.entry} | failures |" in text
    data = report.to_dict()
    assert data["rows"][0]["regressed"] and data["summary"]["failures_regressed"] == 4


def test_one_entry_alone(model, tokenizer) -> None:
    silence(model, tokenizer)
    second = ledger(model).entries[1]
    report = check(model, tokenizer, entries=[second.id])
    assert [row.entry for row in report.rows] == [second.id] and report.entries == [second.id]
    with pytest.raises(ValueError, match="has no entry"):
        check(model, tokenizer, entries=["nothing"])


def test_related_rows_are_run_again_as_they_were(tokenizer) -> None:
    model = star(num_layers=0.67, num_neurons=12)
    wrong = {"prompt": "w3 w4", "completion": " w5 w6"}
    repair(model, tokenizer, some_rows(1), RepairArguments(**QUIET), related=[wrong])
    report = check(model, tokenizer)
    # one that was wrong then and is wrong now has not regressed
    assert report.ok and report.summary()["related"] == 1
    assert [row.wrong_now == row.wrong_after for row in report.rows] == [True, True]


def test_entries_without_rows_are_named(tokenizer) -> None:
    model = repaired(tokenizer, some_rows(2), ledger_rows=False)
    report = check(model, tokenizer)
    assert report.ok and report.rows == [] and report.unchecked == [entry.id for entry in ledger(model).entries]


def test_a_patch_without_a_ledger_has_nothing_to_check(tokenizer) -> None:
    with pytest.raises(ValueError, match="The patch has no ledger with entries"):
        check(star(), tokenizer)
