"""Repairs one after another: each leaves those before it solved, without being given their rows, and enters what it
did."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_star import RepairArguments, StarConfig, check, combine_patches, repair
from peft_star.method import band, history
from peft_star.method.history import History, earlier_keys
from peft_star.method.subject import Subject
from peft_star.sharing.changes import difference, norm
from peft_star.sharing.entries import OUTSIDE
from support.ledgers import ledger, repaired, some_rows
from support.words import LAYERS, QUIET, RETAIN, ROWS, decided, running, star, word_tokenizer, wrong_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def test_an_entry_says_what_was_done(tokenizer) -> None:
    model = star(num_layers=0.67, num_neurons=12)
    args = RepairArguments(**QUIET, note="ticket 7")
    related = [{"prompt": "w3 w4", "completion": " w5"}]
    report = repair(model, tokenizer, ROWS, args, retain=RETAIN, related=related)
    (entry,) = ledger(model).entries
    assert report.entry == entry.id and entry.note == "ticket 7" and entry.time.endswith("Z")
    assert [row.row for row in entry.rows_of("failures")] == ROWS
    assert [row.row for row in entry.rows_of("retain")] == RETAIN
    assert [row.row for row in entry.rows_of("related")] == related
    assert sum(len(row.wrong_before) for row in entry.rows_of("failures")) == len(report.failures)
    assert all(row.is_right and row.generated_after for row in entry.rows_of("failures"))
    assert entry.summary == report.summary() and entry.versions == report.versions
    assert entry.arguments == {"learning_rate": 0.05, "max_steps": 40, "norm": "rms"}
    assert entry.config == {
        "num_neurons": 12,
        "layer_selection": "last",
        "num_layers": 0.67,
        "neuron_pattern": "layer-wise",
    }
    assert entry.base_fingerprint == model.peft_config["default"].base_fingerprint
    assert entry.modules.keys() == {layer.name for layer in report.layers}
    assert entry.patch["norm"] == pytest.approx(norm(entry.changes()), rel=1e-5)
    assert entry.patch["layers"] == len(report.layers)


def test_the_entries_add_up_to_the_patch_and_go_along(tokenizer, tmp_path) -> None:
    model = repaired(tokenizer, some_rows(3))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(decided(), tmp_path)
    assert ledger(again) == ledger(model) and len(ledger(again)) == 3
    found = history.deltas_of(Subject.of(again, tokenizer, RepairArguments()))
    assert norm(difference(found, ledger(again).total())) <= 1e-5 * norm(found)
    # a second adapter has a ledger of its own, and copies of a model theirs
    again.load_adapter(tmp_path, "second")
    assert again.peft_config["second"].ledger == ledger(model)
    assert ledger(copy.deepcopy(again)) == ledger(model)
    repair(again, tokenizer, some_rows(4)[3:], RepairArguments(**QUIET))
    assert len(ledger(again)) == 4 and len(again.peft_config["second"].ledger) == 3
    # a file that no later save names is not taken for the ledger
    fresh = star()
    fresh.save_pretrained(tmp_path)
    assert ledger(PeftModel.from_pretrained(decided(), tmp_path)) is None


@pytest.mark.parametrize("loaded", [False, True])
def test_a_later_repair_holds_the_earlier_ones(tokenizer, tmp_path, loaded: bool) -> None:
    rows = some_rows(8)
    model = star(num_layers=0.67, num_neurons=12)
    for number, row in enumerate(rows):
        report = repair(model, tokenizer, [row], RepairArguments(**QUIET))
        assert report.success and report.earlier.get("rows", 0) == number
        if loaded:
            model.save_pretrained(tmp_path / str(number))
            model = PeftModel.from_pretrained(decided(), tmp_path / str(number))
    assert wrong_tokens(model, tokenizer, rows) == 0
    assert check(model, tokenizer).ok
    # what holds them are their rows
    free = repaired(tokenizer, rows, keep_earlier=False)
    assert wrong_tokens(free, tokenizer, rows) > 0
    assert not check(free, tokenizer).ok


def test_order_matters_little(tokenizer) -> None:
    rows = some_rows(8)
    for order in (rows, rows[::-1], rows[4:] + rows[:4]):
        assert wrong_tokens(repaired(tokenizer, order), tokenizer, rows) == 0


def test_retained_rows_of_earlier_repairs_are_held(tokenizer) -> None:
    model = star(num_layers=0.67, num_neurons=12)
    args = RepairArguments(**QUIET)
    base = decided()
    kept = [{"prompt": row["prompt"], "completion": " " + said(base, tokenizer, row)} for row in some_rows(12, seed=9)]
    repair(model, tokenizer, some_rows(1), args, retain=kept)
    report = repair(model, tokenizer, some_rows(4)[1:], args)
    assert report.earlier == {"rows": 13, "right": 13, "broken": 0}
    assert wrong_tokens(model, tokenizer, kept) == 0


@torch.no_grad()
def said(model, tokenizer, row):
    ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
    return tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())


def test_a_row_that_is_given_anew_replaces_the_earlier_one(tokenizer) -> None:
    row = some_rows(1)[0]
    model = repaired(tokenizer, [row])
    other = {**row, "completion": " w33"}
    report = repair(model, tokenizer, [other], RepairArguments(**QUIET))
    assert report.success and report.earlier == {}
    assert [item.row for _, item in ledger(model).standing_rows("failures")] == [other]
    assert check(model, tokenizer).ok


def test_an_earlier_row_that_breaks_is_told(tokenizer) -> None:
    """What cannot be had with one step: the report says which earlier rows it cost."""
    rows = some_rows(8)
    model = repaired(tokenizer, rows[:7])
    before = wrong_tokens(model, tokenizer, rows[:7])
    subject = Subject.of(model, tokenizer, RepairArguments())
    with torch.no_grad():
        for layer in subject.layers().values():
            layer.star_delta["default"].zero_()
    assert before == 0 and wrong_tokens(model, tokenizer, rows[:7]) > 0
    # broken before the repair, they are not its doing
    report = repair(model, tokenizer, rows[7:], RepairArguments(**QUIET, max_rounds=1))
    assert report.earlier["rows"] == 7 and report.earlier["right"] < 7 and report.success
    assert not check(model, tokenizer).ok


def test_what_was_changed_outside_of_a_repair_has_an_entry(tokenizer) -> None:
    model = repaired(tokenizer, some_rows(1))
    subject = Subject.of(model, tokenizer, RepairArguments())
    with torch.no_grad():
        for layer in subject.layers().values():
            layer.star_delta["default"].add_(0.01)
    repair(model, tokenizer, some_rows(2)[1:], RepairArguments(**QUIET))
    first, outside, last = ledger(model).entries
    assert (first.kind, outside.kind, last.kind) == ("repair", OUTSIDE, "repair") and outside.rows == []
    found = history.deltas_of(subject)
    assert norm(difference(found, ledger(model).total())) <= 1e-5 * norm(found)


def test_nothing_is_entered_when_nothing_failed(tokenizer) -> None:
    row = some_rows(1)[0]
    model = repaired(tokenizer, [row])
    report = repair(model, tokenizer, [row], RepairArguments(**QUIET))
    assert report.entry == "" and len(ledger(model)) == 1


def test_activations_stand_for_rows_that_are_not_to_be_kept(tokenizer, tmp_path) -> None:
    rows = some_rows(6)
    model = repaired(tokenizer, rows[:5], ledger_rows=False)
    entries = ledger(model).entries
    assert all(entry.rows == [] and set(entry.keys()) == set(LAYERS) for entry in entries)
    assert all(keys.shape == (1, 40) for entry in entries for keys in entry.keys().values())
    model.save_pretrained(tmp_path)
    assert not any(row["prompt"] in (tmp_path / "repair_ledger.json").read_text() for row in rows)
    with running(model, tokenizer, background=0) as run:
        keys = earlier_keys(run)
        # pushes at the focus, in early layers, keep off them, too
        held = band.Band(run, LAYERS[:1]).protection([], [])
    assert {name: part.shape for name, part in keys.items()} == {name: (5, 40) for name in LAYERS}
    assert {name: part.shape for name, part in held.items()} == {LAYERS[0]: (5, 40)}
    with running(model, tokenizer, keep_earlier=False) as run:
        assert earlier_keys(run) == {}
    # the next repair disturbs these tokens less than one that knows nothing of them
    free = copy.deepcopy(model)
    repair(model, tokenizer, rows[5:], RepairArguments(**QUIET))
    repair(free, tokenizer, rows[5:], RepairArguments(**QUIET, keep_earlier=False))
    moved = [moved_at(one, entries) for one in (model, free)]
    assert moved[0] < 0.5 * moved[1]


def moved_at(model, entries):
    """How far the last repair moves the outputs of the patched layers at the keys of the earlier ones."""
    change = ledger(model).entries[-1].changes()
    keys = [entry.keys() for entry in entries]
    return sum(
        float((key[name].float()[:, change[name][0]] @ change[name][1]).norm()) for key in keys for name in change
    )


def test_a_ledger_that_was_not_loaded_is_missed(tokenizer, tmp_path) -> None:
    repaired(tokenizer, some_rows(1)).save_pretrained(tmp_path)
    (tmp_path / "repair_ledger.json").unlink()
    model = PeftModel.from_pretrained(decided(), tmp_path)
    with pytest.warns(UserWarning, match="has a ledger that was not loaded with it"):
        history = History.of(Subject.of(model, tokenizer, RepairArguments()), RepairArguments())
    # what it holds is known all the same
    assert [entry.kind for entry in history.ledger.entries] == [OUTSIDE]


def test_the_next_repair_chooses_among_as_many_layers_as_the_first(tokenizer) -> None:
    model = star(num_layers=0.67, num_neurons=5)
    chosen = []
    for row in some_rows(3):
        subject = Subject.of(model, tokenizer, RepairArguments())
        chosen.append((list(subject.decoder_layers), subject.num_neurons, list(subject.decoder_of)))
        repair(model, tokenizer, [row], RepairArguments(**QUIET, reach="prompt"))
    assert chosen == [(["model.layers.1", "model.layers.2"], 5, LAYERS)] * 3
    assert model.peft_config["default"].scope == {"modules": LAYERS, "num_neurons": 5}


@pytest.mark.parametrize("scope", [3, {}, {"modules": "x", "num_neurons": 1}, {"modules": [3], "num_neurons": 1}])
def test_a_scope_that_is_none_is_refused(scope) -> None:
    with pytest.raises(ValueError, match="`scope` should hold"):
        StarConfig(scope=scope)


def test_another_adapter_of_the_same_configuration_begins_without(tokenizer) -> None:
    config = StarConfig(task_type="CAUSAL_LM", num_neurons=8, num_layers=1.0)
    for row in some_rows(2):
        model = get_peft_model(decided(), config)
        report = repair(model, tokenizer, [row], RepairArguments(**QUIET))
        assert report.success and report.earlier == {} and len(ledger(model)) == 1


def test_a_sum_of_patches_has_the_entries_of_both(tokenizer, tmp_path) -> None:
    model = repaired(tokenizer, some_rows(1))
    other = repaired(tokenizer, some_rows(2)[1:])
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    combine_patches(model, ["default", "other"], "both")
    ids = [entry.id for one in (model, other) for entry in ledger(one).entries]
    assert {entry.id for entry in model.peft_config["both"].ledger.entries} == set(ids)
    # a weighted sum is not the sum of its entries
    combine_patches(model, ["default", "other"], "weighted", [1.0, 0.5])
    assert model.peft_config["weighted"].ledger is None
