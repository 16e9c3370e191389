"""`peft-star repair`: what it writes, its exit codes, and one sentence for every bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import typer.main
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_star import RepairArguments, RepairCallback, RepairReport, StarConfig, log
from peft_star.cli import app as cli_app
from peft_star.cli import main as cli_main
from peft_star.cli import patches as cli_patches
from peft_star.cli import repair as cli_repair
from peft_star.cli.options import parse_amount
from peft_star.loading import load_patch
from peft_star.sharing.patch_files import Patch
from support.byte_llama import build_tokenizer
from support.command_line import SOLVABLE, Run, is_one_sentence, names


def test_defaults_are_those_of_the_api() -> None:
    defaults = {name: item.default for name, item in inspect.signature(cli_repair.repair).parameters.items()}
    config, arguments = StarConfig(), RepairArguments()
    assert parse_amount("--neurons", defaults["num_neurons"], "auto") == config.num_neurons
    assert cli_repair.parse_layers(defaults["layers"]) == {"num_layers": config.num_layers}
    assert config.layer_selection == "last"
    assert defaults["neuron_pattern"] == config.neuron_pattern
    assert (defaults["max_steps"], defaults["learning_rate"]) == (arguments.max_steps, arguments.learning_rate)
    assert (defaults["algorithm"], defaults["generalization"]) == (arguments.algorithm, arguments.generalization)


@pytest.fixture(scope="module")
def command() -> Any:
    """The command as click sees it."""
    return typer.main.get_command(cli_app.app).commands["repair"]


def test_every_setting_is_an_option_or_left_out_on_purpose(command: Any) -> None:
    options = {option.name: option for option in command.params}
    settings = {field.name: field for field in dataclasses.fields(RepairArguments)}
    assert set(cli_repair.LEFT_OUT) <= settings.keys()
    assert settings.keys() & options.keys() == settings.keys() - set(cli_repair.LEFT_OUT)
    for name in settings.keys() & options.keys():
        turned_off = settings[name].default is True  # by an option --no-...
        default = settings[name].default
        default = list(default) if isinstance(default, tuple) else default  # an option that is repeated
        assert options[name].default == (False if turned_off else default), name
        assert all(opt.startswith("--no-") for opt in options[name].opts) is turned_off, name
        assert options[name].help == settings[name].metadata["help"]
    for name in ("num_neurons", "neuron_pattern"):
        field = StarConfig.__dataclass_fields__[name]
        assert (options[name].default, options[name].help) == (str(field.default), field.metadata["help"])


def test_options_have_the_names_that_people_know(command: Any) -> None:
    names = {name for option in command.params for name in option.opts if name.startswith("-")}
    expected = (
        "--output -o --retain --related --neurons --layers --neuron-pattern --mode --algorithm --generalization "
        "--steps --lr --norm --margin --reach --generate --serve --background --ridge --damping --growth "
        "--occlusion --max-rounds --max-batch-tokens --dtype --device-map --revision --token --push-to-hub --private "
        "--overwrite --resume --json"
    )
    assert names >= set(expected.split())


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        ("", {}),
        ("--steps 3 --lr 0.02", {"max_steps": 3, "learning_rate": 0.02}),
        ("--generate", {"verify_generation": True}),
        ("--no-generate", {"verify_generation": False}),
        ("--serve bf16 --serve q8_0", {"serve": ("bf16", "q8_0")}),
        ("--reach prompt", {"reach": "prompt"}),
        ("--damping 1.0 --growth 1.0 --occlusion exact", {"damping": 1.0, "growth": 1.0, "occlusion": "exact"}),
        ("--background 0 --ridge 0.0 --max-rounds 1", {"background": 0, "ridge": 0.0, "max_rounds": 1}),
        ("--max-batch-tokens 64 --norm rms", {"max_batch_tokens": 64, "norm": "rms"}),
    ],
)
def test_options_set_what_they_name(command: Any, typed: str, settings: dict[str, Any]) -> None:
    values = command.make_context("repair", ["M", "F", "-o", "P", *typed.split()]).params
    arguments = cli_repair.ARGUMENTS.read(values)
    assert RepairArguments(**arguments) == RepairArguments(**settings)
    assert sorted(cli_repair.ARGUMENTS.words(arguments)) == sorted(typed.split())


@pytest.mark.parametrize(("typed", "count"), [("--neurons 32", 32), ("--neurons 0.25", 0.25), ("", "auto")])
def test_neurons_are_a_number_or_a_share(command: Any, typed: str, count: int | float | str) -> None:
    values = command.make_context("repair", ["M", "F", "-o", "P", *typed.split()]).params
    config = cli_repair.CONFIG.read(values)
    assert (config["num_neurons"], type(config["num_neurons"])) == (count, type(count))
    assert cli_repair.CONFIG.words(config) == typed.split()


def test_repair_writes_a_patch_that_peft_loads(
    run: Run, tiny_dir: Path, failures: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    retain = write_rows("retain.jsonl", ("abc", "Q"))
    target = tmp_path / "deep" / "patch"
    result = run("repair", tiny_dir, failures, "-o", target, "--retain", retain, *SOLVABLE)
    assert (result.code, result.out) == (0, ""), result.err
    assert "3 of 3" in result.err
    assert names(target) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "repair_ledger.json",
        "repair_ledger.safetensors",
        "repair_report.json",
        "repair_report.times.json",
        "report.png",
    ]
    assert names(target.parent) == ["patch"]
    report = RepairReport.load(target / "repair_report.json")
    assert report.success
    assert {row.source for row in report.rows} == {"failures", "retain"}
    umask = os.umask(0)
    os.umask(umask)
    for path in target.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name

    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_dir)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), target)
    inputs = build_tokenizer()("a b", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert build_tokenizer().decode(generated[0]) == "a bcd"


def test_a_repair_builds_upon_a_patch(
    run: Run, tiny_dir: Path, patch: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(patch, tmp_path / "mine"))
    rows = write_rows("more.jsonl", ("xyz", "!"))
    again = ("repair", tiny_dir, rows, "--adapter", mine, "--note", "more", *SOLVABLE)
    result = run(*again, "-o", mine)
    assert result.code == 2 and "is not empty; give --overwrite" in result.err
    # what it builds upon may be what it replaces
    result = run(*again, "-o", mine, "--overwrite")
    assert result.code == 0, result.err
    assert "earlier repairs' rows broken  0 of 1" in result.err
    assert [entry.note for entry in log(mine).entries] == ["", "more"]
    assert (
        "--adapter mine" in (mine / "README.md").read_text() and str(tmp_path) not in (mine / "README.md").read_text()
    )
    assert run("check", tiny_dir, mine).code == 0
    # but nothing that holds it
    inside = ("repair", tiny_dir, rows, "--adapter", mine, "-o", tmp_path, "--overwrite")
    assert run(*inside).code == 2 and log(mine).entries
    assert run("repair", tiny_dir, rows, "--adapter", "./nowhere", "-o", tmp_path / "x").code == 2


def test_a_patch_to_build_upon_keeps_its_settings_unless_asked_otherwise(
    run: Run, tiny_dir: Path, patch: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows("more.jsonl", ("xyz", "!"))
    settings = ("--lr", "0.05", "--steps", "200", "--adapter", patch)
    kept = run("repair", tiny_dir, rows, "-o", tmp_path / "kept", *settings, "--json").json
    asked = run(
        "repair", tiny_dir, rows, "-o", tmp_path / "asked", *settings, "--neurons", "5", "--layers", "all", "--json"
    )
    assert kept["config"]["scope"]["num_neurons"] == 32 and asked.json["config"]["scope"]["num_neurons"] == 5
    assert len(kept["layers"]) == 1 and len(asked.json["layers"]) > 1


def test_related_rows_are_looked_at_and_told(
    run: Run, tiny_dir: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a b", "completion": "cd", "focus": "b", "problem": "letters"},
        {"prompt": "xyz", "completion": "!", "problem": "marks"},
    ]
    failures = tmp_path / "failures.jsonl"
    failures.write_text("\n".join(map(json.dumps, rows)))
    related = tmp_path / "related.jsonl"
    related.write_text(json.dumps({"prompt": "so a b", "completion": "zzzz", "problem": "letters"}))
    target = tmp_path / "patch"
    result = run("repair", tiny_dir, failures, "-o", target, "--related", related, *SOLVABLE)
    # one that is not fixed is no failure
    assert result.code == 0, result.err
    assert "letters" in result.err and "related rows fixed, broken" in result.err
    report = RepairReport.load(target / "repair_report.json")
    assert [problem.name for problem in report.problems] == ["letters", "marks"]
    assert [problem.related for problem in report.problems] == [1, 0]
    card = (target / "README.md").read_text()
    assert "--related related.jsonl" in card and "| `letters` |" in card

    inside = tmp_path / "inside"
    shutil.copytree(target, inside)
    shutil.copy(related, inside)
    result = run("repair", tiny_dir, failures, "-o", inside, "--related", inside / "related.jsonl", "--overwrite")
    assert result.code == 2
    assert "is or holds the input" in result.err and "related.jsonl" in names(inside)


def test_repair_json_is_one_document(run: Run, tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json", *SOLVABLE)
    assert result.code == 0
    assert result.err == ""
    assert result.json["summary"]["success"] is True
    assert result.json["patch"] == str(tmp_path / "patch")
    assert result.json["bytes"] > 0
    assert len(result.json["failures"]) == 3
    saved = json.loads((tmp_path / "patch" / "repair_report.json").read_text())
    told = result.json
    assert told["summary"].pop("seconds") > 0  # kept in a file of its own
    assert {key: told[key] for key in saved} == saved


def test_json_from_a_shell_leaves_stdout_to_the_document(tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peft_star", "repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json"]
    result = subprocess.run([*map(str, command), "--steps", "1"], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout)["summary"]["success"] is False


def test_repair_that_does_not_solve_all_is_1_and_still_saved(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path
) -> None:
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--steps", "1", "--lr", "0.0001")
    assert result.code == 1
    assert "not solved" in result.err
    assert not RepairReport.load(tmp_path / "patch" / "repair_report.json").success


def test_nothing_to_repair_is_0(run: Run, tiny_dir: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = write_rows("right.jsonl", ("abc", "Q"))
    result = run("repair", tiny_dir, rows, "-o", tmp_path / "patch")
    assert result.code == 0
    assert "No failing token" in result.err
    assert run("inspect", tmp_path / "patch").code == 0


def test_repair_passes_its_options_on(run: Run, tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    options = "--layers 1,3 --neurons 0.25 --neuron-pattern layer-wise --mode single --steps 3 --lr 0.02 --norm max"
    more = "--margin 0.05 --generalization 2 --generate --serve bf16 --dtype float32 --device-map cpu --json"
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", *options.split(), *more.split())
    arguments = result.json["arguments"]
    expected = {
        "mode": "single",
        "max_steps": 3,
        "learning_rate": 0.02,
        "norm": "max",
        "margin": 0.05,
        "generalization": 2.0,
        "verify_generation": True,
        "serve": ["bf16"],
    }
    assert {key: arguments[key] for key in expected} == expected
    layers = {layer["name"]: len(layer["neurons"]) for layer in result.json["layers"]}
    assert set(layers) <= {"model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"}
    assert all(list(row["served_after"]) == ["bf16"] for row in result.json["rows"])


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        ("0.25", 1),
        ("3", 3),
        ("all", 4),
        ("2,", 1),
        ("1.0", 4),
        ("occlusion", 1),
        ("occlusion:0.5", 2),
        ("occlusion:3", 3),
    ],
)
def test_layers(run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, layers: str, count: int) -> None:
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--layers", layers, "--json", *SOLVABLE)
    assert len(result.json["layers"]) == count


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("occlusion", {"layer_selection": "occlusion"}),
        ("occlusion:0.5", {"layer_selection": "occlusion", "num_layers": 0.5}),
        ("occlusion:2", {"layer_selection": "occlusion", "num_layers": 2}),
        ("2", {"num_layers": 2}),
        ("2,", {"layer_selection": [2]}),
    ],
)
def test_layers_say_how_they_are_chosen(text: str, selection: dict[str, Any]) -> None:
    assert cli_repair.parse_layers(text) == selection


def test_algorithm_1_by_its_name(run: Run, tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    options = "--layers occlusion:2 --algorithm prior-guided --json".split()
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", *options, *SOLVABLE)
    assert result.json["arguments"]["algorithm"] == "prior-guided"
    config = result.json["config"]
    assert (config["layer_selection"], config["num_layers"]) == ("occlusion", 2)
    # the card says how to repeat it
    card = (tmp_path / "patch" / "README.md").read_text()
    assert "--layers occlusion:2" in card and "--algorithm prior-guided" in card


def test_the_card_says_how_to_repeat_it(run: Run, tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    options = "--neurons 32 --steps 1 --background 64 --ridge 0.001 --serve bf16 --generate --dtype float32"
    assert run("repair", tiny_dir, failures, "-o", tmp_path / "patch", *options.split(), "--json").code == 0
    card = (tmp_path / "patch" / "README.md").read_text()
    assert f"peft-star repair {tiny_dir.name} failures.jsonl -o PATCH {options}\n" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--neurons", "0"), "--neurons is '0'; give a whole number"),
        (("--neurons", "1.5"), "--neurons is '1.5'"),
        (("--neurons", "many"), "--neurons is 'many'"),
        (("--neurons", "100000"), "100000"),
        (("--layers", "-1"), "--layers is '-1'; give a whole number"),
        (("--layers", "1,x"), "indices are whole numbers"),
        (("--layers", "occlusion:0"), "--layers is 'occlusion:0'; give a whole number"),
        (("--layers", "last:2"), "--layers is 'last:2'; give a whole number"),
        (("--layers", "occlusion:99"), "99"),
        (("--algorithm", "sgd"), "choose one of 'protected', 'prior-guided'"),
        (("--generalization", "-1"), "`generalization` is -1.0"),
        (("--layers", "99"), "99"),
        (("--layers", "1,99"), "99"),
        (("--mode", "both"), "choose one of 'multiple', 'single'"),
        (("--norm", "l7"), "choose one of 'std'"),
        (("--steps", "0"), "whole number of at least 1"),
        (("--lr", "-1"), "`learning_rate` is -1.0"),
        (("--lr", "nan"), "finite"),
        (("--margin", "2"), "`margin` is 2.0"),
        (("--neuron-pattern", "random"), "layer-wise"),
        (("--background", "-1"), "`background` is -1"),
        (("--ridge", "-1"), "`ridge` is -1.0"),
        (("--damping", "2"), "`damping` is 2.0"),
        (("--growth", "0.5"), "`growth` is 0.5"),
        (("--occlusion", "both"), "choose one of 'first-order', 'exact'"),
        (("--max-rounds", "0"), "`max_rounds` is 0; give a whole number"),
        (("--max-batch-tokens", "0"), "`max_batch_tokens` is 0; give a whole number"),
        (("--max-batch-tokens", "many"), "Invalid value for '--max-batch-tokens'"),
        (("--dtype", "int3"), "Unknown dtype 'int3'"),
        (("--push-to-hub", "not a repo"), "no name for a repository"),
        (("--retain", "nowhere.jsonl"), "nowhere.jsonl is not a file"),
        (("--related", "nowhere.jsonl"), "nowhere.jsonl is not a file"),
    ],
)
def test_bad_options_are_2_and_leave_nothing(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    before = names(tmp_path)
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", *options)
    assert result.code == 2, result.err
    assert message in result.err.replace("Loading " + str(tiny_dir), "")
    assert "Traceback" not in result.err
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a file"),
        ("", "holds no rows"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a", "completion": "b"}\nnot json\n', "line 2: not JSON"),
        ('["a", "b"]', "line 1"),
        ('{"prompt": "a"}', "'completion' is missing"),
        ('{"input": "a", "output": "b"}', "is missing"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
        ('{"prompt": "", "completion": "b"}', "'prompt' is empty"),
        ('{"prompt": "a", "completion": 5}', "must be text"),
        ('{"prompt": "a", "completion": "b", "label": 1}', "unknown column 'label'"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "both be text or both be lists"),
        ('{"prompt": "a", "completion": "b", "focus": "c"}', "line 1: 'focus' 'c' does not occur in the prompt"),
        ('{"prompt": "a", "completion": "b", "problem": 1}', "line 1: 'problem' is int; it must be text"),
        ('{"prompt": "a", "prompt": "c", "completion": "b"}', "line 1: not JSON (key 'prompt' is there twice)"),
        (
            '\n{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "c"}',
            "rows.jsonl, line 3: 'c' is wanted behind the same prompt as in",
        ),
    ],
)
def test_bad_rows_are_2_before_any_model_is_loaded(run: Run, tmp_path: Path, text: str | None, message: str) -> None:
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text)
    result = run("repair", "./no-model-is-needed", rows, "-o", tmp_path / "patch")
    assert result.code == 2
    assert is_one_sentence(result), result.err
    assert message in result.err
    assert not (tmp_path / "patch").exists()


def test_a_retained_row_against_a_failure_is_2_before_any_model_is_loaded(
    run: Run, failures: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    retain = write_rows("retain.jsonl", ("abc", "d"), ("xyz", "?"))
    result = run("repair", "./no-model-is-needed", failures, "-o", tmp_path / "patch", "--retain", retain)
    assert result.code == 2 and is_one_sentence(result)
    assert f"{retain}, line 2: '?' has to stay behind the same prompt as in {failures}, line 2, where" in result.err


def test_equal_repairs_write_equal_files_but_for_their_times(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path
) -> None:
    for target in ("one", "two"):
        result = run("repair", tiny_dir, failures, "-o", tmp_path / target / "patch", *SOLVABLE)
        assert result.code == 0 and "seconds" in result.err
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n / "patch").iterdir()} for n in ("one", "two"))
    assert one.pop("repair_report.times.json") != two.pop("repair_report.times.json")
    # an entry of the ledger is of its time, and its id tells it from all others
    for files in (one, two):
        ledger = json.loads(files["repair_ledger.json"])
        (entry,) = ledger["entries"]
        made = [hashlib.sha256(files["repair_ledger.json"]).hexdigest(), ledger["tensors_sha256"], entry["id"]]
        made += [entry["time"], json.dumps(entry["summary"]["seconds"])]
        del files["repair_ledger.safetensors"]
        for name, content in files.items():
            for text in made:
                content = content.replace(text.encode(), b"")
            files[name] = content
    assert one == two and "repair_report.json" in one
    shown = [run("inspect", tmp_path / target / "patch").err for target in ("one", "two")]
    assert all("seconds" in text for text in shown)
    (tmp_path / "one" / "patch" / "repair_report.times.json").unlink()
    assert "seconds" not in run("inspect", tmp_path / "one" / "patch").err


def test_rows_of_a_table_and_their_ids_go_through_to_the_report(run: Run, tiny_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "failures.csv"
    rows.write_text('id,prompt,completion,focus\nBUG-12,"a b",cd,a\n,xyz,!,\n')
    result = run("repair", tiny_dir, rows, "-o", tmp_path / "patch", *SOLVABLE)
    assert result.code == 0, result.err
    report = RepairReport.load(tmp_path / "patch" / "repair_report.json")
    assert [(row.id, row.line, row.row) for row in report.rows] == [("BUG-12", 2, 0), (None, 3, 1)]
    assert "2 (BUG-12)" in result.err and "| 2 (BUG-12) |" in (tmp_path / "patch" / "README.md").read_text()
    assert "2 (BUG-12)" in run("inspect", tmp_path / "patch").err


def test_rows_that_do_not_fit_the_model(
    run: Run, tiny_dir: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    long = write_rows("long.jsonl", ("a" * 300, "b"))
    result = run("repair", tiny_dir, long, "-o", tmp_path / "patch")
    assert result.code == 2
    assert "exceed the model's context of 256" in result.err
    chat = tmp_path / "chat.jsonl"
    message = {"role": "user", "content": "a"}
    chat.write_text(json.dumps({"prompt": [message], "completion": [{**message, "role": "assistant"}]}))
    result = run("repair", tiny_dir, chat, "-o", tmp_path / "patch")
    assert result.code == 2
    assert "chat template" in result.err
    assert not (tmp_path / "patch").exists()


def test_models_that_cannot_be_loaded(
    run: Run, failures: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "empty").mkdir()
    for model, message in (
        ("./nowhere", "There is no model at ./nowhere"),
        ("nobody/nothing", "the Hub could not be reached"),
        (tmp_path / "empty", "holds no model"),
        (patch, "holds an adapter, not a model"),
        (failures, "is no .gguf file"),
    ):
        result = run("repair", model, failures, "-o", tmp_path / "patch")
        assert result.code == 2
        assert message in result.err
        assert "Traceback" not in result.err
        assert not (tmp_path / "patch").exists()


# output directories


def test_an_output_that_holds_something_is_refused(
    run: Run, tiny_dir: Path, failures: Path, patch: Path, tmp_path: Path
) -> None:
    target = tmp_path / "patch"
    shutil.copytree(patch, target)
    (target / "repair_report.json").unlink()
    before = names(target)
    result = run("repair", tiny_dir, failures, "-o", target)
    assert result.code == 2
    assert is_one_sentence(result)
    assert "is not empty; give --overwrite" in result.err
    assert names(target) == before
    assert run("repair", tiny_dir, failures, "-o", target, "--overwrite", *SOLVABLE).code == 0
    assert "repair_report.json" in names(target)
    assert names(tmp_path) == ["failures.jsonl", "patch"]


def test_overwrite_replaces_nothing_but_earlier_output(
    run: Run, tiny_dir: Path, failures: Path, patch: Path, tmp_path: Path
) -> None:
    """A mistyped `-o . --overwrite` must not cost a working directory."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    result = run("repair", tiny_dir, failures, "-o", home, "--overwrite")
    assert (result.code, names(home)) == (2, ["thesis.txt"])
    assert "so --overwrite does not replace it" in result.err

    clone = tmp_path / "clone"
    shutil.copytree(patch, clone)
    (clone / ".git").mkdir()
    assert run("repair", tiny_dir, failures, "-o", clone, "--overwrite").code == 2
    assert ".git" in names(clone)

    inside = tmp_path / "inside"
    shutil.copytree(patch, inside)
    shutil.copy(failures, inside)
    result = run("repair", tiny_dir, inside / "failures.jsonl", "-o", inside, "--overwrite")
    assert result.code == 2
    assert "is or holds the input" in result.err
    assert "failures.jsonl" in names(inside)


def test_outputs_that_cannot_be(run: Run, tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    for target in (failures, failures / "patch"):
        result = run("repair", tiny_dir, failures, "-o", target)
        assert result.code == 2
        assert is_one_sentence(result), result.err


def kept_in(directory: Path, result: Any) -> Path:
    """The one directory in which a patch was kept; the message names it, and the patch is whole."""
    (kept,) = (path for path in directory.iterdir() if ".kept-" in path.name)
    assert str(kept) in result.err and is_one_sentence(result) and result.code == 2
    assert kept.name.startswith("patch.kept-")
    assert (
        len(Patch.read(kept).neurons) > 0 and json.loads((kept / "adapter_config.json").read_text())["inference_mode"]
    )
    return kept


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), ValueError("Invalid truth value"), RuntimeError("x"), KeyError("y")]
)
def test_a_failing_save_leaves_what_was_there_and_keeps_the_patch(
    run: Run,
    tiny_dir: Path,
    failures: Path,
    patch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
    error: Exception,
) -> None:
    target = tmp_path / "patch"
    if existing:
        shutil.copytree(patch, target)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def save(self: RepairReport, path: Path) -> None:
        path.write_text("half of")
        raise error

    monkeypatch.setattr(RepairReport, "save", save)
    result = run("repair", tiny_dir, failures, "-o", target, "--overwrite", "--json", *SOLVABLE)
    assert str(error) in result.err
    kept = kept_in(tmp_path, result)
    assert load_patch(AutoModelForCausalLM.from_pretrained(tiny_dir), kept).peft_config["default"].base_fingerprint
    shutil.rmtree(kept)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    assert target.exists() is existing


def test_a_save_that_peft_refuses_keeps_patch_and_report(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(PeftModel, "save_pretrained", refuse)
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json", *SOLVABLE)
    kept = kept_in(tmp_path, result)
    assert names(kept) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "repair_ledger.json",
        "repair_ledger.safetensors",
        "repair_report.json",
        "repair_report.times.json",
    ]
    assert len(log(kept)) == 1
    assert RepairReport.load(kept / "repair_report.json").success


def test_a_patch_that_cannot_be_kept_beside_its_output_goes_to_temporary_files(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tempfile.mkdtemp

    def mkdtemp(prefix: str, dir: Path) -> str:
        if dir == tmp_path:
            raise PermissionError("no")
        return real(prefix=prefix, dir=dir)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(cli_patches, "write_card", lambda *args, **kwargs: 1 / 0)
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json", *SOLVABLE)
    kept_in(tmp_path / "temporary", result)
    assert names(tmp_path) == ["failures.jsonl", "temporary"]


def test_ctrl_c_while_saving_keeps_the_patch(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_patches, "write_card", interrupt)
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json", *SOLVABLE)
    assert result.code == 130 and "the patch is kept in" in result.err
    assert len(names(tmp_path)) == 2 and "patch" not in names(tmp_path)


def test_an_empty_word_for_offline_mode_does_not_stop_a_save(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "moved"
    shutil.copytree(tiny_dir, model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    # as a model from a .gguf file or the Hub, whose name is no directory when PEFT looks for its configuration
    real = cli_repair.load_base

    def renamed(*args: Any, **kwargs: Any) -> Any:
        base, tokenizer = real(*args, **kwargs)
        base.name_or_path = base.config._name_or_path = "somebody/model"
        return base, tokenizer

    monkeypatch.setattr(cli_repair, "load_base", renamed)
    assert run("repair", model, failures, "-o", tmp_path / "patch", *SOLVABLE).code == 0


def test_of_two_repairs_into_one_output_the_later_is_kept_elsewhere(
    run: Run, tiny_dir: Path, failures: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "patch", cli_repair.run_repair

    def meanwhile(*args: Any, **kwargs: Any) -> RepairReport:
        shutil.copytree(patch, target)
        return real(*args, **kwargs)

    monkeypatch.setattr(cli_repair, "run_repair", meanwhile)
    result = run("repair", tiny_dir, failures, "-o", target, "--json", *SOLVABLE)
    assert "is not empty any more" in result.err
    assert "README.md" in names(kept_in(tmp_path, result))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in patch.iterdir()
    }
    shutil.rmtree(target)
    assert run("repair", tiny_dir, failures, "-o", target, "--overwrite", *SOLVABLE).code == 0


def test_an_empty_directory_and_a_link_are_fine(run: Run, tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run("repair", tiny_dir, failures, "-o", tmp_path / "link", *SOLVABLE).code == 0
    assert (tmp_path / "link").is_symlink()
    assert "adapter_config.json" in names(tmp_path / "real")


# interruption


def test_ctrl_c_saves_what_was_finished(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(RepairCallback):
        def on_step_end(self, args: Any, state: Any) -> None:
            if state.step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(cli_repair, "progress", lambda as_json: nullcontext(Impatient()))
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json")
    assert result.code == 130
    assert result.json["interrupted"] is True
    assert "Interrupted; what was finished is in" in result.err
    assert RepairReport.load(tmp_path / "patch" / "repair_report.json").interrupted
    assert run("inspect", tmp_path / "patch").code == 0


def test_ctrl_c_while_loading_writes_nothing(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_app, "load_model", load)
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch")
    assert result.code == 130
    assert "nothing was written" in result.err
    assert names(tmp_path) == ["failures.jsonl"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_repair_goes_on_from_what_is_kept_beside_its_output(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    class Killed(BaseException):
        pass

    class KillAfterStep(RepairCallback):
        def on_phase_begin(self, args: Any, state: Any) -> None:
            if (tmp_path / ".patch.unfinished").is_file():
                raise Killed

    monkeypatch.setattr(cli_repair.Unfinished.__init__, "__defaults__", (False, 0.0))
    command = ("repair", tiny_dir, failures, "-o", tmp_path / "patch", *SOLVABLE, "--mode", "single")
    with monkeypatch.context() as context:
        context.setattr(cli_repair, "progress", lambda as_json: nullcontext(KillAfterStep()))
        with pytest.raises(Killed):
            cli_main([str(word) for word in command])
    assert names(tmp_path) == [".patch.unfinished", "failures.jsonl"]
    result = run(*command, *(["--resume"] if resume else []))
    assert result.code == 0
    assert ("Went on where an earlier run stopped." in result.err) is resume
    assert names(tmp_path) == ["failures.jsonl", "patch"]
    again = run(*command, "--resume", "--overwrite", "--json")
    assert again.code == 0 and again.json["resumed"] is False


def test_memory_that_holds_no_row_is_one_sentence(
    run: Run, tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("peft_star.method.repair.look_before", full)
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json")
    assert result.code == 2 and is_one_sentence(result) and "Memory does not hold a single row" in result.err
