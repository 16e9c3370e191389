"""`peft-star evaluate`: what it prints and writes, and one sentence for every bad input."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main
from peft import LoraConfig, PeftModel, get_peft_model

from peft_star import StarConfig
from peft_star.cli import evaluate as cli_evaluate
from peft_star.cli import main
from peft_star.cli.app import app
from peft_star.cli.spread import SpreadCommand
from peft_star.evaluation import OwnTextsProbe, TextProbe, compare, evaluate
from peft_star.loading import load_patch
from support.byte_llama import build_model, build_tokenizer
from support.command_line import SOLVABLE, Run

ROWS = ('{"prompt": "a b", "completion": "cd"}', '{"prompt": "xyz", "completion": "say(x)"}')


@pytest.fixture(scope="module")
def patches(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A patch for each of the rows. Not to be written to."""
    directory = tmp_path_factory.mktemp("patches")
    result = []
    for number, row in enumerate(ROWS):
        rows = directory / f"{number}.jsonl"
        rows.write_text(row + "\n")
        with pytest.raises(SystemExit) as exit_:
            main(["repair", str(tiny_dir), str(rows), "-o", str(directory / f"patch{number}"), *SOLVABLE])
        assert exit_.value.code in (0, None)
        result.append(directory / f"patch{number}")
    return result


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(ROWS) + "\n")
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.md"
    path.write_text("Text that has nothing to do with the repair. " * 9)
    return path


@pytest.fixture
def run(run: Run) -> Run:
    """Run this command."""
    return functools.partial(run, "evaluate")


def without_seconds(value: Any) -> Any:
    """What is the same in another run."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if not key.startswith("seconds")}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def test_base_and_patch(run, tiny_dir, data, text, patches):
    code, out, err = run(tiny_dir, data, "--adapter", patches[0], "--text", text, "--text-tokens", 50, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    rows = [json.loads(row) for row in ROWS]
    base, tokenizer = build_model(), build_tokenizer()
    before = evaluate(base, tokenizer, rows, progress=False)
    probe = TextProbe(base, tokenizer, text.read_text(), max_tokens=50)
    patched = load_patch(base, patches[0])
    after = evaluate(patched, tokenizer, rows, progress=False)
    assert without_seconds(result["base"]) == without_seconds(before.to_dict())
    assert without_seconds(result["patched"]) == without_seconds(after.to_dict())
    assert result["comparison"] == compare(before, after).to_dict()
    assert result["comparison"]["solved"] >= 2 and result["comparison"]["generations_fixed"] == [0]
    assert result["texts"] == [{"text": str(text), **probe(patched).to_dict()}]
    assert (result["texts"][0]["tokens"], result["texts"][0]["kl"] > 0) == (50, True)
    (adapter,) = result["adapters"]
    assert (adapter["patch"], adapter["failures"], adapter["solved"]) == (str(patches[0]), 2, 2)
    assert adapter["seconds_per_failure"] == pytest.approx(adapter["seconds"] / 2)


def test_tables(run, tiny_dir, data, text, patches):
    code, out, err = run(tiny_dir, data, "--adapter", patches[0], "--text", text)
    assert (code, out) == (0, "")
    for expected in ("2 rows, 8 completion tokens", "base", "patched", "difference", "teacher-forced", "generated"):
        assert expected in err
    for metric in ("tokens right", "perplexity", "rows exactly right", "edit similarity", "BLEU", "ROUGE-L"):
        assert metric in err
    assert "failing tokens solved" in err and "text.md" in err and "KL" in err


def test_base_alone_without_generation(run, tiny_dir, data):
    code, out, err = run(tiny_dir, data, "--no-generation")
    assert (code, out) == (0, "") and "generated" not in err and "patched" not in err and "0.0000" in err
    code, out, err = run(tiny_dir, data, "--no-generation", "--json")
    result = json.loads(out)
    assert result["patched"] is result["comparison"] is result["texts"] is None and result["adapters"] == []
    assert result["base"]["summary"]["generated"] is None


def test_patches_are_stacked(run, tiny_dir, data, patches):
    code, out, _ = run(tiny_dir, data, "--adapter", patches[0], "--adapter", patches[1], "--no-generation", "--json")
    assert code == 0
    both = PeftModel.from_pretrained(build_model(), patches[0], adapter_name="a")
    both.load_adapter(patches[1], "b")
    both.base_model.set_adapter(["a", "b"])
    rows = [json.loads(row) for row in ROWS]
    expected = evaluate(both, build_tokenizer(), rows, generate=False, progress=False)
    result = json.loads(out)["patched"]["summary"]
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    one = evaluate(load_patch(build_model(), patches[0]), build_tokenizer(), rows, generate=False, progress=False)
    assert abs(result["perplexity"] - one.perplexity) > 1e-3 * one.perplexity


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in ("a b", "xyz", "q", "w = ")) + "\n")
    return path


def test_own_texts_to_given_prompts(run, tiny_dir, data, patches, prompts):
    code, out, err = run(tiny_dir, data, "--adapter", *patches, "--prompts", prompts, "--json")
    assert (code, err) == (0, "")
    package, given = json.loads(out)["own_texts"]
    # the tiny model was never trained, so it says nothing of its own to the package's prompts
    assert (package["prompts"], package["texts"], given["prompts"]) == (None, 0, str(prompts))
    base = build_model()
    probe = OwnTextsProbe(base, build_tokenizer(), ["a b", "xyz", "q", "w = "])
    both = load_patch(load_patch(base, patches[0], "a"), patches[1], "b")
    both.base_model.set_adapter(["a", "b"])
    expected = probe(both).to_dict()
    assert {key: given[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert given["unchanged"] < given["texts"] == 4


def test_own_texts_are_told_in_the_table(run, tiny_dir, data, patches, prompts):
    code, _, err = run(tiny_dir, data, "--adapter", patches[0], "--prompts", prompts, "--no-generation")
    assert code == 0 and "prompts.jsonl" in err and "first words" in err and " of 4 (" in err
    assert "no texts of its own" not in err  # the package's prompts are not asked, as they would be generated to
    code, _, err = run(tiny_dir, data, "--adapter", patches[0], "--no-generation", "--own-texts")
    assert code == 0 and "The model has no texts of its own to the package's prompts, so none could change." in err
    for quiet in (["--no-generation"], ["--no-own-texts"]):
        code, out, _ = run(tiny_dir, data, "--adapter", patches[0], *quiet, "--json")
        assert code == 0 and json.loads(out)["own_texts"] == []


# the forms of the line


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("M D --json", "M D --json"),
        ("--json M D", "--json M D"),
        ("M --json D", "M --json D"),
        ("M D --json OUT", "M D --output OUT"),
        ("--json OUT M D", "--output OUT M D"),
        ("M D --json - --no-generation", "M D --json --no-generation"),
        ("M D --json OUT --no-generation", "M D --output OUT --no-generation"),
        ("M D --adapter P", "M D --adapter P"),
        ("M D --adapter P Q --text A B C", "M D --adapter P --adapter Q --text A --text B --text C"),
        ("M D --adapter P --prompts A B", "M D --adapter P --prompts A --prompts B"),
        ("--adapter P Q M D", "--adapter P --adapter Q M D"),
        ("--adapter P M D", "--adapter P M D"),
        ("--adapter=P M D", "--adapter=P M D"),
        ("M D -o X --dtype float32 --adapter P Q --json", "M D -o X --dtype float32 --adapter P --adapter Q --json"),
        ("--json -- M D", "--json -- M D"),
        ("M D E", "M D E"),  # refused by click
        ("M D --json OUT E", "M D --output OUT E"),
    ],
)
def test_words_belong_to_the_option_before_them(given, read):
    command = typer.main.get_command(app).commands["evaluate"]
    assert isinstance(command, SpreadCommand)
    assert command.spread(given.split()) == read.split()


@pytest.mark.parametrize("form", [["--json"], ["-o"], ["--output"]])
def test_output_file(run, tiny_dir, data, tmp_path, form):
    target = tmp_path / "out.json"
    for _ in range(2):  # an earlier evaluation is replaced
        code, out, err = run(tiny_dir, data, "--no-generation", *form, target)
        assert (code, out) == (0, "") and f"Written to {target}." in err
        assert json.loads(target.read_text())["base"]["summary"]["rows"] == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.json"]
    code, out, err = run(tiny_dir, data, "--no-generation", "-o", target, "--json")
    assert (code, err) == (0, "") and json.loads(out) == json.loads(target.read_text())


def test_interrupted(run, monkeypatch, tiny_dir, data, tmp_path, patches):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_evaluate, "load_patch", stop)
    target = tmp_path / "out.json"
    code, out, err = run(tiny_dir, data, "--adapter", patches[0], "--no-generation", "-o", target)
    assert (code, out) == (130, "") and "the base model alone was evaluated" in err
    result = json.loads(target.read_text())
    assert result["interrupted"] and result["base"]["summary"]["rows"] == 2 and result["patched"] is None
    monkeypatch.setattr(cli_evaluate, "run_evaluation", stop)
    target.unlink()
    assert run(tiny_dir, data, "-o", target)[0] == 130
    assert not target.exists()


# bad input


@pytest.fixture
def other(patches: list[Path], tmp_path: Path) -> Path:
    """A model of the same shapes with other weights."""
    directory = tmp_path / "other"
    build_model(seed=1).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def test_wrong_base(run, other, data, patches):
    code, out, err = run(other, data, "--adapter", patches[0], "--no-generation", "--json")
    assert (code, out) == (2, "")
    assert "solved for other weights" in err and "--allow-other-base" in err and err.count("\n") == 1
    with pytest.warns(UserWarning, match="solved for other weights"):
        code, out, _ = run(other, data, "--adapter", patches[0], "--no-generation", "--json", "--allow-other-base")
    assert code == 0 and json.loads(out)["patched"] is not None


def lora(tmp_path: Path) -> list:
    get_peft_model(build_model(), LoraConfig(target_modules=["down_proj"])).save_pretrained(tmp_path / "lora")
    return ["--adapter", tmp_path / "lora"]


def misfit(tmp_path: Path) -> list:
    model = get_peft_model(build_model(hidden_size=16), StarConfig(num_neurons=2, init_weights=False))
    model.save_pretrained(tmp_path / "misfit")
    return ["--adapter", tmp_path / "misfit"]


def missing(tmp_path: Path) -> list:
    return ["--adapter", tmp_path / "nothing"]


def text_alone(tmp_path: Path) -> list:
    return ["--text", tmp_path / "data.jsonl"]


def own_texts_alone(tmp_path: Path) -> list:
    return ["--own-texts"]


def prompts_alone(tmp_path: Path) -> list:
    return ["--prompts", tmp_path / "data.jsonl"]


def no_prompts(tmp_path: Path) -> list:
    return ["--adapter", tmp_path, "--prompts", tmp_path / "nothing.jsonl"]


def no_text(tmp_path: Path) -> list:
    return ["--adapter", tmp_path, "--text", tmp_path / "nothing.txt"]


def binary_text(tmp_path: Path) -> list:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return ["--adapter", tmp_path, "--text", tmp_path / "binary.txt"]


def output_is_input(tmp_path: Path) -> list:
    return ["--json", tmp_path / "data.jsonl"]


def output_is_other(tmp_path: Path) -> list:
    (tmp_path / "notes.json").write_text('{"my": "notes"}')
    return ["-o", tmp_path / "notes.json"]


def output_is_directory(tmp_path: Path) -> list:
    return ["-o", tmp_path]


def output_nowhere(tmp_path: Path) -> list:
    return ["-o", tmp_path / "no" / "out.json"]


def dtype(tmp_path: Path) -> list:
    return ["--dtype", "float7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lora, "adapter of type LORA, not a STAR patch"),
        (misfit, "does not fit this model"),
        (missing, "There is no patch at"),
        (text_alone, "--text measures the harm that patches do"),
        (own_texts_alone, "--own-texts measures the harm that patches do"),
        (prompts_alone, "--prompts measures the harm that patches do"),
        (no_prompts, "nothing.jsonl is not a file"),
        (no_text, "nothing.txt cannot be read: No such file"),
        (binary_text, "binary.txt is not UTF-8 text"),
        (output_is_input, "is the input"),
        (output_is_other, "is no earlier evaluation, so it is not replaced"),
        (output_is_directory, "is a directory; the output is a file"),
        (output_nowhere, "there is no directory"),
        (dtype, "Unknown dtype 'float7'"),
    ],
)
def test_bad_input(run, tiny_dir, data, tmp_path, arguments, message):
    extra = arguments(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = run(tiny_dir, data, *extra)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("Error: ") and err.count("Error:") == 1 and "Traceback" not in err
    assert message in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["model", "data", "empty"])
def test_missing_or_empty_input(run, tiny_dir, data, tmp_path, name):
    (tmp_path / "empty.jsonl").write_text("\n")
    arguments = {
        "model": [tmp_path / "no" / "such" / "model", data],
        "data": [tiny_dir, tmp_path / "none.jsonl"],
        "empty": [tiny_dir, tmp_path / "empty.jsonl"],
    }
    code, out, err = run(*arguments[name], "--json")
    assert (code, out) == (2, "") and err.startswith("Error: ") and err.count("\n") == 1


def test_usage(run, tiny_dir, data):
    assert run(tiny_dir)[0] == 2
    assert run(tiny_dir, data, "more")[0] == 2
    assert run(tiny_dir, data, "--text-tokens", "1")[0] == 2


def test_damaged_report(run, tiny_dir, data, tmp_path, patches):
    shutil.copytree(patches[0], tmp_path / "patch")
    (tmp_path / "patch" / "repair_report.json").write_text("[")
    code, _, err = run(tiny_dir, data, "--adapter", tmp_path / "patch", "--json")
    assert code == 2 and "is not a repair report" in err
