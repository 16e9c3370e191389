"""The command line: what each command writes, its exit codes, and one sentence for every bad input."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_star
from peft_star import RepairCallback, RepairReport, files
from peft_star.cli import app as cli
from peft_star.cli.app import main
from support.byte_llama import build_model, build_tokenizer

SOLVABLE = ("--lr", "0.05", "--neurons", "32", "--steps", "200")  # random weights need larger steps than real ones


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def failures(write_rows: Callable[..., Path]) -> Path:
    return write_rows("failures.jsonl", ("a b", "cd"), ("xyz", "!"))


@pytest.fixture(scope="session")
def patch(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch that the command made for the tiny model. Not to be written to."""
    directory = tmp_path_factory.mktemp("patches")
    rows = directory / "failures.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "cd"}\n')
    with pytest.raises(SystemExit) as exit_:
        main(["repair", str(tiny_dir), str(rows), "-o", str(directory / "patch"), *SOLVABLE])
    assert exit_.value.code in (0, None)
    return directory / "patch"


def is_one_sentence(result: Result) -> bool:
    return (
        result.out == ""
        and result.err.startswith("Error: ")
        and result.err.count("\n") == 1
        and "Traceback" not in result.err
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# the command as a whole


def test_help_and_version_from_a_shell() -> None:
    result = subprocess.run([sys.executable, "-m", "peft_star", "--version"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout == f"peft-star {peft_star.__version__}\n"


def test_help_names_every_command(run: Callable[..., Result]) -> None:
    result = run("--help")
    assert result.code == 0
    for command in ("repair", "inspect", "merge", "push", "demo"):
        assert command in result.out
        assert run(command, "--help").code == 0


@pytest.mark.parametrize("args", [("nonsense",), ("repair",), ("repair", "m", "f.jsonl"), ("merge", "m", "-o", "x")])
def test_wrong_usage_is_2(run: Callable[..., Result], args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.code == 2
    assert result.out == ""


# repair


def test_defaults_are_those_of_the_api() -> None:
    defaults = {name: item.default for name, item in inspect.signature(cli.repair).parameters.items()}
    config, arguments = peft_star.StarConfig(), peft_star.RepairArguments()
    assert cli._parse_amount("--neurons", defaults["neurons"]) == config.num_neurons
    assert cli._parse_layers(defaults["layers"]) == {"num_layers": config.num_layers}
    assert config.layer_selection == "last"
    assert defaults["neuron_pattern"] == config.neuron_pattern
    assert (defaults["steps"], defaults["lr"]) == (arguments.max_steps, arguments.learning_rate)
    assert (defaults["algorithm"], defaults["generalization"]) == (arguments.algorithm, arguments.generalization)


def test_repair_writes_a_patch_that_peft_loads(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, write_rows: Callable[..., Path], tmp_path: Path
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
        "repair_report.json",
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


def test_repair_json_is_one_document(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path
) -> None:
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json", *SOLVABLE)
    assert result.code == 0
    assert result.err == ""
    assert result.json["summary"]["success"] is True
    assert result.json["patch"] == str(tmp_path / "patch")
    assert result.json["bytes"] > 0
    assert len(result.json["failures"]) == 3
    saved = json.loads((tmp_path / "patch" / "repair_report.json").read_text())
    assert {key: result.json[key] for key in saved} == saved


def test_json_from_a_shell_leaves_stdout_to_the_document(tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peft_star", "repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json"]
    result = subprocess.run([*map(str, command), "--steps", "1"], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout)["summary"]["success"] is False


def test_repair_that_does_not_solve_all_is_1_and_still_saved(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path
) -> None:
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--steps", "1", "--lr", "0.0001")
    assert result.code == 1
    assert "not solved" in result.err
    assert not RepairReport.load(tmp_path / "patch" / "repair_report.json").success


def test_nothing_to_repair_is_0(
    run: Callable[..., Result], tiny_dir: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows("right.jsonl", ("abc", "Q"))
    result = run("repair", tiny_dir, rows, "-o", tmp_path / "patch")
    assert result.code == 0
    assert "No failing token" in result.err
    assert run("inspect", tmp_path / "patch").code == 0


def test_repair_passes_its_options_on(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path
) -> None:
    options = "--layers 1,3 --neurons 0.25 --neuron-pattern layer-wise --mode single --steps 3 --lr 0.02 --norm max"
    more = "--margin 0.05 --generalization 2 --no-generate --dtype float32 --device-map cpu --json"
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", *options.split(), *more.split())
    arguments = result.json["arguments"]
    expected = {
        "mode": "single",
        "max_steps": 3,
        "learning_rate": 0.02,
        "norm": "max",
        "margin": 0.05,
        "generalization": 2.0,
        "verify_generation": False,
    }
    assert {key: arguments[key] for key in expected} == expected
    layers = {layer["name"]: len(layer["neurons"]) for layer in result.json["layers"]}
    assert set(layers) <= {"model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"}
    assert all(row["generated_after"] is None for row in result.json["rows"])


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
def test_layers(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path, layers: str, count: int
) -> None:
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
    assert cli._parse_layers(text) == selection


def test_algorithm_1_by_its_name(run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    options = "--layers occlusion:2 --algorithm prior-guided --json".split()
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", *options, *SOLVABLE)
    assert result.json["arguments"]["algorithm"] == "prior-guided"
    config = result.json["config"]
    assert (config["layer_selection"], config["num_layers"]) == ("occlusion", 2)
    # the card says how to repeat it
    card = (tmp_path / "patch" / "README.md").read_text()
    assert "--layers occlusion:2" in card and "--algorithm prior-guided" in card


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
        (("--dtype", "int3"), "Unknown dtype 'int3'"),
        (("--push-to-hub", "not a repo"), "no name for a repository"),
        (("--retain", "nowhere.jsonl"), "nowhere.jsonl is not a file"),
    ],
)
def test_bad_options_are_2_and_leave_nothing(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path, options: tuple[str, str], message: str
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
    ],
)
def test_bad_rows_are_2_before_any_model_is_loaded(
    run: Callable[..., Result], tmp_path: Path, text: str | None, message: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text)
    result = run("repair", "./no-model-is-needed", rows, "-o", tmp_path / "patch")
    assert result.code == 2
    assert is_one_sentence(result), result.err
    assert message in result.err
    assert not (tmp_path / "patch").exists()


def test_rows_that_do_not_fit_the_model(
    run: Callable[..., Result], tiny_dir: Path, write_rows: Callable[..., Path], tmp_path: Path
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
    run: Callable[..., Result], failures: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    run: Callable[..., Result], tiny_dir: Path, failures: Path, patch: Path, tmp_path: Path
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
    run: Callable[..., Result], tiny_dir: Path, failures: Path, patch: Path, tmp_path: Path
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


def test_outputs_that_cannot_be(run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path) -> None:
    for target in (failures, failures / "patch"):
        result = run("repair", tiny_dir, failures, "-o", target)
        assert result.code == 2
        assert is_one_sentence(result), result.err


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_save_leaves_what_was_there(
    run: Callable[..., Result],
    tiny_dir: Path,
    failures: Path,
    patch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
) -> None:
    target = tmp_path / "patch"
    if existing:
        shutil.copytree(patch, target)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def save(self: RepairReport, path: Path) -> None:
        path.write_text("half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(RepairReport, "save", save)
    result = run("repair", tiny_dir, failures, "-o", target, "--overwrite", *SOLVABLE)
    assert result.code == 2
    assert "No space left on device" in result.err
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    assert target.exists() is existing


def test_an_empty_directory_and_a_link_are_fine(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run("repair", tiny_dir, failures, "-o", tmp_path / "link", *SOLVABLE).code == 0
    assert (tmp_path / "link").is_symlink()
    assert "adapter_config.json" in names(tmp_path / "real")


# interruption


def test_ctrl_c_saves_what_was_finished(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(RepairCallback):
        def on_step_end(self, args: Any, state: Any) -> None:
            if state.step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(cli, "progress", lambda as_json: nullcontext(Impatient()))
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch", "--json")
    assert result.code == 130
    assert result.json["interrupted"] is True
    assert "Interrupted; what was finished is in" in result.err
    assert RepairReport.load(tmp_path / "patch" / "repair_report.json").interrupted
    assert run("inspect", tmp_path / "patch").code == 0


def test_ctrl_c_while_loading_writes_nothing(
    run: Callable[..., Result], tiny_dir: Path, failures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", load)
    result = run("repair", tiny_dir, failures, "-o", tmp_path / "patch")
    assert result.code == 130
    assert "nothing was written" in result.err
    assert names(tmp_path) == ["failures.jsonl"]


# inspect


def test_inspect_shows_layers_and_report(run: Callable[..., Result], patch: Path, tiny_dir: Path) -> None:
    result = run("inspect", patch)
    assert (result.code, result.out) == (0, "")
    assert "down_proj" in result.err
    assert "2 of 2" in result.err
    result = run("inspect", patch, "--json")
    assert result.err == ""
    assert result.json["base_model"] == str(tiny_dir)
    assert result.json["neurons"] == 32
    assert result.json["parameters"] == 32 * 32
    assert result.json["report"]["summary"]["success"] is True
    assert result.json["config"]["peft_type"] == "STAR"
    module = result.json["modules"][0]
    assert set(module) == {"name", "neurons", "outputs", "norm", "max"}


def test_inspect_needs_no_report(run: Callable[..., Result], patch: Path, tmp_path: Path) -> None:
    copy = tmp_path / "patch"
    shutil.copytree(patch, copy)
    (copy / "repair_report.json").unlink()
    assert "No repair report" in run("inspect", copy).err
    assert run("inspect", copy, "--json").json["report"] is None


@pytest.mark.parametrize("broken", ["adapter_config.json", "adapter_model.safetensors", "repair_report.json"])
def test_inspect_of_broken_files_is_2(run: Callable[..., Result], patch: Path, tmp_path: Path, broken: str) -> None:
    copy = tmp_path / "patch"
    shutil.copytree(patch, copy)
    (copy / broken).write_text('{"peft_type')
    result = run("inspect", copy, "--json")
    assert result.code == 2
    assert is_one_sentence(result), result.err


def test_inspect_of_what_is_no_patch_is_2(run: Callable[..., Result], tiny_dir: Path, tmp_path: Path) -> None:
    for patch in (tiny_dir, tmp_path, tiny_dir / "config.json", "./nowhere"):
        result = run("inspect", patch)
        assert result.code == 2
        assert is_one_sentence(result), result.err


# merge


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_merge_writes_a_plain_model(run: Callable[..., Result], tiny_dir: Path, patch: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    result = run("merge", tiny_dir, patch, "-o", target)
    assert (result.code, result.out) == (0, ""), result.err
    merged = AutoModelForCausalLM.from_pretrained(target)
    patched = PeftModel.from_pretrained(build_model(), patch)
    torch.testing.assert_close(logits(merged), logits(patched))
    assert not torch.allclose(logits(merged), logits(build_model()))
    assert AutoTokenizer.from_pretrained(target)("abc")["input_ids"] == build_tokenizer()("abc")["input_ids"]
    assert not any("star" in name for name in merged.state_dict())
    assert "adapter_config.json" not in names(target)


def test_merged_models_load_without_this_package(tiny_dir: Path, patch: Path, tmp_path: Path, run) -> None:
    assert run("merge", tiny_dir, patch, "-o", tmp_path / "merged").code == 0
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "output = model.generate(**tokenizer('a b', return_tensors='pt'), max_new_tokens=2, do_sample=False)\n"
        "assert 'peft_star' not in sys.modules\n"
        "print(tokenizer.decode(output[0]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "merged")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "a bcd\n", result.stderr


def test_merge_of_several_patches_adds_them_up(
    run: Callable[..., Result], tiny_dir: Path, patch: Path, failures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert run("repair", tiny_dir, failures, "-o", other, "--layers", "all", *SOLVABLE).code == 0
    result = run("merge", tiny_dir, patch, other, "-o", tmp_path / "merged", "--json")
    assert result.code == 0
    assert result.err == ""
    assert result.json["patches"] == [str(patch), str(other)]
    both = PeftModel.from_pretrained(build_model(), patch).merge_and_unload()
    both = PeftModel.from_pretrained(both, other)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(both))


def test_merge_refuses_what_does_not_fit(
    run: Callable[..., Result], tiny_dir: Path, patch: Path, tmp_path: Path
) -> None:
    narrow = tmp_path / "narrow"
    build_model(hidden_size=16).save_pretrained(narrow)
    build_tokenizer().save_pretrained(narrow)
    lora = tmp_path / "lora"
    get_peft_model(build_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])).save_pretrained(
        lora
    )
    for model, patches, message in (
        (narrow, [patch], "does not fit this model"),
        (tiny_dir, [lora], "adapter of type LORA"),
        (tiny_dir, [patch, lora], "adapter of type LORA"),
        (tiny_dir, [tiny_dir], "holds a model"),
        (tiny_dir, ["./nowhere"], "There is no patch at"),
        ("./nowhere", [patch], "There is no model at"),
    ):
        result = run("merge", model, *patches, "-o", tmp_path / "merged")
        assert result.code == 2
        assert message in result.err
        assert "Traceback" not in result.err
        assert names(tmp_path) == ["lora", "narrow"]


def test_merge_does_not_replace_its_own_base(
    run: Callable[..., Result], tiny_dir: Path, patch: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    result = run("merge", base, patch, "-o", base, "--overwrite")
    assert result.code == 2
    assert "is or holds the input" in result.err


def test_merge_works_for_a_gguf_base(
    run: Callable[..., Result], smollm2_gguf: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    model = get_peft_model(base, peft_star.StarConfig(task_type="CAUSAL_LM", num_neurons=4, layers_to_transform=[3]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "star_delta" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "patch")
    expected = logits(model.eval())
    result = run("merge", smollm2_gguf, tmp_path / "patch", "-o", tmp_path / "merged")
    assert result.code == 0, result.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(smollm2_dir)), expected, atol=0.1)


# pieces


def test_sizes_are_readable() -> None:
    from peft_star.cli.console import format_size

    assert [format_size(size) for size in (0, 999, 1500, 2_219_440, 5 * 10**9)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.2 MB",
        "5.0 GB",
    ]


def test_a_new_directory_is_gone_when_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.new_directory(tmp_path / "x") as directory:
        (directory / "file").touch()
        raise RuntimeError
    assert names(tmp_path) == []


def test_merge_refuses_a_patch_of_other_weights_unless_told(
    run: Callable[..., Result], patch: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    build_model(seed=1).save_pretrained(tmp_path / "other")
    build_tokenizer().save_pretrained(tmp_path / "other")
    refused = run("merge", tmp_path / "other", patch, "-o", tmp_path / "merged")
    assert refused.code == 2 and "solved for other weights" in refused.err and "--allow-other-base" in refused.err
    assert not (tmp_path / "merged").exists()
    with pytest.warns(UserWarning, match="other weights"):
        told = run("merge", tmp_path / "other", patch, "-o", tmp_path / "merged", "--allow-other-base")
    assert told.code == 0
    assert run("merge", tiny_dir, patch, patch, "-o", tmp_path / "right").code == 0
