"""What a repair reported goes with its patch when PEFT saves it, as long as it is true of it."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel

from peft_star import RepairArguments, RepairReport, StarConfig, repair
from peft_star.tuner.layer import star_layers
from support.command_line import names
from support.words import QUIET, ROWS, decided, star, word_tokenizer

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
FILES += ["repair_ledger.json", "repair_ledger.safetensors"]
WITH_REPORT = [*FILES, "repair_report.json", "repair_report.times.json"]


@pytest.fixture(scope="module")
def repaired():
    model = star()
    report = repair(model, word_tokenizer(), ROWS, RepairArguments(**QUIET))
    assert report.success
    return model, report


def test_peft_saves_report_and_card_of_a_repair(repaired, tmp_path):
    model, report = repaired
    for kept in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kept.save_pretrained(tmp_path / "patch")  # each time over the earlier one
        assert names(tmp_path / "patch") == WITH_REPORT
        assert RepairReport.load(tmp_path / "patch" / "repair_report.json") == report
        card = (tmp_path / "patch" / "README.md").read_text()
        assert f"**{report.num_solved} of {len(report.failures)} failing tokens solved**" in card
        assert "More Information Needed" not in card
        assert card.count("<!-- peft_star: card") == 1 and "### Framework versions" not in card
    assert "repaired" not in (tmp_path / "patch" / "adapter_config.json").read_text()
    PeftModel.from_pretrained(decided(), tmp_path / "patch")


def test_a_report_is_not_saved_with_other_tensors(repaired, tmp_path):
    model = copy.deepcopy(repaired[0])
    layer = next(iter(star_layers(model, "default").values()))
    with torch.no_grad():
        layer.star_delta["default"][0, 0] += 1e-3
    model.save_pretrained(tmp_path / "patch")
    assert names(tmp_path / "patch") == FILES
    assert "failing tokens solved" not in (tmp_path / "patch" / "README.md").read_text()


def test_a_later_repair_has_its_own_report(repaired, tmp_path):
    model, earlier = copy.deepcopy(repaired[0]), repaired[1]
    rows = [{"prompt": "w50 w51", "completion": " w53"}]
    report = repair(model, word_tokenizer(), rows, RepairArguments(**QUIET), retain=ROWS)
    model.save_pretrained(tmp_path)
    assert RepairReport.load(tmp_path / "repair_report.json") == report != earlier


def test_adapters_with_names(tmp_path):
    model = star()
    model.add_adapter("second", StarConfig(task_type="CAUSAL_LM", num_neurons=8, num_layers=1.0))
    model.set_adapter("second")
    report = repair(model, word_tokenizer(), ROWS, RepairArguments(**QUIET))
    model.save_pretrained(tmp_path / "all")
    assert RepairReport.load(tmp_path / "all" / "second" / "repair_report.json") == report
    assert "failing tokens solved" not in (tmp_path / "all" / "README.md").read_text()  # it is the first one's
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert names(tmp_path / "one") == ["README.md", "second"]
    card = (tmp_path / "one" / "README.md").read_text()
    assert "failing tokens solved" in card and 'subfolder="second"' in card


def test_modules_that_are_saved_along_count(tmp_path):
    model = star(modules_to_save=["lm_head"])
    report = repair(model, word_tokenizer(), ROWS, RepairArguments(**QUIET))
    model.save_pretrained(tmp_path / "patch")
    assert RepairReport.load(tmp_path / "patch" / "repair_report.json") == report
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert "repair_report.json" not in names(tmp_path / "other")


def test_words_of_people_on_a_card_are_kept(repaired, tmp_path):
    (tmp_path / "README.md").write_text("Mind the gap.\n")
    repaired[0].save_pretrained(tmp_path)
    assert "Mind the gap." in (tmp_path / "README.md").read_text() and names(tmp_path) == WITH_REPORT
