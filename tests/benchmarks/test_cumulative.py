"""The benchmark of how much one patch can hold, on a tiny model: it goes on where it stopped, as if it had not."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("bm25s")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cumulative  # noqa: E402
import report  # noqa: E402
import succession  # noqa: E402
from cumulative_report import IN_SUCCESSION, lines, table  # noqa: E402
from methods import make_method  # noqa: E402
from peft_star.engine.engine import Engine  # noqa: E402
from peft_star.engine.passes import teacher_forced  # noqa: E402
from peft_star.failures import encode_rows  # noqa: E402

ROWS = [
    {"prompt": "we saw the cat", "completion": "b", "focus": "the cat"},
    {"prompt": "where is my dog", "completion": "c", "focus": "my dog"},
]
FACTS = [
    {
        "prompt": row["prompt"],
        "subject": row["focus"],
        "target_new": row["completion"],
        "rephrase_prompt": f"once {row['prompt']}",
        "locality_prompt": f"now {row['prompt']}",
    }
    for row in ROWS
]
EDITOR = "layers=[1],steps=60,weight_decay=0.0,clamp=20.0,kl_weight=0.0"
METHODS = {
    "star": "star:num_neurons=32,max_steps=60,learning_rate=0.05",
    "sgd": "sgd:max_steps=50",
    "lora": "lora",
    "memit": f"memit:{EDITOR},moment_weight=1.0",
    "alphaedit": f"alphaedit:{EDITOR},threshold=1e9,ridge=0.001",
}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 11, 40]])).logits


@pytest.mark.parametrize("name", METHODS)
def test_a_series_goes_on_from_what_was_kept(name, tiny_model, tiny_tokenizer, tmp_path):
    method, before = cumulative.parse_method(METHODS[name]), weights(tiny_model)
    rows = [[row if name in ("memit", "alphaedit") else {**row, "focus": None}] for row in ROWS]
    rows = [[{key: value for key, value in row.items() if value} for row in part] for part in rows]
    with succession.series(method, tiny_model, tiny_tokenizer) as patch:
        patch.add(rows[0])
        patch.save(tmp_path)
        alone = logits(patch.model)
        patch.add(rows[1])
        both = logits(patch.model)
    assert not torch.equal(alone, both)
    with succession.series(method, tiny_model, tiny_tokenizer, kept=tmp_path) as patch:
        torch.testing.assert_close(logits(patch.model), alone)
        patch.add(rows[1])
        torch.testing.assert_close(logits(patch.model), both)
    now = weights(tiny_model)
    assert now.keys() == before.keys() and all(torch.equal(now[key], tensor) for key, tensor in before.items())


def test_a_later_batch_of_star_holds_the_earlier_one(tiny_model, tiny_tokenizer):
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in ROWS]
    with succession.series(cumulative.parse_method(METHODS["star"]), tiny_model, tiny_tokenizer) as patch:
        for row in rows:
            assert patch.add([row])["earlier_broken"] == 0
        engine = Engine(patch.model)
        assert teacher_forced(engine, engine.batches(encode_rows(rows, tiny_tokenizer))).right.all()
        assert len(patch.model.peft_config["default"].ledger.entries) == 2


def test_alphaedit_knows_the_keys_of_earlier_batches(tiny_model, tiny_tokenizer):
    with succession.series(cumulative.parse_method(METHODS["alphaedit"]), tiny_model, tiny_tokenizer) as patch:
        for number, row in enumerate(ROWS, start=1):
            patch.add([row])
            (keys,) = patch.earlier.values()
            assert [part.shape[1] for part in keys] == [1] * number


def test_a_method_that_cannot_go_on_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="logit-bias has no way to go on with a patch"):
        with succession.series(make_method("logit-bias"), tiny_model, tiny_tokenizer):
            pass


# the command line


@pytest.fixture
def command(tiny_dir, data, tmp_path, monkeypatch):
    """Run the benchmark on a task of four rows, and on facts; returns the results in its file."""
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)) + "\n")
    file = tmp_path / "cumulative.json"

    def run(*options):
        given = ["--model", tiny_dir, "--json", file, "--unseen", 1, "--demonstrations", 1, *options]
        monkeypatch.setattr(sys, "argv", ["cumulative.py", *map(str, given)])
        cumulative.main()
        return json.loads(file.read_text())["results"]

    run.task = ["--data", data, "--tasks", "conala", "--methods", METHODS["sgd"], METHODS["memit"]]
    run.facts = ["--facts", tmp_path / "facts.jsonl", "--methods", METHODS["memit"], METHODS["lora"]]
    run.states = tmp_path / "cumulative.states"
    return run


def test_points_are_measured_once(command, capsys, monkeypatch, tmp_path):
    first = command(*command.task, "--counts", 1, 2, "--step", 1, "--plot", tmp_path / "picture")
    # an editor has nothing to go by in a task
    assert list(first) == [
        f"conala, {METHODS['sgd']}, {rest}"
        for rest in (
            "at once, 1",
            "at once, 2",
            "in succession by 1, 1",
            "in succession by 1, 2",
        )
    ]
    printed = capsys.readouterr().out
    assert printed.count("| in succession by 1 |") == 2 and "| 1 / 1 |" in printed
    assert (tmp_path / "picture-conala.png").stat().st_size > 10_000
    last = first[f"conala, {METHODS['sgd']}, in succession by 1, 2"]
    assert last["solved"] <= last["failures"] and last["earlier"] == 1 and len(last["held"]) == 2
    assert last["unseen"]["tokens"] > 0 and last["texts"]["code"]["kl"] > 0
    # the tiny model was never trained, so it has no texts of its own
    assert last["own_texts"]["texts"] == 0
    assert last["cpu_seconds_total"] == pytest.approx(
        last["cpu_seconds"] + first[f"conala, {METHODS['sgd']}, in succession by 1, 1"]["cpu_seconds"]
    )

    # facts in the same file; the first point in succession is the same patch as the one at once
    both = command(*command.facts, "--counts", 1, 2, "--step", 1)
    assert {key: both[key] for key in first} == first and len(both) == 4 + 8
    for method in (METHODS["memit"], METHODS["lora"]):
        one, same = (both[f"facts, {method}, {way}, 1"] for way in ("at once", "in succession by 1"))
        assert all(one[name] == same[name] for name in ("solved", "rows_right", "unseen", "texts"))
        assert set(one["unseen"]) == {"rephrased", "neighbours"} and one["failures"] > 0
    assert "rephrased right" in capsys.readouterr().out

    measured = []
    whole = cumulative.Study.measure
    monkeypatch.setattr(cumulative.Study, "measure", lambda *args: measured.append(args[3]) or whole(*args))
    assert command(*command.facts, "--counts", 1, 2, "--step", 1) == both and not measured
    with pytest.raises(SystemExit, match="other settings"):
        command(*command.facts, "--counts", 1, "--seed", 1)
    with pytest.raises(SystemExit, match="holds results of .*facts.jsonl"):
        command("--facts", tmp_path / "others.jsonl", "--counts", 1)
    with pytest.raises(SystemExit, match="holds sgd:max_steps=50 with other settings"):
        monkeypatch.setattr(cumulative, "parse_method", lambda name: make_method("sgd", max_steps=2))
        command(*command.task, "--counts", 1)


def test_patches_at_once_can_be_left_out(command):
    found = command(*command.task, "--counts", 2, "--step", 1, "--no-at-once")
    assert [key.split(", ", 2)[2] for key in found] == ["in succession by 1, 1", "in succession by 1, 2"]


def test_the_page_of_results_has_its_tables_and_pictures(command, tmp_path):
    command(*command.task, "--counts", 1, 2, "--step", 1)
    command(*command.facts, "--counts", 1, "--step", 0)
    page = tmp_path / "docs" / "results.md"
    text = report.build([tmp_path / "cumulative.json"], page, {"tiny-llama": "Tiny Llama"})
    assert "### What one patch can hold" in text and "#### conala" in text and "#### facts" in text
    found = [line for line in text.splitlines() if line.startswith("python benchmarks/cumulative.py")]
    assert len(found) == 2 and all("--json cumulative.json" in line for line in found)
    assert "--data DIR" in found[0] and "--tasks conala" in found[0] and "--counts 1 2 --step 1" in found[0]
    assert "--facts facts.jsonl" in found[1] and "--data" not in found[1] and "--counts 1 --step 0" in found[1]
    for name in ("conala", "facts"):
        assert (tmp_path / "docs" / "results" / f"tiny-llama-cumulative-{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("kept", [True, False])
def test_a_stopped_series_goes_on_as_if_it_had_not(kept, command, monkeypatch):
    options = [*command.task, "--counts", 3, "--step", 1]
    whole, calls = cumulative.Study.measure, []

    def stop_at_third(*args):
        calls.append(args[3])
        if len(calls) == 4:  # behind the one at once
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(cumulative.Study, "measure", stop_at_third)
    with pytest.raises(SystemExit) as stopped:
        command(*options)
    assert stopped.value.code == 130 and calls == [3, 1, 2, 3]
    (folder,) = command.states.iterdir()
    assert [item.name for item in folder.iterdir()] == ["2"]
    if not kept:
        folder.rename(command.states / "elsewhere")
    added = []
    add = cumulative.Study.add
    monkeypatch.setattr(cumulative.Study, "add", lambda *args: added.append(args[3:]) or add(*args))
    stopped_results = command(*options)
    # at once was done; without its patch the series begins anew
    assert added == ([(2, 3)] if kept else [(0, 1), (1, 2), (2, 3)])
    last = stopped_results[f"conala, {METHODS['sgd']}, in succession by 1, 3"]
    monkeypatch.setattr(cumulative.Study, "measure", whole)
    command_file = command.states.with_suffix(".json")
    command_file.rename(command_file.with_name("stopped.json"))
    unstopped = command(*options, "--states", command.states.with_name("others"))
    other = unstopped[f"conala, {METHODS['sgd']}, in succession by 1, 3"]
    for name in ("solved", "broken", "rows_right", "earlier", "earlier_right", "held", "unseen"):
        assert last[name] == other[name]
    assert last["texts"]["prose"]["kl"] == pytest.approx(other["texts"]["prose"]["kl"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "conala"], "--tasks need --data"),
        ([], "nothing to repair"),
        (["--facts", "F", "--counts", "0"], "begin at 1"),
        (["--facts", "F", "--counts", "1", "--step", "0", "--no-at-once"], "nothing is repaired"),
        (["--facts", "F", "--counts", "3"], "holds 2 facts"),
        (["--data", "D", "--tasks", "conala", "--counts", "4"], "gets 3 rows of conala wrong"),
    ],
)
def test_bad_input_is_told_in_a_sentence(options, message, command, data, tmp_path, capsys):
    places = {"F": tmp_path / "facts.jsonl", "D": data}
    with pytest.raises(SystemExit) as stopped:
        command(*(places.get(word, word) for word in options))
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_what_was_left_out_and_what_broke_is_in_the_table():
    own = {"texts": 10, "unchanged": 7, "kl": 0.1}
    texts = {name: {"kl": 0.2, "perplexity_ratio": 1.5} for name in ("prose", "code")}
    record = {
        **{"subject": "tldr", "method": "star", "way": IN_SUCCESSION, "step": 5, "rows": 10, "left_out": 2},
        **{"failures": 20, "solved": 15, "right": 9, "broken": 1, "rows_right": 8, "earlier": 5, "earlier_right": 4},
        **{"unseen": {"tokens": 50, "right_before": 20, "right": 25, "broken": 3}, "cpu_seconds_total": 12.4},
        **{"own_texts": own, "texts": texts},
    }
    ((name, records),) = lines({"results": {"a": record}})
    line = table(name, records).splitlines()[-1]
    assert line == (
        "| STAR | in succession by 5 | 10 | 15 / 20 | 1 / 9 | 8 / 10 (2 left out) | 4 / 5 | 40.0% -> 50.0% | 3 / 20 | "
        "7 / 10 | 0.1 | 0.2 | x1.5 | 0.2 | 12 |"
    )
