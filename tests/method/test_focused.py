"""Pushes at what a row names as its focus: targets through the layers above, neurons under protection, fallbacks."""

import pytest
import torch

from peft_star import RepairArguments, RepairCallback, RepairInterrupted, repair
from peft_star.failures import Row, encode_rows
from peft_star.method import focused
from peft_star.method.background import FLOOR
from peft_star.method.focused import whitened
from peft_star.method.targets import LARGEST, Site, find_target
from support.modules import hooks
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


@pytest.mark.parametrize("rows", [3, 40])
def test_whitening_by_either_system_is_the_dense_solution(rows):
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    values = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    moment = part.T @ part
    moment += FLOOR * moment.diagonal().mean() * torch.eye(12, dtype=moment.dtype)
    torch.testing.assert_close(whitened(values, part), values @ torch.linalg.inv(moment))


def test_a_target_makes_its_completion_likelier_and_is_bounded(tokenizer):
    model = decided().requires_grad_(False)
    (row,) = encode_rows(ROWS[:1], tokenizer)
    front = Row(1, "", "", (*row.prompt_ids[:1], *row.prompt_ids), row.completion_ids)
    before = hooks(model)
    delta = find_target(model, NAMES[0], NAMES[1], Site((row, front), ((1,), (2,))), 1000)
    assert delta.shape == (1, model.config.hidden_size) and hooks(model) == before
    ids = torch.tensor([row.input_ids])
    states = []

    def add(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden[0, 1].norm())
        changed = hidden.index_put((torch.tensor([0]), torch.tensor([1])), hidden[:, 1] + delta)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def entropy():
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        return -sum(logits[p, t] for p, t in zip(row.medium_positions, row.completion_ids)).item()

    plain = entropy()
    handle = model.get_submodule(NAMES[0]).register_forward_hook(add)
    assert entropy() < plain - 0.1
    handle.remove()
    # the bound is a share of the mean size over the row as it is and behind another text
    assert delta.norm() <= LARGEST * 2 * states[0]


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
    monkeypatch.setattr(focused, "find_target", lambda *args: pytest.fail("no row has a focus"))
    report = repair(
        star(num_layers=1), tokenizer, ROWS, RepairArguments(find_focus=False, learning_rate=0.05, **QUICK)
    )
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
    monkeypatch.setattr(focused, "find_target", lambda *args: torch.zeros(1, width))
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

    monkeypatch.setattr(focused._Reader, "spread", stop)
    with pytest.raises(RepairInterrupted) as error:
        repair(model, tokenizer, FOCUSED, RepairArguments(learning_rate=0.05, **QUICK))
    assert error.value.report.interrupted and not error.value.report.layers
    assert not any(value.any() for name, value in model.state_dict().items() if "star_delta" in name)


def test_what_ends_like_the_focus_is_not_it(tokenizer):
    """The contrast: the focus without its beginning, alone and behind another text."""
    (row,) = encode_rows([{"prompt": "w5 w9 w11 w12", "completion": " w20", "focus": "w9 w11"}], tokenizer)

    class Given:
        class subject:
            pass

    Given.subject.tokenizer = tokenizer
    named = focused._named(Given, row)
    assert [version.prompt_ids[positions[0]] for version, positions in zip(named.site.rows, named.site.positions)] == [
        row.prompt_ids[2]
    ] * len(focused.FRONT)
    assert named.contrast[0] == (row.prompt_ids[2],)
    assert all(ids[-1] == row.prompt_ids[2] and row.prompt_ids[1] not in ids for ids in named.contrast)


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


def test_a_focus_with_nothing_to_protect(tokenizer, monkeypatch):
    band_of_one(monkeypatch)
    row = {"prompt": "w9", "completion": " w20", "focus": "w9"}
    report = repair(star(num_layers=1), tokenizer, [row], RepairArguments(background=0, learning_rate=0.05, **QUICK))
    assert report.failures and report.num_solved == len(report.failures)
