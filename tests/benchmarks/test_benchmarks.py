"""The benchmarks' methods on a tiny model: each reports what it did, and leaves the base as it was."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import baselines  # noqa: E402
import effectiveness  # noqa: E402
import harness  # noqa: E402
from editors import Editor  # noqa: E402
from methods import METHODS, make_method  # noqa: E402
from peft_star.engine.engine import Engine  # noqa: E402
from peft_star.engine.passes import teacher_forced  # noqa: E402
from peft_star.failures import encode_rows  # noqa: E402
from peft_star.method import objective  # noqa: E402

ROWS = [{"prompt": "the cat", "completion": "ab"}, {"prompt": "a dog", "completion": "cd"}]
# the editors have their own tests, with rows that have a focus
WITHOUT_FOCUS = [name for name, factory in METHODS.items() if not issubclass(factory.func, Editor)]
# the tiny model has 96 neurons in a layer and random weights: other rates than a real model's
QUICK = {
    "star": {"num_neurons": 32, "max_steps": 50},
    "star-general": {"num_neurons": 32, "max_steps": 50},
    "star-paper": {"max_steps": 100},
    "star-model-wise": {"num_neurons": 32, "max_steps": 100},
    "star-layer": {"max_steps": 200},
    "star-neuron": {"num_neurons": 32, "max_steps": 200},
    "mint": {"factor": 3.0},
    "sgd": {"max_steps": 50},
    "sgd-tuned": {"max_steps": 50},
    "lora": {"learning_rate": 1e-2},
    "shira": {"learning_rate": 1e-2},
}


def quick(name, **settings):
    return make_method(name, **{**QUICK.get(name, {}), **settings})


def snapshot(model):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return weights, flags, hooks, [type(module) for module in model.modules()], model.training


def assert_unchanged(model, before):
    now = snapshot(model)
    assert list(now[0]) == list(before[0])
    assert all(torch.equal(now[0][name], tensor) for name, tensor in before[0].items())
    assert now[1:] == before[1:]
    assert all(parameter.grad is None for parameter in model.parameters())


def predictions(model, tokenizer, rows=ROWS):
    engine = Engine(model)
    return teacher_forced(engine, engine.batches(encode_rows(rows, tokenizer)))


@pytest.mark.parametrize("mode", ["multiple", "single"])
@pytest.mark.parametrize("name", WITHOUT_FOCUS)
def test_a_method_says_what_it_did_and_undoes_it(name, mode, tiny_model, tiny_tokenizer):
    tiny_model.train()
    before, start = snapshot(tiny_model), predictions(tiny_model.eval(), tiny_tokenizer)
    tiny_model.train()
    with quick(name).patched(tiny_model, tiny_tokenizer, ROWS, mode=mode) as outcome:
        after = predictions(outcome.model, tiny_tokenizer)
    assert outcome.failures == int((~start.right).sum()) > 0
    assert outcome.right == int(start.right.sum())
    assert outcome.solved == int((~start.right & after.right).sum())
    assert outcome.broken == int((start.right & ~after.right).sum())
    assert outcome.seconds > 0 and outcome.steps > 0 and outcome.forwards + outcome.forward_backwards > 0
    assert outcome.solved > 0
    json.dumps(outcome.to_dict())
    assert_unchanged(tiny_model, before)


@pytest.mark.parametrize("name", ["star", "sgd", "lora", "shira"])
def test_one_row_is_solved(name, tiny_model, tiny_tokenizer):
    with quick(name).patched(tiny_model, tiny_tokenizer, ROWS[:1]) as outcome:
        assert outcome.success and outcome.solved == outcome.failures == outcome.details["solved_by_margin"]


@pytest.mark.parametrize("name", ["star", "sgd", "lora", "mint", "logit-bias"])
def test_everything_is_undone_after_an_interrupt(name, tiny_model, tiny_tokenizer):
    before = snapshot(tiny_model)
    with pytest.raises(KeyboardInterrupt):
        with quick(name).patched(tiny_model, tiny_tokenizer, ROWS):
            raise KeyboardInterrupt
    assert_unchanged(tiny_model, before)


def test_everything_is_undone_when_a_pass_fails(tiny_model, tiny_tokenizer, monkeypatch):
    before, calls = snapshot(tiny_model), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return completion_logits(*args)

    completion_logits = objective.completion_logits
    monkeypatch.setattr(objective, "completion_logits", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        with quick("sgd").patched(tiny_model, tiny_tokenizer, ROWS):
            pass
    assert_unchanged(tiny_model, before)


def test_rows_without_failures_cost_nothing_but_looking(tiny_model, tiny_tokenizer):
    ids = tiny_tokenizer("the cat", return_tensors="pt")["input_ids"]
    token = int(tiny_model(ids).logits[0, -1].argmax())
    row = {"prompt": "the cat", "completion": tiny_tokenizer.decode([token])}
    assert predictions(tiny_model, tiny_tokenizer, [row]).right.all()
    for name in WITHOUT_FOCUS:
        with quick(name).patched(tiny_model, tiny_tokenizer, [row]) as outcome:
            assert (outcome.failures, outcome.steps, outcome.forward_backwards, outcome.success) == (0, 0, 0, True)


def test_logit_bias_is_the_smallest_that_solves(tiny_model, tiny_tokenizer):
    rows = [{"prompt": "the cat", "completion": "!"}]
    margin = 0.05
    with make_method("logit-bias").patched(tiny_model, tiny_tokenizer, rows, margin=margin) as outcome:
        assert outcome.success
        assert predictions(outcome.model, tiny_tokenizer, rows).margin.item() == pytest.approx(margin, abs=1e-4)


def test_logit_bias_leaves_out_what_cannot_be_solved(tiny_model, tiny_tokenizer):
    """Two continuations of one and the same prompt: a bias serves the one or the other."""
    rows = [{"prompt": "the cat", "completion": "!"}, {"prompt": "the cat", "completion": "?"}]
    with make_method("logit-bias").patched(tiny_model, tiny_tokenizer, rows) as outcome:
        assert (outcome.failures, outcome.solved) == (2, 1)


def test_mint_patches_one_column_at_a_time(tiny_model, tiny_tokenizer):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    with quick("mint", max_patches=1).patched(tiny_model, tiny_tokenizer, [{"prompt": "a", "completion": "!"}]) as out:
        changed = {
            n: (t != before[n]).any(dim=0) for n, t in tiny_model.state_dict().items() if (t != before[n]).any()
        }
    assert out.steps == 1
    assert [name.endswith("down_proj.weight") for name in changed] == [True]
    assert int(next(iter(changed.values())).sum()) == 1


class Spoiling(torch.optim.SGD):
    """Two good steps, and then one that ruins the weights."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps <= 2:
            return super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.zero_()


def test_the_best_state_is_kept(tiny_model, tiny_tokenizer, monkeypatch):
    with quick("sgd", learning_rate=0.1, max_steps=2).patched(tiny_model, tiny_tokenizer, ROWS) as outcome:
        best = outcome.solved, outcome.broken
    assert 0 < outcome.solved < outcome.failures
    monkeypatch.setattr(baselines.Descent, "optimizer", lambda self, parameters: Spoiling(parameters, lr=0.1))
    for max_steps in (3, 5):
        with quick("sgd", max_steps=max_steps).patched(tiny_model, tiny_tokenizer, ROWS) as outcome:
            assert outcome.steps == max_steps
            assert (outcome.solved, outcome.broken) == best


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match="no method 'magic'; choose from star"):
        make_method("magic")
    with pytest.raises(ValueError, match="sgd has no setting 'rank'; it has optimizer"):
        make_method("sgd", rank=8)


def test_settings_are_plain_json():
    for name in METHODS:
        method = make_method(name)
        assert json.loads(json.dumps(method.settings)) == method.settings != {}
        assert method.name == name


def run_effectiveness(monkeypatch, tiny_dir, data, out, *more):
    given = ["--model", str(tiny_dir), "--data", str(data), "--tasks", "conala", "ia32", "--rows", "2"]
    given += ["--demonstrations", "1", "--json", str(out), "--methods", "logit-bias", "sgd", "mint", *more]
    monkeypatch.setattr(sys, "argv", ["effectiveness.py", *given])
    effectiveness.main()


def test_effectiveness_goes_on_where_it_stopped(monkeypatch, tiny_dir, data, tmp_path, capsys):
    out, study = tmp_path / "effectiveness.json", effectiveness.Study
    patched, calls = study.patched, []

    def interrupted(self, row, method, mode):
        calls.append((method.name, mode, row["completion"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return patched(self, row, method, mode)

    monkeypatch.setattr(study, "patched", interrupted)
    run_effectiveness(monkeypatch, tiny_dir, data, out)
    first = json.loads(out.read_text())["results"]
    # the unpatched row, and two patches besides the one that warms up
    assert len(first) == 3 and "goes on from there" in capsys.readouterr().out

    run_effectiveness(monkeypatch, tiny_dir, data, out)
    results = json.loads(out.read_text())["results"]
    # three methods, of which MINT has one mode only, and the unpatched model, on four rows
    assert len(results) == 4 * (3 * 2 - 1 + 1)
    assert {key: results[key] for key in first} == first
    done = calls[1:3] + [call for call in calls[5:]]
    assert len(done) == len(set(done)) == 20
    printed = capsys.readouterr().out
    assert "### all tasks (4 rows)" in printed and printed.count("| single | MINT |") == 9

    record = results["multiple/sgd/ia32/1"]
    outcome, score = record["outcome"], record["score"]
    assert score["right"] == outcome["solved"] + outcome["right"] - outcome["broken"]
    assert score["tokens"] == outcome["failures"] + outcome["right"]
    assert record["kl"] > 0

    with pytest.raises(SystemExit, match="other settings"):
        run_effectiveness(monkeypatch, tiny_dir, data, out, "--margin", "0.2")


def test_a_method_with_settings_is_kept_by_its_whole_name():
    study = effectiveness.Study.__new__(effectiveness.Study)
    methods = {name: effectiveness.parse_method(name) for name in ("star", "star:reach=prompt")}
    keys = {key for key, _ in study.units({"a": [{}]}, methods, ["multiple"])}
    assert keys == {"unpatched/a/0", "multiple/star/a/0", "multiple/star:reach=prompt/a/0"}
    assert effectiveness.complete(dict.fromkeys(keys, {}), "a", 1, [("multiple", name) for name in methods])
    assert methods["star:reach=prompt"].settings["reach"] == "prompt"


def test_methods_take_turns():
    study = effectiveness.Study.__new__(effectiveness.Study)
    methods = {name: make_method(name) for name in ("sgd", "star")}
    keys = [key for key, _ in study.units({"a": [{}, {}], "b": [{}]}, methods, ["multiple"])]
    assert keys == [
        *("unpatched/a/0", "multiple/sgd/a/0", "multiple/star/a/0"),
        *("unpatched/b/0", "multiple/star/b/0", "multiple/sgd/b/0"),
        *("unpatched/a/1", "multiple/sgd/a/1", "multiple/star/a/1"),
    ]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[1]")
    with pytest.raises(SystemExit, match="holds no results of a benchmark"):
        harness.resume(path, {})
