"""The benchmarks that draw: side effects, sparsity, trajectories, and the page that shows them all."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing

from peft_star import RepairArguments, StarConfig, prepare, repair

pytest.importorskip("bm25s")
pytest.importorskip("matplotlib")
pytest.importorskip("rouge_score")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import effectiveness
import figures
import paper_figures
import report
import side_effects
import sparsity
import trajectory
from methods import METHODS
from prompts import few_shot_rows
from side_effects import RELATED, UNRELATED, Corpus, Failure, draw_cases
from support.byte_llama import build_tokenizer

ROWS = 26


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of short rows; with the tiny model, which has random weights, nearly every token fails."""
    folder = tmp_path_factory.mktemp("data")
    for task in ("conala", "ia32", "tldr"):
        (folder / task).mkdir()
        for split, count in (("retrieval", 40), ("inference", ROWS)):
            lines = [json.dumps({"prompt": f"{task} {split} {n}", "completion": f"x={n}"}) for n in range(count)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def benchmark(tiny_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a benchmark's command line on the tiny model: `benchmark(sparsity, "--json", path, ...)`."""

    def run(module, *options: object) -> None:
        common = ["--model", tiny_dir, "--data", data, "--demonstrations", 1]
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, [*common, *options])])
        module.main()

    return run


# what the pictures share


def test_bootstrap_agrees_with_the_normal_interval():
    sample = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = figures.bootstrap(sample, lambda cases: cases.mean())
    error = 1.96 * sample.std() / 20
    assert low == pytest.approx(sample.mean() - error, abs=0.05)
    assert high == pytest.approx(sample.mean() + error, abs=0.05)
    assert figures.bootstrap(sample, lambda cases: cases.mean()) == (low, high)


def test_one_case_has_no_interval():
    assert np.isnan(figures.bootstrap([[1.0, 2.0]], lambda cases: cases.sum())).all()
    assert figures.with_interval({"a": 0.5, "a_interval": (float("nan"),) * 2}, "a", ".1f") == "0.5"
    assert figures.with_interval({"a": 0.5, "a_interval": (0.25, 0.75)}, "a", ".2f") == "0.50 [0.25, 0.75]"


def test_methods_look_different():
    found = figures.looks([*METHODS, "star:max_steps=3", "star:num_neurons=16"])
    assert len({(look.color, look.marker) for look in found.values()}) == len(found)
    assert len({look.label for look in found.values()}) == len(found)


def test_the_papers_figures_agree_with_each_other():
    for methods in paper_figures.SIDE_EFFECTS.values():
        for generalization, specificity, published in methods.values():
            for g, s, gsh in zip(generalization, specificity, published):
                assert gsh == pytest.approx(2 * g * s / (g + s), abs=2e-3)
    assert set(paper_figures.EFFECTIVENESS) == set(paper_figures.SECONDS) == set(paper_figures.SIDE_EFFECTS)
    # the abstract: 4.0% to 12.4% over the baselines on CoNaLa, CodeLlama
    conala = {method: rows[0][0] for method, rows in paper_figures.EFFECTIVENESS["CodeLlama-7B"].items()}
    assert conala["STAR, multiple"] - conala["SGD, multiple"] == pytest.approx(0.040)
    assert conala["STAR, multiple"] - conala["MINT, single"] == pytest.approx(0.124)


# side effects


def failures_of(rows: int, tokens: tuple[int, ...]) -> list[Failure]:
    return [Failure("t", row, 10 + token, token) for row in range(rows) for token in tokens]


def test_cases_hold_one_failure_of_each_row():
    failures = failures_of(40, (1, 2, 3)) + [Failure("t", row, 99, 7) for row in range(RELATED)]
    cases = list(itertools.islice(draw_cases(failures, lambda failure: True, 0), 30))
    assert [case.repaired.expected for case in cases[:3]] != [case.repaired.expected for case in cases[1:4]]
    assert {case.repaired.expected for case in cases[:3]} == {1, 2, 3}, "a token in too few rows makes no group"
    assert len({case.repaired for case in cases}) == len(cases)
    for case in cases:
        assert len(case.related) == RELATED and len(case.unrelated) == UNRELATED
        rows = [failure.source for failure in (case.repaired, *case.related, *case.unrelated)]
        assert len(set(rows)) == len(rows)
        assert {failure.expected for failure in case.related} == {case.repaired.expected}
        assert case.repaired.expected not in {failure.expected for failure in case.unrelated}
        assert len({failure.expected for failure in case.unrelated}) == 3, "all other tokens that there are"


def test_more_cases_begin_with_the_same_ones():
    failures = failures_of(40, (1, 2, 3))
    few = list(itertools.islice(draw_cases(failures, lambda failure: True, 0), 4))
    assert list(itertools.islice(draw_cases(failures, lambda failure: True, 0), 9))[:4] == few
    assert list(itertools.islice(draw_cases(failures, lambda failure: True, 1), 4)) != few


def test_what_cannot_be_repaired_is_no_case():
    failures = failures_of(40, (1, 2))
    cases = list(draw_cases(failures, lambda failure: failure.expected == 2 and failure.row < 5, 0))
    assert sorted(case.repaired.row for case in cases) == [0, 1, 2, 3, 4]
    assert not list(draw_cases(failures_of(RELATED, (1, 2)), lambda failure: True, 0))


def test_a_failure_becomes_a_row_of_one_token(tiny_tokenizer):
    corpus = Corpus(tiny_tokenizer, {"t": [{"prompt": "café", "completion": "=é1"}]})
    (whole,) = corpus.rows["t"]
    texts = []
    for position in whole.medium_positions:
        failure = Failure("t", 0, position, whole.input_ids[position + 1])
        row = corpus.row(failure, 5)
        assert row.index == 5 and row.input_ids == whole.input_ids[: position + 2]
        assert list(row.medium_positions) == [position]
        texts.append(corpus.repairable(failure))
    # half of é is no text that could be tokenised again
    assert texts == [
        {"prompt": "café", "completion": "="},
        None,
        None,
        {"prompt": "café=é", "completion": "1"},
    ]


def test_what_a_tokenizer_puts_before_a_text_stays_single():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    corpus = Corpus(tokenizer, {"t": [{"prompt": "ab", "completion": "cd"}]})
    (whole,) = corpus.rows["t"]
    assert whole.prompt_ids[0] == tokenizer.bos_token_id
    found = [corpus.repairable(Failure("t", 0, p, whole.input_ids[p + 1])) for p in whole.medium_positions]
    assert found == [{"prompt": "ab", "completion": "c"}, {"prompt": "abc", "completion": "d"}]


def record(g: float, u: float, signed: float, kl: float, fixed: int) -> dict:
    harm = {"kl": kl, "perplexity_ratio": 2.0, "broken": 3, "right_before": 12}
    return {
        "solved": 1,
        "seconds": 0.5,
        "details": {"solved_by_margin": 0},
        "effects": {
            "g_mae": g,
            "g_rmse": 2 * g,
            "s_mae": 1 - u,
            "s_rmse": 1 - 2 * u,
            "signed_g": signed,
            "related_fixed": fixed,
            "related_failing": 9,
        },
        "harm": {"prose": harm, "code": harm},
    }


def test_a_points_figures():
    point = side_effects.point([record(0.2, 0.1, 0.1, 0.03, 3), record(0.4, 0.3, 0.3, 0.06, 6)])
    assert point["g_mae"] == pytest.approx(0.3) and point["s_mae"] == pytest.approx(0.8)
    assert point["gsh_mae"] == pytest.approx(2 * 0.3 * 0.8 / 1.1)
    assert point["g_rmse"] == pytest.approx(((0.16 + 0.64) / 2) ** 0.5)
    assert point["s_rmse"] == pytest.approx(1 - ((0.04 + 0.36) / 2) ** 0.5)
    assert point["signed_g"] == pytest.approx(0.2)
    assert point["kappa"] == pytest.approx(0.045 / 0.09)
    assert point["related_fixed"] == pytest.approx(0.5)
    assert point["code_perplexity"] == pytest.approx(2.0) and point["code_broken"] == pytest.approx(0.25)
    assert (point["solved"], point["reached"]) == (1.0, 0.0)
    assert point["g_mae_interval"] == pytest.approx((0.2, 0.4))


def test_methods_with_settings():
    method = side_effects.parse_method("star:max_steps=40,norm=rms")
    assert (method.settings["max_steps"], method.settings["norm"]) == (40, "rms")
    with pytest.raises(ValueError, match="no setting"):
        side_effects.parse_method("sgd:max_steps")


def test_side_effects_from_the_command_line(benchmark, tmp_path, capsys, monkeypatch):
    file = tmp_path / "side_effects.json"
    options = ["--rows", ROWS, "--tasks", "conala", "--json", file, "--plot", tmp_path / "picture"]
    benchmark(side_effects, *options, "--cases", 2, "--methods", "star", "logit-bias", "--margins", 0.01, 0.5)
    state = json.loads(file.read_text())
    assert len(state["cases"]) == 2
    for method in ("star", "logit-bias"):
        for margin in ("0.01", "0.5"):
            assert set(state["results"][method][margin]) == {"0", "1"}
    biased = state["results"]["logit-bias"]
    assert all(found["0"]["details"]["solved_by_margin"] == 1 for found in biased.values())
    # the bias only ever raises the expected token, by as much as the margin asks for
    assert 0 < biased["0.01"]["0"]["effects"]["signed_g"] < biased["0.5"]["0"]["effects"]["signed_g"]
    assert biased["0.01"]["0"]["harm"]["code"]["kl"] < biased["0.5"]["0"]["harm"]["code"]["kl"]
    assert all((tmp_path / f"picture-{name}.png").stat().st_size > 10_000 for name in ("trade-off", "harm"))
    assert capsys.readouterr().out.count("| logit bias |") == 4

    # again: nothing but what is new is measured
    measured = []
    whole = side_effects.measure
    monkeypatch.setattr(side_effects, "measure", lambda *args: measured.append(args) or whole(*args))
    benchmark(side_effects, *options, "--cases", 3, "--methods", "star", "--margins", 0.01)
    assert len(measured) == 1
    assert set(json.loads(file.read_text())["results"]["logit-bias"]) == {"0.01", "0.5"}


def test_side_effects_keep_what_is_finished_when_stopped(benchmark, tmp_path, monkeypatch):
    file = tmp_path / "side_effects.json"
    whole, calls = side_effects.measure, []

    def stop_at_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(side_effects, "measure", stop_at_second)
    options = ["--rows", ROWS, "--tasks", "conala", "--json", file, "--methods", "logit-bias", "--cases", 3]
    with pytest.raises(SystemExit) as stopped:
        benchmark(side_effects, *options, "--margins", 0.1)
    assert stopped.value.code == 130
    assert list(json.loads(file.read_text())["results"]["logit-bias"]["0.1"]) == ["0"]


def test_too_few_rows_for_a_case(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="search more rows"):
        benchmark(side_effects, "--rows", 3, "--json", tmp_path / "side_effects.json", "--methods", "logit-bias")


# sparsity


def test_algorithm_1_moves_by_the_priors_magnitude(tiny_model, tiny_tokenizer):
    rows = [{"prompt": "a b c", "completion": "de"}]
    fixed = RepairArguments(
        **sparsity.VARIANTS[sparsity.ALGORITHM_1], max_steps=1, verify_generation=False, disable_tqdm=True
    )
    config = {"task_type": "CAUSAL_LM", "num_neurons": 8, "layer_selection": "all"}
    model = get_peft_model(copy.deepcopy(tiny_model), StarConfig(**config))
    priors = prepare(model, tiny_tokenizer, rows, fixed)
    model = get_peft_model(tiny_model, StarConfig(**config))
    repair(model, tiny_tokenizer, rows, fixed)
    deltas = {name: module.star_delta["default"] for name, module in tiny_model.named_modules() if name in priors}
    assert len(deltas) == 4
    for name, delta in deltas.items():
        assert torch.allclose(delta.abs(), fixed.learning_rate * priors[name].abs(), rtol=1e-4, atol=1e-7)
        assert delta.any()


def test_layers_are_taken_by_importance():
    ranked = [3, 0, 2, 1]
    half = sparsity.Setting(5, "layers by occlusion", "defaults", 1.0, 0.5)
    one = sparsity.Setting(6, "one layer", "defaults", 16, 1)
    assert half.config(ranked)["layer_selection"] == [0, 3]
    assert one.config(ranked) == {"num_neurons": 16, "layer_selection": [3]}
    keys = [setting.key for setting in sparsity.settings([4, 5, 6])]
    assert len(set(keys)) == len(keys) == 2 * (2 * 8 + 10 + 6)


def test_sparsity_from_the_command_line(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sparsity, "COUNTS", [1, 16, 1.0])
    file = tmp_path / "sparsity.json"
    options = ["--tasks", "conala", "--figures", 6, "--steps", 4, "--json", file, "--plot", tmp_path / "sparsity.png"]
    benchmark(sparsity, *options, "--rows", 2)
    state = json.loads(file.read_text())
    assert len(state["scan"]) == 2 and len(state["results"]) == 6
    found = sparsity.points(state, sparsity.Setting(6, "one layer", "defaults", 1.0, 1))
    failures = sum(row["failures"] for row in state["scan"].values())
    records = state["results"]["figure 6 | one layer | defaults | 1 of all"].values()
    assert found["failures"] == failures > 0
    assert found["solved"] == pytest.approx(sum(record["solved"] for record in records) / failures)
    tokens = sum(row["tokens"] for row in state["scan"].values())
    right = sum(record["right"] + record["solved"] - record["broken"] for record in records)
    assert found["exact_match"] == pytest.approx(right / tokens)
    assert (tmp_path / "sparsity.png").stat().st_size > 10_000
    assert "Figure 6" in capsys.readouterr().out

    monkeypatch.setattr(sparsity, "patch_row", lambda *args: pytest.fail("measured again"))
    benchmark(sparsity, *options, "--rows", 2)


def test_layers_ranked_by_exact_occlusion(tiny_model, tiny_tokenizer, data):
    (row,) = few_shot_rows(data, "conala", 1, 1)
    found = sparsity.scan_row(tiny_model, tiny_tokenizer, row, "exact")
    assert sorted(found["layers"]) == [0, 1, 2, 3]
    assert found["failures"] == found["tokens"] - found["right"]
    assert not any("star" in name for name, _ in tiny_model.named_modules())


# trajectories


def test_the_plane_goes_through_both_ends():
    first, second = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).unbind(0)
    plane = trajectory.plane_through(first, second)
    assert torch.allclose(plane @ plane.T, torch.eye(2), atol=1e-6)
    coordinates, inside = trajectory.project(torch.stack([first, second, first - 2 * second]), plane)
    assert inside == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(coordinates @ plane, torch.stack([first, second, first - 2 * second]), atol=1e-5)
    outside = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    outside -= outside @ plane.T @ plane
    assert trajectory.project(torch.cat([outside, first[None]]), plane)[1] == pytest.approx(
        float(first.square().sum() / (first.square().sum() + outside.square().sum())), abs=1e-5
    )
    with pytest.raises(ValueError, match="on a line"):
        trajectory.plane_through(first, -3 * first)


def test_trajectory_from_the_command_line(benchmark, tmp_path, capsys, monkeypatch):
    file = tmp_path / "trajectory.json"
    options = ["--steps", 6, "--grid", 4, "--neurons", 8, "--json", file, "--plot", tmp_path / "trajectory.png"]
    benchmark(trajectory, *options)
    found = json.loads(file.read_text())["results"]
    starts = {path["loss"][0] for path in found["paths"].values()}
    assert len(starts) == 1, "all paths start at the unpatched model"
    assert all(path["loss"][-1] < path["loss"][0] and len(path["loss"]) == 7 for path in found["paths"].values())
    assert all((path["x"][0], path["y"][0]) == (0, 0) for path in found["paths"].values())
    assert found["paths"][trajectory.STAR]["y"][-1] == pytest.approx(0, abs=1e-5)
    assert len(found["grid"]["loss"]) == 16
    assert (tmp_path / "trajectory.png").stat().st_size > 10_000
    assert trajectory.SGD in capsys.readouterr().out

    # a grid that was cut off is filled up, and the finished points stay
    state = json.loads(file.read_text())
    kept = dict(list(state["results"]["grid"]["loss"].items())[:5])
    state["results"]["grid"]["loss"] = kept
    file.write_text(json.dumps(state))
    evaluated = []
    whole = trajectory.Surface.mean_loss
    monkeypatch.setattr(
        trajectory.Surface, "mean_loss", lambda self, point: evaluated.append(point) or whole(self, point)
    )
    benchmark(trajectory, *options)
    assert len(evaluated) == 11
    again = json.loads(file.read_text())["results"]["grid"]["loss"]
    assert again == pytest.approx(found["grid"]["loss"])


def test_the_surface_is_exact_at_an_end(tiny_dir, data, tmp_path, benchmark):
    """The plane's coordinates of SGD's end give back the loss that SGD ended with."""
    file = tmp_path / "trajectory.json"
    points = {}
    axes = trajectory.axes_of_grid

    def through_the_end(paths, size):
        points.update(paths)
        return [paths[trajectory.SGD]["x"][-1]], [paths[trajectory.SGD]["y"][-1]]

    trajectory.axes_of_grid = through_the_end
    try:
        benchmark(trajectory, "--steps", 3, "--grid", 1, "--neurons", 8, "--json", file)
    finally:
        trajectory.axes_of_grid = axes
    (value,) = json.loads(file.read_text())["results"]["grid"]["loss"].values()
    assert value == pytest.approx(points[trajectory.SGD]["loss"][-1], rel=1e-3)


# the page


def test_the_page_holds_everything_and_keeps_the_reading(benchmark, tmp_path, monkeypatch, tiny_dir):
    results = tmp_path / "results"
    results.mkdir()
    small = ["--methods", "logit-bias", "--cases", 2, "--margins", 0.1]
    benchmark(side_effects, "--rows", ROWS, "--tasks", "ia32", *small, "--json", results / "a.json")
    benchmark(trajectory, "--steps", 3, "--grid", 3, "--neurons", 8, "--json", results / "b.json")
    one_row = ["--tasks", "conala", "--rows", 1]
    monkeypatch.setattr(sparsity, "COUNTS", [4])
    benchmark(sparsity, *one_row, "--figures", 6, "--steps", 2, "--json", results / "d.json")
    simple = ["--methods", "logit-bias", "--no-generate", "--no-harm"]
    benchmark(effectiveness, *one_row, *simple, "--json", results / "effectiveness.json")
    state = json.loads((results / "a.json").read_text())
    state["setting"]["model"] = "someone/Another-Model"
    (results / "c.json").write_text(json.dumps(state))
    page = tmp_path / "docs" / "results.md"

    def make() -> str:
        arguments = ["report.py", "--folder", results, "--out", page, "--names", f"{tiny_dir.name}=Tiny Llama"]
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        report.main()
        return page.read_text()

    text = make()
    assert text.count("\n## ") == 3 and "## Tiny Llama" in text and "## someone/Another-Model" in text
    assert str(tiny_dir) not in text
    assert text.count("### Side effects (RQ3)") == 2 and "### Table 5: side effects" in text
    assert "--cases 2 --methods logit-bias --margins 0.1" in text
    assert "--steps 2 --occlusion exact --tasks conala --rows 1 --figures 6" in text
    assert "--no-generate --no-harm --methods logit-bias" in text
    assert text.count("- logit bias: max_sweeps 100.") == 3
    assert "#### conala" in text and "*Figure 6" in text and "| SGD |" in text
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(pictures) == len(set(pictures)) == 6
    assert all((page.parent / picture).stat().st_size > 10_000 for picture in pictures)

    page.write_text(text.replace(report.BEGIN, f"{report.BEGIN}\n\nSTAR does less harm."))
    assert make() == page.read_text() and "STAR does less harm." in page.read_text()


def test_a_file_that_is_no_result(tmp_path, monkeypatch, capsys):
    (tmp_path / "other.json").write_text('{"a": 1}')
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(tmp_path), "--out", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit) as refused:
        report.main()
    assert refused.value.code == 2 and "holds no results" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
