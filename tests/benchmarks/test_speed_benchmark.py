"""The benchmark of speed on a tiny model: what is timed, in which order, and what its tables make of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("bm25s")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import report
import speed
import speed_measure
import speed_report
from interface import Passes
from methods import make_method
from peft_star.engine.engine import Engine
from peft_star.engine.passes import completion_logits, loss_at
from peft_star.failures import encode_rows
from peft_star.models.structure import find_second_matrices

ROW = {"prompt": "the cat", "completion": "ab"}
SECONDS = {"wall": 1.0, "cpu": 1.0}


@pytest.fixture
def run(monkeypatch, tiny_dir, data):
    """Run the command line on two rows of two tasks."""
    threads = torch.get_num_threads()

    def command(out, *more):
        given = ["--model", tiny_dir, "--data", data, "--tasks", "conala", "ia32", "--rows", 2, "--demonstrations", 1]
        given += ["--json", out, "--config", '{"num_neurons": 32}', *more]
        monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, given)])
        speed.main()
        return json.loads(out.read_text())

    yield command
    torch.set_num_threads(threads)


def study_of(model, tokenizer):
    return speed_measure.Study(model, tokenizer, 0.01, "multiple")


def star(**arguments):
    return speed_measure.method_of("star", {"num_neurons": 32}, arguments)


# what is timed


def test_the_floor_differentiates_every_ffn(tiny_model, tiny_tokenizer):
    model = tiny_model.double().requires_grad_(False)
    (batch,) = Engine(model).batches(encode_rows([ROW], tiny_tokenizer))
    chosen = torch.tensor([True, False])
    gradients = speed_measure.input_gradients(model, batch, chosen)
    ffns = list(find_second_matrices(model).values())
    assert len(gradients) == len(ffns) == 4

    def loss(ffn, change):
        handle = ffn.register_forward_pre_hook(lambda module, args: (args[0] + change,))
        with torch.no_grad():
            value = loss_at(completion_logits(model, batch).double(), batch, chosen).item()
        handle.remove()
        return value

    torch.manual_seed(0)
    for ffn, gradient in zip(ffns, gradients):
        direction = torch.randn_like(gradient)
        slope = (loss(ffn, 1e-3 * direction) - loss(ffn, -1e-3 * direction)) / 2e-3
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-2, abs=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_floor_is_one_forward_backward_and_one_forward(tiny_model, tiny_tokenizer):
    study, passes = study_of(tiny_model, tiny_tokenizer), Passes()
    with passes.counting(tiny_model):
        record = study.floor(ROW)
    # before them a forward to see what fails
    assert (passes.differentiated, passes.total) == (1, 3)
    assert record["failures"] == 2 and record["forward_backward"]["wall"] > 0 and record["forward"]["wall"] > 0


def test_a_row_without_failures_has_no_floor(tiny_model, tiny_tokenizer, monkeypatch):
    study = study_of(tiny_model, tiny_tokenizer)
    (batch,) = study.engine.batches(encode_rows([ROW], tiny_tokenizer))
    monkeypatch.setattr(study, "failing", lambda row: (batch, torch.zeros(2, dtype=torch.bool)))
    assert study.floor(ROW) == {"failures": 0, "tokens": batch.input_ids.shape[1]}
    with pytest.raises(SystemExit, match="every token of these rows right"):
        study.warm_up({"conala": [ROW]}, {})


@pytest.mark.parametrize("name", ["star", "sgd", "lora", "mint", "logit-bias"])
def test_seconds_leave_out_making_room(name, tiny_model, tiny_tokenizer, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(
        speed_measure.Stopwatch, "_read", lambda self: dict.fromkeys(("wall", "cpu"), float(next(clock)))
    )
    method = star() if name == "star" else make_method(name)
    install = method.install
    record = study_of(tiny_model, tiny_tokenizer).patched(ROW, method)
    # each reading is one tick later: making room and taking off are two readings apart
    assert record["setup"] == record["removal"] == {"wall": 1.0, "cpu": 1.0}
    assert method.install == install
    assert record["seconds"]["wall"] < 60 and record["failures"] == 2


def test_phases_add_up_to_the_repair(tiny_model, tiny_tokenizer):
    record = study_of(tiny_model, tiny_tokenizer).patched(ROW, star())
    for name in ("forward_backwards", "forwards"):
        assert sum(phase[name] for phase in record["phases"].values()) <= record[name]
    assert record["phases"]["trace"]["forward_backwards"] == 1
    spent = speed_measure.phase_seconds(record)
    for clock in speed_measure.CLOCKS:
        assert sum(phase[clock] for phase in spent.values()) == pytest.approx(record["seconds"][clock])
    assert spent["trace"]["wall"] > 0 and spent[speed_measure.OTHER]["wall"] > 0


def test_after_the_warm_up_no_repair_pays_for_the_model(tiny_model, tiny_tokenizer):
    study = study_of(tiny_model, tiny_tokenizer)
    method = speed_measure.method_of("star", {"layer_selection": "occlusion", "num_layers": 1}, {"background": 64})
    rows = {"conala": [ROW, {"prompt": "a dog", "completion": "cd"}]}
    once = study.warm_up(rows, {"star": method})
    assert once["semantic bases"]["wall"] > 0 and set(once["first repair"]) == {"star"}
    passes = []
    for layer in range(4):
        other = speed_measure.method_of("star", {"num_neurons": 32, "layer_selection": [layer]}, {"background": 64})
        counts = [study.patched(rows["conala"][1], other)["phases"]["solve"]["forwards"] for _ in range(2)]
        passes += counts
    # the row itself is read, to see what its neurons do beside the failures; the background is known
    assert passes == [1] * 8


def test_settings_go_to_star_and_variants_stay_what_they_are():
    settings = {"num_neurons": 8, "num_layers": 2}, {"max_steps": 3}
    assert speed_measure.method_of("star", *settings).settings["num_neurons"] == 8
    variant = speed_measure.method_of("star-neuron", *settings).settings
    assert (variant["num_neurons"], variant["num_layers"], variant["max_steps"]) == (64, 1, 3)
    assert speed_measure.method_of("sgd", *settings).settings == make_method("sgd").settings


# in turn


def test_methods_take_turns_and_mint_runs_once():
    study = speed_measure.Study.__new__(speed_measure.Study)
    methods = {name: make_method(name) for name in ("sgd", "mint")}
    keys = [key for key, _ in study.units({"a": [{}, {}], "b": [{}]}, methods, 2, 1)]
    assert keys == [
        *("a/0/floor/0", "a/0/sgd/0", "a/0/mint/0", "a/0/sgd/1", "a/0/floor/1"),
        *("b/0/mint/0", "b/0/floor/0", "b/0/sgd/0", "b/0/sgd/1", "b/0/floor/1"),
        *("a/1/floor/0", "a/1/sgd/0", "a/1/sgd/1", "a/1/floor/1"),
    ]


# what the tables make of it


def record(cpu, success=True, **more):
    seconds = {"wall": 2 * cpu, "cpu": cpu}
    counts = {"failures": 2, "solved": 2 if success else 1, "right": 4, "broken": 0, "success": success, "steps": 3}
    return {"seconds": seconds, "setup": SECONDS, "removal": SECONDS, **counts, "forward_backwards": 3, "forwards": 1}


def floor(forward_backward, forward):
    both = {"forward_backward": forward_backward, "forward": forward}
    return {"failures": 2, "tokens": 9} | {name: {"wall": s, "cpu": s} for name, s in both.items()}


@pytest.fixture
def state():
    results = {
        "a/0/sgd/0": record(4.0),
        "a/1/sgd/0": record(12.0, success=False),
        **{f"a/0/star/{n}": record(s) for n, s in enumerate((9.0, 1.0, 2.0))},
        "a/1/star/0": record(3.0),
        "a/0/mint/0": record(40.0),
        "a/0/floor/0": floor(1.5, 0.5),
        "a/1/floor/0": floor(2.0, 1.0),
        "a/2/star/0": {"failures": 0},
    }
    return {"results": results, "clock": "cpu", "methods": {"sgd": {}, "mint": {}, "star": {}}}


def cells(table, first):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_of_medians_on_the_rows_that_both_have(state):
    table = speed_report.targets_table(state)
    # the median of STAR's repeats on the first row is 2
    sgd = cells(table, "STAR / SGD")
    assert sgd[1:5] == ["≤ 0.35", "1.77", "yes", "2"]
    assert sgd[5].startswith("0.31 [") and sgd[6].startswith("0.38 [")
    assert sgd[-2:] == ["0.50", "1"], "SGD repaired the first row only"
    assert cells(table, "MINT / STAR")[1:7] == ["≥ 10", "2.22", "yes", "1", "20.00", "20.00"]
    least = cells(table, "STAR / full forward-backward + forward")
    assert least[1:5] == ["≤ 1", "about 10", "yes", "2"]
    assert least[5].startswith("1.00 [") and least[7].startswith("2.00 [")
    assert "LoRA" not in table


def test_finding_the_patch_is_told_without_what_a_repair_looks_at(state):
    table = speed_report.targets_table(state)
    assert "alone" not in table, "no phases are known"
    spent = {"trace": 0.5, "locate": 0.25, "solve": 0.25, "patch": 0.5, "failures": 0.2, "verify": 0.1}
    for number, share in ((0, 1.0), (1, 0.5)):
        record = state["results"][f"a/{number}/star/0"]
        record["phases"] = {
            name: {"wall": 2 * share * s, "cpu": share * s, "forward_backwards": 0, "forwards": 1}
            for name, s in spent.items()
        }
    for repeat in (1, 2):
        del state["results"][f"a/0/star/{repeat}"]
    alone = cells(speed_report.targets_table(state), "STAR, trace to patch alone / SGD")
    # 1.5 and 0.75 seconds of nine and three, beside four and twelve
    assert alone[1:5] == ["≤ 0.19", "–", "yes", "2"]
    assert alone[5].startswith("0.14 [") and alone[6].startswith("0.22 [")
    assert alone[-2:] == ["0.38", "1"]
    text = speed_report.left_out_text()
    assert "gate" in text and "ledger" in text


def test_the_clock_decides_with_several_threads(state):
    for key, found in state["results"].items():
        if "/star/" in key and found["failures"]:
            found["seconds"]["wall"] = 100.0
    state["clock"] = "wall"
    table = speed_report.targets_table(state)
    assert cells(table, "MINT / STAR")[3:6] == ["no", "1", "0.80"]
    assert table.index("wall s: sums") < table.index("CPU s: sums")


def test_seconds_and_outcomes(state):
    table = speed_report.seconds_table(state)
    assert cells(table, "full forward-backward") == ["full forward-backward", "2", "1.750", "1.750", "–"]
    assert cells(table, "SGD")[:4] == ["SGD", "2", "8.000", "16.000"] and cells(table, "SGD")[4].startswith("3.20 [")
    assert cells(table, "MINT, making room")[2] == "1.000"
    outcomes = speed_report.outcomes_table(state)
    assert cells(outcomes, "SGD")[1:5] == ["2", "3 / 4 (75.0%)", "0 / 8 (0.00%)", "1 / 2"]
    assert cells(outcomes, "STAR")[4:] == ["2 / 2", "3.0", "3.0", "1.0"]


def test_the_papers_ratios():
    assert [target.paper for target in speed_report.TARGETS] == ["1.77", "–", "2.22", "–", "about 10"]


def test_the_median_ratio_counts_each_row_once():
    cases = np.array([[1.0, 2.0], [1.0, 1.0], [300.0, 100.0]])
    assert speed_report.median_ratio(cases) == 1.0


# the command line


def test_from_the_command_line(run, tmp_path, capsys, tiny_dir, monkeypatch):
    out, page = tmp_path / "speed.json", tmp_path / "page.md"
    quick = '{"max_steps": 3, "background": 64, "margin": 0.02}'
    more = ["--arguments", quick, "--methods", "sgd", "mint", "star", "--plot", tmp_path / "speed"]
    patched, calls = speed_measure.Study.patched, []

    def interrupted(self, row, method):
        calls.append(method.name)
        if len(calls) == 6:  # three of them warm up
            raise KeyboardInterrupt
        return patched(self, row, method)

    monkeypatch.setattr(speed_measure.Study, "patched", interrupted)
    first = run(out, *more, "--mint-rows", 1)
    assert len(first["results"]) == 3 and "goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(speed_measure.Study, "patched", patched)
    state = run(out, *more, "--mint-rows", 1, "--repeats", 2)
    results = state["results"]
    assert {key: results[key] for key in first["results"]} == first["results"]
    # of four rows, all twice but MINT, which runs once on two
    assert len(results) == 4 * 2 * 3 + 2
    assert state["machine"]["threads"] == 1 and state["clock"] == "cpu"
    assert state["methods"]["star"]["max_steps"] == 3 and state["methods"]["star"]["num_neurons"] == 32
    printed = capsys.readouterr().out
    assert "| STAR / SGD | ≤ 0.35 | 1.77 |" in printed and "| STAR, trace to patch alone / SGD | ≤ 0.19 |" in printed
    assert speed_report.left_out_text() in printed and "Once for each model, in CPU s: semantic bases" in printed
    pictures = [tmp_path / f"speed-{name}.png" for name in ("phases", "methods")]
    assert all(picture.stat().st_size > 10_000 for picture in pictures)

    # nothing is left to do: nothing is repaired
    monkeypatch.setattr(speed_measure.Study, "patched", lambda *args, **kwargs: pytest.fail("repaired again"))
    assert run(out, *more, "--mint-rows", 1, "--repeats", 2)["results"] == results
    with pytest.raises(SystemExit, match="other settings"):
        run(out, *more, "--threads", 2)

    monkeypatch.setattr(sys, "argv", ["report.py", "--json-files", str(out), "--out", str(page)])
    report.main()
    text = page.read_text()
    assert "### Speed of a repair" in text and "| STAR / SGD |" in text and text.count(".png)") == 2
    assert "--repeats 2 --mint-rows 1" in text and "--threads 1" in text
    assert """--config '{"num_neurons": 32}'""" in text and f"--arguments '{quick}'" in text


@pytest.mark.parametrize("option", ["--repeats", "--mint-rows", "--threads"])
def test_counts_are_at_least_one(option, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        run(tmp_path / "speed.json", option, 0)
    assert refused.value.code == 2 and "not a whole number of at least 1" in capsys.readouterr().err


def test_unknown_settings_are_refused(run, tmp_path, capsys):
    for arguments in ('{"magic": 1}', '{"margin": 2}'):
        with pytest.raises(SystemExit) as refused:
            run(tmp_path / "speed.json", "--arguments", arguments)
        error = capsys.readouterr().err
        assert refused.value.code == 2 and ("magic" in error or "margin" in error)
