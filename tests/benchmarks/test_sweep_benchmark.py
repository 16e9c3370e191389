"""The sweep measures Algorithm 1 in the settings that its table names, whatever the package's defaults are."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import sweep  # noqa: E402
from peft_star import RepairArguments, StarConfig  # noqa: E402


def test_one_factor_at_a_time_around_algorithm_1() -> None:
    settings = sweep.grid()
    base_config, base_arguments = settings["base setting"]
    assert (base_config["layer_selection"], base_config["num_layers"]) == ("occlusion", 0.5)
    for name, (config, arguments) in settings.items():
        StarConfig(**config), RepairArguments(**arguments)  # raise where a setting is not one of the package's
        assert arguments["algorithm"] == "prior-guided"
        changed = {key for key in config if config[key] != base_config[key]}
        changed |= {key for key in arguments if arguments[key] != base_arguments[key]}
        factors = {frozenset({"norm", "learning_rate"}), frozenset({"damping", "growth"})}
        assert (not changed) == (name == "base setting")
        assert len(changed) <= 1 or any(changed <= pair for pair in factors), name


def test_a_sweep_runs_and_goes_on_where_it_stopped(monkeypatch, tiny_dir, tmp_path, capsys) -> None:
    results = tmp_path / "sweep.json"
    arguments = ["sweep.py", "--model", str(tiny_dir), "--data", str(tmp_path), "--tasks", "conala", "--rows", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(results), "--plot", str(tmp_path / "sweep.png")])
    monkeypatch.setattr(sweep, "task_rows", lambda given: {"conala": [{"prompt": "a b", "completion": "cd"}]})
    settings = {name: sweep.grid()[name] for name in ("base setting", "layers 1.0")}
    monkeypatch.setattr(sweep, "grid", lambda: settings)
    sweep.main()
    state = json.loads(results.read_text())
    assert {name: len(by_task["conala"]) for name, by_task in state["results"].items()} == dict.fromkeys(settings, 1)
    printed = capsys.readouterr().out
    assert "| base setting |" in printed and "| layers 1.0 |" in printed
    assert (tmp_path / "sweep.png").stat().st_size > 0

    # nothing is measured twice
    monkeypatch.setattr("fresh_patch.patch_row", lambda *args: pytest.fail("measured again"))
    sweep.main()
    assert capsys.readouterr().out == printed
