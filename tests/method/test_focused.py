"""Pushes at what a row names as its focus: targets through the layers above, neurons under protection, fallbacks."""

import pytest
import torch
from peft import get_peft_model

from peft_star import RepairArguments, RepairCallback, RepairInterrupted, StarConfig, repair
from peft_star.failures import encode_rows
from peft_star.method import band, focused, namesakes
from peft_star.method.background import FLOOR
from peft_star.method.band import WEIGHT, shielded
from peft_star.method.callbacks import Journal
from support.words import QUICK, RETAIN, ROWS, decided, star, word_tokenizer

FOCUSED = [{**ROWS[0], "focus": "w9 w11"}, {**ROWS[1], "focus": "w30 w31"}]
NAMES = [f"model.layers.{index}" for index in range(3)]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def band_of_one(monkeypatch):
    """Tiny models have three layers: the first of them is the band."""
    monkeypatch.setattr(focused, "BAND", (0.0, 0.0))


def weights_of(model):
    """The base's weights by their names without an adapter around them."""
    return {
        name.replace(".base_layer", ""): value.clone()
        for name, value in model.state_dict().items()
        if "star_" not in name
    }


def test_a_shielded_answer_is_the_least_squares_under_the_second_moment():
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    values = 30 * torch.randn(3, 12, generator=generator, dtype=torch.float64)
    targets = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    moment = part.T @ part
    moment += FLOOR * moment.diagonal().mean() * torch.eye(12, dtype=moment.dtype)
    expected = torch.linalg.solve(WEIGHT * moment + values.T @ values, values.T @ targets)
    torch.testing.assert_close(shielded(values, part, 0.0) @ targets, expected)


def test_sites_that_are_alike_and_nothing_to_protect_have_an_answer():
    values = torch.ones(2, 3, dtype=torch.float64)
    assert shielded(values, None, 1e-4).isfinite().all()
    assert shielded(0 * values, 0 * values, 1e-4).isfinite().all()


@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_rows_with_a_focus_are_pushed_there_and_solved(mode, tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    model = star(num_layers=1, num_neurons=32)
    base = weights_of(model)
    report = repair(model, tokenizer, FOCUSED, RepairArguments(mode=mode, learning_rate=0.05, **QUICK), retain=RETAIN)
    assert report.failures and report.num_solved == len(report.failures)
    (problem,) = report.problems
    told = [act for act in problem.acts if act["how"] == "focus"]
    assert told and {token.strip() for act in told for token in act["tokens"]} <= {"w11", "w31"}
    assert {name for act in told for name in act["layers"]} == {"model.layers.0.mlp.down_proj"}
    assert report.layers[0].name == "model.layers.0.mlp.down_proj"
    after = weights_of(model)
    assert after.keys() == base.keys() and all(torch.equal(after[name], base[name]) for name in base)


def test_without_a_focus_nothing_is_pushed_in_the_band(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    monkeypatch.setattr(focused, "find_targets", lambda *args: pytest.fail("no row has a focus"))
    arguments = RepairArguments(reach="prompt", learning_rate=0.05, **QUICK)
    report = repair(star(num_layers=1), tokenizer, ROWS, arguments)
    assert [layer.name for layer in report.layers] == ["model.layers.2.mlp.down_proj"]


def test_the_papers_algorithm_knows_no_focus(tokenizer, monkeypatch):
    monkeypatch.setattr(focused, "patch", lambda *args: pytest.fail("Algorithm 1 is left as it is"))
    arguments = RepairArguments(algorithm="prior-guided", max_steps=2, **QUICK)
    assert repair(star(), tokenizer, FOCUSED, arguments).steps


def test_an_adapter_that_does_not_reach_the_band_falls_back_and_says_so(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    model = star(target_modules=["layers.1.mlp.down_proj", "layers.2.mlp.down_proj"])
    report = repair(model, tokenizer, FOCUSED, RepairArguments(learning_rate=0.05, **QUICK))
    assert report.num_solved == len(report.failures)
    (problem,) = report.problems
    assert problem.warnings == ["The adapter does not reach the layers in which a push at the focus acts."]
    assert {act["how"] for act in problem.acts} == {"failing position"}


def test_a_push_that_does_not_hold_up_is_taken_back(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    plain, pushed = star(num_layers=1), star(num_layers=1)
    width = plain.get_base_model().config.hidden_size
    monkeypatch.setattr(focused, "find_targets", lambda *args: [torch.zeros(1, width)] * len(args[3]))
    arguments = RepairArguments(learning_rate=0.05, **QUICK)
    repair(plain, tokenizer, ROWS, arguments)
    report = repair(pushed, tokenizer, FOCUSED, arguments)
    (problem,) = report.problems
    assert problem.warnings == ["A push at the focus did not help, so the failing tokens were pushed instead."]
    mine, theirs = (
        {name: value for name, value in model.state_dict().items() if "star_" in name} for model in (pushed, plain)
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_interrupt_while_pushing_the_focus_leaves_the_model_as_it_was(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    model = star(num_layers=1)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(band.Band, "spread", stop)
    with pytest.raises(RepairInterrupted) as error:
        repair(model, tokenizer, FOCUSED, RepairArguments(learning_rate=0.05, **QUICK))
    assert error.value.report.interrupted and not error.value.report.layers
    assert not any(value.any() for name, value in model.state_dict().items() if "star_delta" in name)


def test_a_focus_is_looked_for_behind_other_texts_too(tokenizer):
    (row,) = encode_rows([{"prompt": "w5 w9 w11 w12", "completion": " w20", "focus": "w9 w11"}], tokenizer)

    class Given:
        class subject:
            pass

    Given.subject.tokenizer = tokenizer
    named = band.Named.of(Given, row, slice(0, 1))
    for site, count in ((named.site, len(band.FRONT)), (named.searched, band.SEARCHED)):
        assert [version.prompt_ids[places[0]] for version, places in zip(site.rows, site.positions)] == [
            row.prompt_ids[2]
        ] * count
    assert named.site.rows[0].prompt_ids == row.prompt_ids


def test_what_the_focus_solved_is_counted_once(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    heard = []

    class Counting(RepairCallback):
        def on_step_end(self, args, state):
            heard.append((state.num_solved, state.num_failures))

    model = star(num_layers=1, num_neurons=32)
    rows = [*FOCUSED, {"prompt": "w50 w51", "completion": " w52 w53 w54"}]
    arguments = RepairArguments(learning_rate=0.05, **QUICK)
    report = repair(model, tokenizer, rows, arguments, callbacks=[Counting()])
    assert report.num_solved == len(report.failures) == heard[-1][0]
    # the push at the focus solves some and leaves the row without one
    assert 0 < heard[0][0] < heard[0][1]
    assert len(heard) > 1 and all(solved <= failures for solved, failures in heard)


def test_what_a_push_costs_elsewhere_is_told_of_its_row(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    costs = {}
    monkeypatch.setattr(band.Band, "_fisher", lambda reader: torch.eye(reader.model.config.hidden_size).double())
    monkeypatch.setattr(Journal, "cost", lambda journal, slot, amount: costs.update({slot: amount}))
    arguments = RepairArguments(reach="prompt", learning_rate=0.05, **QUICK)
    report = repair(star(num_layers=1, num_neurons=32), tokenizer, FOCUSED, arguments)
    assert report.num_solved == len(report.failures)
    # each row's at its first failing token; the model is not a trained one, so nothing else has a cost
    firsts, start = [], 0
    for number, row in enumerate(encode_rows(FOCUSED, tokenizer)):
        position = next(failure.position for failure in report.failures if failure.row == number)
        firsts.append(start + position + 1 - len(row.prompt_ids))
        start += len(row.completion_ids)
    assert sorted(costs) == firsts and all(amount > 0 for amount in costs.values())


def test_a_focus_with_nothing_to_protect(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    row = {"prompt": "w9", "completion": " w20", "focus": "w9"}
    report = repair(star(num_layers=1), tokenizer, [row], RepairArguments(background=0, learning_rate=0.05, **QUICK))
    assert report.failures and report.num_solved == len(report.failures)


def test_what_is_still_wanting_is_asked_for_more(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    monkeypatch.setattr(focused, "MORE", 10.0)
    found, asked = focused.find_targets, []

    def weak(*args):
        first, second = found(*args)
        return [1e-3 * first, second]

    spread = band.Band.spread

    def watched(self, layers, named, targets, *args):
        asked.append(targets.norm(dim=-1))
        return spread(self, layers, named, targets, *args)

    monkeypatch.setattr(focused, "find_targets", weak)
    monkeypatch.setattr(band.Band, "spread", watched)
    repair(star(num_layers=1, num_neurons=32), tokenizer, FOCUSED, RepairArguments(learning_rate=0.05, **QUICK))
    assert len(asked) == focused.ROUNDS
    torch.testing.assert_close(asked[1][0], 10 * asked[0][0])


def protected_parts(monkeypatch):
    """What is protected in each solve from now on."""
    parts, plain = [], band.shielded

    def watched(values, part, ridge):
        parts.append(part)
        return plain(values, part, ridge)

    monkeypatch.setattr(band, "shielded", watched)
    return parts


def test_what_retained_rows_show_is_protected(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    parts = protected_parts(monkeypatch)
    arguments = RepairArguments(background=0, learning_rate=0.05, **QUICK)
    repair(star(num_layers=1), tokenizer, FOCUSED, arguments)
    assert parts[0] is None
    parts.clear()
    repair(star(num_layers=1), tokenizer, FOCUSED, arguments, retain=RETAIN)
    (row,) = encode_rows(RETAIN, tokenizer)
    assert len(parts[0]) == len(row)


def test_what_stands_beside_the_focus_and_other_names_there_are_protected(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    monkeypatch.setattr(namesakes, "names", lambda: ["w60", "w61"])
    parts = protected_parts(monkeypatch)
    row = {"prompt": "w5 w9 w11 w12", "completion": " w20", "focus": "w9 w11"}
    arguments = RepairArguments(background=16, learning_rate=0.05, **QUICK)
    repair(star(num_layers=1), tokenizer, [row], arguments)
    fronts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in band.FRONT[: band.SEARCHED]]
    beside = sum(len(ids) + 3 for ids in fronts)  # the row's four tokens but for its focus
    assert len(parts[0]) == 16 + beside + namesakes.EACH


def spread_by(tokenizer, monkeypatch, replaying):
    """The deltas of pushes spread over three of six layers, and how many layers all of that ran."""
    monkeypatch.setattr(focused, "BAND", (1 / 6, 3 / 6))
    monkeypatch.setattr(band, "replays_exactly", lambda model, lowest: replaying)
    config = StarConfig(task_type="CAUSAL_LM", num_neurons=32, num_layers=1)
    model, ran = get_peft_model(decided(num_hidden_layers=6), config), []
    for number in range(6):
        attention = model.base_model.model.get_submodule(f"model.layers.{number}.self_attn")
        attention.register_forward_hook(lambda module, args, output: ran.append(module))
    repair(model, tokenizer, FOCUSED, RepairArguments(learning_rate=0.05, **QUICK))
    return {name: value.clone() for name, value in model.state_dict().items() if "star_" in name}, len(ran)


def test_what_is_replayed_below_the_band_changes_nothing(tokenizer, monkeypatch):
    """The same deltas as with every site read in full, by fewer layers."""
    (replayed, fewer), (full, more) = (spread_by(tokenizer, monkeypatch, exact) for exact in (True, False))
    assert replayed.keys() == full.keys() and fewer < more
    assert all(any(f"layers.{number}." in name for name in full) for number in (1, 2, 3))
    for name, value in full.items():
        torch.testing.assert_close(replayed[name], value)
