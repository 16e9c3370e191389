"""Repairs that memory does not hold, and repairs that go on where a run of the same was killed."""

import pytest
import torch

from peft_star import RepairArguments, RepairCallback, Unfinished, repair
from peft_star.engine import passes
from peft_star.method import objective, protected
from peft_star.method.unfinished import AdapterState
from peft_star.models.fingerprint import fingerprint
from peft_star.tuner.layer import star_layers
from support.words import MANY, QUIET, RETAIN, ROWS, star, word_tokenizer

ARGS = RepairArguments(**QUIET)


def held(model):
    return {
        name: (layer.star_neurons["default"].tolist(), layer.star_delta["default"].tolist())
        for name, layer in star_layers(model, "default").items()
    }


class Killed(BaseException):
    """As a kill, which nothing catches."""


class KillAt(RepairCallback):
    def __init__(self, step):
        self.step, self.steps = step, 0

    def on_step_end(self, args, state):
        self.steps += 1
        if self.steps > self.step:
            raise Killed


# memory


@pytest.mark.parametrize("where", ["trace", "search"])
def test_a_repair_in_less_memory_is_the_one_with_smaller_batches(where, monkeypatch):
    small = RepairArguments(max_batch_tokens=8, **QUIET)
    expected = star()
    report = repair(expected, word_tokenizer(), ROWS, small, retain=RETAIN)

    owner, name = (passes, "loss_at") if where == "trace" else (objective, "completion_logits")
    real = getattr(owner, name)

    def limited(*args):
        batch = args[1]
        if batch.input_ids.numel() > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr("peft_star.method.trace.loss_at" if where == "trace" else f"{owner.__name__}.{name}", limited)
    model = star()
    with pytest.warns(UserWarning, match="starting over with 8"):
        found = repair(model, word_tokenizer(), ROWS, RepairArguments(max_batch_tokens=16, **QUIET), retain=RETAIN)
    assert held(model) == held(expected)
    assert found.arguments["max_batch_tokens"] == 8 and found.success
    assert [item.gap_before for item in found.failures] == [item.gap_before for item in report.failures]


def test_a_repair_for_which_there_is_no_memory_leaves_the_adapter_as_it_was(monkeypatch):
    model = star()
    repair(model, word_tokenizer(), ROWS[:1], ARGS)
    before, config = held(model), model.peft_config["default"].to_dict()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(protected, "search_strengths", full)
    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="does not hold a single row"):
        repair(model, word_tokenizer(), ROWS[1:], ARGS)
    assert held(model) == before and model.peft_config["default"].to_dict() == config
    assert all(layer.star_delta["default"].requires_grad for layer in star_layers(model, "default").values())


# going on


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "prior-guided"},
        {"algorithm": "prior-guided", "mode": "single"},
        {"mode": "single", "reach": "prompt"},
        {"max_steps": 40},
    ],
)
def test_a_repair_goes_on_where_it_was_killed(tmp_path, settings):
    args, path = RepairArguments(**{**QUIET, **settings}), tmp_path / "work"
    whole = repair(star(), word_tokenizer(), MANY, args)
    assert whole.steps > 2
    model = star()
    with pytest.raises(Killed):
        keep = Unfinished(path, seconds=0)
        repair(model, word_tokenizer(), MANY, args, unfinished=keep, callbacks=[KillAt(1)])
    assert [item.name for item in tmp_path.iterdir()] == ["work"] and not keep.resumed

    unfinished, again, steps = Unfinished(path, resume=True, seconds=0), star(), []

    class First(RepairCallback):
        def on_step_end(self, args, state):
            steps.append(state.step)

    report = repair(again, word_tokenizer(), MANY, args, unfinished=unfinished, callbacks=[First()])
    assert unfinished.resumed and report.success
    # what failed is what fails without the patch, and the steps of both runs are counted
    assert [item.gap_before for item in report.failures] == [item.gap_before for item in whole.failures]
    assert report.steps == 1 + len(steps)
    unfinished.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_repair_does_not_go_on_from_it(tmp_path):
    path = tmp_path / "work"
    with pytest.raises(Killed):
        repair(star(), word_tokenizer(), MANY, ARGS, unfinished=Unfinished(path, seconds=0), callbacks=[KillAt(1)])
    kept = path.read_bytes()
    for model, rows, args in (
        (star(num_neurons=7), MANY, ARGS),
        (star(), MANY[1:], ARGS),
        (star(), MANY, RepairArguments(**{**QUIET, "margin": 0.02})),
    ):
        path.write_bytes(kept)
        unfinished = Unfinished(path, resume=True)
        repair(model, word_tokenizer(), rows, args, unfinished=unfinished)
        assert not unfinished.resumed
    for content in (b"", b"not a file of tensors", kept[:-4]):
        path.write_bytes(content)
        unfinished = Unfinished(path, resume=True)
        assert repair(star(), word_tokenizer(), MANY, ARGS, unfinished=unfinished).success and not unfinished.resumed
    path.write_bytes(kept)
    assert not (unfinished := Unfinished(path)).resume
    repair(star(), word_tokenizer(), MANY, ARGS, unfinished=unfinished)
    assert not unfinished.resumed


def test_quick_repairs_and_full_disks_keep_nothing(tmp_path, monkeypatch):
    unfinished = Unfinished(tmp_path / "work")
    assert repair(star(), word_tokenizer(), MANY, ARGS, unfinished=unfinished).success
    assert list(tmp_path.iterdir()) == []

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_star.method.unfinished.save_file", full)
    assert repair(star(), word_tokenizer(), MANY, ARGS, unfinished=Unfinished(tmp_path / "work", seconds=0)).success
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_put_back_whole():
    model = star()
    from peft_star.method.subject import Subject

    subject = Subject.of(model, word_tokenizer(), ARGS)
    state, before, config = AdapterState.of(subject), held(model), subject.config.to_dict()
    repair(model, word_tokenizer(), ROWS, ARGS)
    assert held(model) != before
    state.put_back(subject)
    assert held(model) == before and subject.config.to_dict() == config and subject.config.repaired is None
    assert fingerprint(model).startswith("star1:")
