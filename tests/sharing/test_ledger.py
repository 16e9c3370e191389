"""The ledger as files: what is read is what was written, and nothing that is damaged or made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_star.sharing.changes import add
from peft_star.sharing.entries import KEYS, Entry, LedgerRow
from peft_star.sharing.ledger import Ledger, _sha256
from peft_star.sharing.patch_files import checksum
from support.ledgers import MODULE, an_entry

ENTRIES = (
    an_entry(0, outputs=30, note="first", harm={"kl": 0.1}),
    an_entry(2, outputs=30),
    an_entry(5, neurons=40, outputs=30),
)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(ENTRIES)


def test_what_is_read_is_what_was_written(ledger: Ledger, tmp_path: Path) -> None:
    again = Ledger.read(tmp_path, ledger.write(tmp_path))
    assert again == ledger
    for entry, was in zip(again.entries, ledger.entries):
        assert entry.changes().keys() == was.changes().keys()
        for name, (neurons, delta) in entry.changes().items():
            assert torch.equal(neurons, was.changes()[name][0]) and torch.equal(delta, was.changes()[name][1])
    assert Ledger.read(tmp_path, None) is None  # a patch that names no ledger has none
    assert Ledger.read(tmp_path / "elsewhere", "abc") is None


def test_an_entry_without_rows_keeps_activations(tmp_path: Path) -> None:
    change = an_entry().changes()
    entry = Entry.of(change, {MODULE: torch.randn(3, 9), "model.layers.1.mlp.down_proj": torch.randn(3, 9)})
    ledger = Ledger((entry,))
    (again,) = Ledger.read(tmp_path, ledger.write(tmp_path)).entries
    assert again.rows == [] and again.modules == {MODULE: 4}
    assert {name: keys.shape for name, keys in again.keys().items()} == {
        MODULE: (3, 9),
        "model.layers.1.mlp.down_proj": (3, 9),
    }
    assert again.tensors[MODULE][KEYS].dtype == torch.bfloat16
    # what is added to an entry leaves them as they are
    more = again.amend(change)
    assert more.id == again.id and more.amended and set(more.keys()) == set(again.keys())
    torch.testing.assert_close(more.changes()[MODULE][1], 2 * change[MODULE][1])


def test_ids_tell_entries_apart(ledger: Ledger) -> None:
    assert len({entry.id for entry in ledger.entries}) == 3
    assert [len(entry.id) for entry in ledger.entries] == [8, 8, 8]
    first, second, third = ledger.entries
    assert ledger.find(first.id) is first and ledger.find(second.id[:5]) is second and ledger.find("3") is third
    for name in ("", "0", "4", "nothing", "12345678901"):
        with pytest.raises(ValueError, match="The ledger has no entry"):
            ledger.find(name)
    # an id may begin with the number of another entry
    assert Ledger((replace(first, id="20000000"), second)).find("2") is second
    twins = Ledger((replace(first, id="aaaa0000"), replace(second, id="aaaa1111")))
    with pytest.raises(ValueError, match="2 entries 'aaaa'"):
        twins.find("aaaa")


def test_the_standing_entries_make_up_the_patch(ledger: Ledger) -> None:
    without = ledger.revert(ledger.entries[1])
    assert [entry.id for entry in without.standing] == [ENTRIES[0].id, ENTRIES[2].id]
    assert len(without) == 3 and without.entries[1].reverted.endswith("Z")
    small = Ledger(ENTRIES[:2])
    total, expected = small.total()[MODULE], add([entry.changes() for entry in ENTRIES[:2]])[MODULE]
    assert torch.equal(total[0], expected[0]) and torch.equal(total[1], expected[1])
    assert small.kept_neurons()[MODULE].tolist() == [0, 1, 2, 3, 4, 5]
    assert small.revert(ENTRIES[0]).kept_neurons()[MODULE].tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="was taken out already"):
        without.revert(without.entries[1])


def row(source: str, prompt: Any, completion: str = " c") -> LedgerRow:
    return LedgerRow(source, {"prompt": prompt, "completion": completion}, 1, [0], [])


def test_of_rows_with_the_same_prompt_the_last_repair_counts() -> None:
    chat = [{"role": "user", "content": "hi"}]
    first = an_entry(0, rows=[row("failures", "a"), row("failures", chat), row("retain", "b"), row("related", "c")])
    second = an_entry(1, rows=[row("failures", "a", " d"), row("retain", "b")])
    ledger = Ledger((first, second))
    found = [(entry.id == second.id, item.row["prompt"]) for entry, item in ledger.standing_rows("failures", "retain")]
    assert found == [(False, chat), (False, "b"), (True, "a"), (True, "b")]
    # when the later one is taken out, the earlier one holds again
    assert [item.row["prompt"] for _, item in ledger.revert(second).standing_rows("failures")] == ["a", chat]


def test_entries_of_several_patches_are_in_the_order_of_their_times(ledger: Ledger) -> None:
    times = ["2030-01-02T00:00:00Z", "2030-01-01T00:00:00Z", "2030-01-03T00:00:00Z"]
    a, b, c = (replace(entry, time=time) for entry, time in zip(ledger.entries, times))
    assert Ledger.joined([Ledger((a, c)), None, Ledger((b, c))]).entries == (b, a, c)


# damage and made-up files


def rewrite(directory: Path, change: Callable[[dict], Any]) -> str:
    """Let someone change the ledger, and name it in the configuration as if it had been saved so."""
    path = directory / "repair_ledger.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return _sha256(path)


def test_a_ledger_of_another_state_of_the_patch_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    expected = ledger.write(tmp_path)
    assert expected != rewrite(tmp_path, lambda data: data["entries"][0].update(note="changed"))
    with pytest.raises(ValueError, match="is damaged: it is not what was saved with this patch"):
        Ledger.read(tmp_path, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(version=2),
        lambda data: data.pop("tensors_sha256"),
        lambda data: data.update(entries=3),
        lambda data: data["entries"].append(data["entries"][0]),
        lambda data: data["entries"].pop(),
        lambda data: data["entries"][0].update(id="../../x"),
        lambda data: data["entries"][0].update(id="ABCDEF01"),
        lambda data: data["entries"][0].update(kind="gift"),
        lambda data: data["entries"][0].update(note=3),
        lambda data: data["entries"][0].update(harm={"kl": "much"}),
        lambda data: data["entries"][0].update(patch={"norm": None}),
        lambda data: data["entries"][0].update(patch={"norm": float("inf")}),
        lambda data: data["entries"][0].update(modules={MODULE: 3}),
        lambda data: data["entries"][0].update(modules={}),
        lambda data: data["entries"][0].update(modules={MODULE: 4, "model.other": 1}),
        lambda data: data["entries"][0].update(rows=[3]),
        lambda data: data["entries"][0]["rows"][0].update(source="elsewhere"),
        lambda data: data["entries"][0]["rows"][0].update(row={"prompt": "p"}),
        lambda data: data["entries"][0]["rows"][0].update(row={"prompt": "p", "completion": "\ud800"}),
        lambda data: data["entries"][0]["rows"][0].update(tokens="many"),
        lambda data: data["entries"][0]["rows"][0].update(tokens=10**12, wrong_before=[10**12]),
        lambda data: data["entries"][0]["rows"][0].update(wrong_after=[-1]),
        lambda data: data["entries"][0]["rows"][0].update(generated_after="yes"),
    ],
)
def test_a_ledger_of_other_values_is_refused_in_one_sentence(
    ledger: Ledger, tmp_path: Path, change: Callable[[dict], Any]
) -> None:
    ledger.write(tmp_path)
    with pytest.raises(ValueError, match="repair_ledger.json cannot be read") as error:
        Ledger.read(tmp_path, rewrite(tmp_path, change))
    assert "\n" not in str(error.value)


def retensor(directory: Path, change: Callable[[dict], Any]) -> str:
    path = directory / "repair_ledger.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return rewrite(directory, lambda data: data.update(tensors_sha256=checksum(tensors)))


FIRST = f"{ENTRIES[0].id}/{MODULE}"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(f"{FIRST}/neurons"),
        lambda tensors: tensors.update({"weight": torch.zeros(1)}),
        lambda tensors: tensors.update({f"{FIRST}/more": torch.zeros(1)}),
        lambda tensors: tensors.update({f"{ENTRIES[0].id}/model.layers.0.mlp.down_proj/delta": torch.zeros(1, 1)}),
        lambda tensors: tensors.update({f"{ENTRIES[0].id}/../x/neurons": torch.zeros(1)}),
        lambda tensors: tensors.update({f"ffffffff/{MODULE}/neurons": torch.zeros(1)}),
        lambda tensors: tensors.update({f"{FIRST}/keys": torch.tensor([[torch.inf]])}),
    ],
)
def test_tensors_that_no_entry_names_are_refused(
    ledger: Ledger, tmp_path: Path, change: Callable[[dict], Any]
) -> None:
    ledger.write(tmp_path)
    with pytest.raises(ValueError, match="repair_ledger.json cannot be read"):
        Ledger.read(tmp_path, retensor(tmp_path, change))


def test_a_flipped_bit_or_a_missing_file_is_found(ledger: Ledger, tmp_path: Path) -> None:
    expected = ledger.write(tmp_path)
    path = tmp_path / "repair_ledger.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not those that were saved"):
        Ledger.read(tmp_path, expected)
    path.unlink()
    with pytest.raises(ValueError, match="holds no repair_ledger.safetensors"):
        Ledger.read(tmp_path, expected)
