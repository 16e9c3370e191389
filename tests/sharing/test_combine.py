"""Two patches beside each other, and as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_star import RepairArguments, check, diff, fingerprint, log, repair, revert_patch, stack
from peft_star.sharing.combine import Overlap, overlaps
from peft_star.sharing.recorded import Recorded
from support.ledgers import repaired, some_rows
from support.words import QUIET, decided, star, word_tokenizer, wrong_tokens

ROWS = some_rows(4)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def patches(tokenizer, tmp_path_factory):
    """Two patches that know nothing of each other, and one that goes on from the first. Not to be written to."""
    directory = tmp_path_factory.mktemp("patches")
    repaired(tokenizer, ROWS[:2]).save_pretrained(directory / "a")
    repaired(tokenizer, ROWS[2:3]).save_pretrained(directory / "b")
    model = PeftModel.from_pretrained(decided(), directory / "a")
    repair(model, tokenizer, ROWS[3:], RepairArguments(**QUIET))
    model.save_pretrained(directory / "more")
    return directory


def test_a_stack_is_the_sum_with_both_ledgers(patches: Path, tmp_path: Path) -> None:
    found = stack(patches / "a", patches / "b", tmp_path / "c")
    a, b, c = (Recorded.read(path) for path in (patches / "a", patches / "b", tmp_path / "c"))
    assert {entry.id for entry in c.ledger.entries} == {entry.id for one in (a, b) for entry in one.ledger.entries}
    assert c.unaccounted() < 1e-5 and {layer.name for layer in found} == set(a.deltas) & set(b.deltas)
    models = {"a": PeftModel.from_pretrained(decided(), a.directory)}
    models["c"] = PeftModel.from_pretrained(decided(), c.directory)
    models["a"].load_adapter(b.directory, "b")
    models["a"].base_model.set_adapter(["default", "b"])
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        both, one = (models[name].eval()(tokens).logits for name in ("a", "c"))
    torch.testing.assert_close(one, both, rtol=1e-4, atol=1e-3)


def test_what_both_hold_is_in_the_stack_once(patches: Path, tmp_path: Path, tokenizer) -> None:
    stack(patches / "a", patches / "more", tmp_path / "c")
    assert diff(tmp_path / "c", patches / "more").same
    # and what one of them has taken out is out
    out = revert_patch(patches / "more", "1", tmp_path / "less")
    stack(patches / "a", tmp_path / "less", tmp_path / "d")
    assert diff(tmp_path / "d", tmp_path / "less").same
    assert [entry.id for entry in log(tmp_path / "d").entries if not entry.stands] == [out.id]


def test_a_stack_of_patches_of_different_layers(tokenizer, tmp_path: Path) -> None:
    for name, layers, row in (("a", [1], ROWS[0]), ("b", [2], ROWS[1])):
        model = star(layer_selection=layers, num_neurons=12 + layers[0])
        repair(model, tokenizer, [row], RepairArguments(**QUIET, reach="prompt"))
        model.save_pretrained(tmp_path / name)
    assert stack(tmp_path / "a", tmp_path / "b", tmp_path / "c") == []
    model = PeftModel.from_pretrained(decided(), tmp_path / "c")
    assert len(Recorded.read(tmp_path / "c").deltas) == 2
    assert check(model, tokenizer).summary()["failures"] == 2
    assert wrong_tokens(model, tokenizer, ROWS[1:2]) == 0  # the layer above was solved alone


def test_where_two_pull_apart_is_told() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 6)
    a, b = (torch.arange(4), rows), (torch.tensor([2, 3, 9]), torch.cat([-rows[2:], rows[:1]]))
    found = Overlap.of("layer", a, b)
    assert (found.neurons_a, found.neurons_b, found.shared, found.opposed) == (4, 3, 2, 2)
    assert found.cosine == pytest.approx(-1) and found.apart
    assert found.share == pytest.approx(float(rows[2:].square().sum() / b[1].square().sum()))
    (same,) = overlaps({"layer": a, "other": a}, {"layer": a})
    assert same.cosine == pytest.approx(1) and not same.apart and same.share == pytest.approx(1)
    none = Overlap.of("layer", a, (torch.tensor([7]), rows[:1]))
    assert none.cosine is None and none.shared == 0 and not none.apart


def test_patches_of_different_bases_are_not_stacked(patches: Path, tmp_path: Path) -> None:
    other = star(name="gpt2")
    other.save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_fingerprint": fingerprint(other)}))
    with pytest.raises(ValueError, match="were solved for different base weights"):
        stack(patches / "a", tmp_path / "gpt2", tmp_path / "c")
    star(modules_to_save=["norm"]).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="whole modules"):
        stack(patches / "a", tmp_path / "whole", tmp_path / "c")
    with pytest.raises(ValueError, match="is or holds the input|is not empty"):
        stack(patches / "a", patches / "b", patches / "a", overwrite=False)
    assert not (tmp_path / "c").exists()


def test_a_difference_is_told_by_layer_and_by_entry(patches: Path) -> None:
    found = diff(patches / "a", patches / "more")
    assert not found.same and found.only_a == [] and len(found.only_b) == 1 and len(found.both) == 2
    assert any(layer.norm_difference > 0 for layer in found.layers)
    data = found.to_dict()
    assert data["only_b"][0]["id"] == found.only_b[0].id and len(data["layers"]) == len(found.layers)
    nothing = diff(patches / "a", patches / "a")
    assert nothing.same and all(layer.norm_difference == 0 for layer in nothing.layers)
    apart = diff(patches / "a", patches / "b")
    assert len(apart.only_a) == 2 and len(apart.only_b) == 1 and apart.both == []
    for layer in apart.layers:
        # deltas are at right angles or not, but no longer than both together
        assert layer.norm_difference <= layer.norm_a + layer.norm_b + 1e-6
