"""Protected patching against dense least squares, and what a repair by it promises."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_star import RepairArguments, StarConfig, repair
from peft_star.engine.predictions import Predictions
from peft_star.failures import Row, encode_rows
from peft_star.method import bystanders, growth, protected
from peft_star.method.background import background_text
from peft_star.method.best import keeping_best
from peft_star.method.objective import Goal, Task
from peft_star.method.protected import LIMIT
from peft_star.method.pushes import RIDGE, Protection
from peft_star.method.solve import protected_answer
from peft_star.method.subject import HeldLayer
from peft_star.models.structure import find_second_matrices
from support.dense import answer_by_hand, moment
from support.rows import contexts_by_hand
from support.words import (
    LAYERS,
    MANY,
    QUICK,
    ROWS,
    decided,
    dense_delta,
    own_continuations,
    read_row,
    running,
    star,
    word_tokenizer,
    wrong_tokens,
)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


# what is protected


def test_without_background_nothing_is_protected(tokenizer):
    located = dict.fromkeys(LAYERS[:2], torch.tensor([3, 5]))
    for background, protects in ((0, False), (100, True)):
        with running(star(), tokenizer, background=background, reach="prompt") as run:
            layers, protection = protected.solve(run, located, None)
        factors = protection.factors
        assert [layer.name for layer in layers] == LAYERS[:2]
        assert all(layer.neurons.tolist() == [3, 5] for layer in layers)
        assert [factor is not None for factor in factors] == [protects] * 2


# a step of a repair, against autograd on the plain model


def references(base, rows, name):
    """V (n, m), ∂L/∂o (n, d) and semantic deltas (n, d) up to their norm, failure by failure."""
    kept = {}
    module = find_second_matrices(base)[name]
    handle = module.register_forward_hook(lambda m, args, output: kept.update(v=args[0], o=output))
    basis = torch.linalg.pinv(base.lm_head.weight.detach().double()).T
    v, gradients, semantics = [], [], []
    for row in rows:
        logits = base(input_ids=torch.tensor([row.input_ids])).logits[0]
        positions, expected = list(row.medium_positions), row.completion_ids
        failing = [(p, t) for p, t in zip(positions, expected) if logits[p].argmax() != t]
        loss = sum(-logits[p].log_softmax(-1)[t] for p, t in failing)
        (gradient,) = torch.autograd.grad(loss, kept["o"])
        for p, t in failing:
            v.append(kept["v"][0, p].detach().double())
            gradients.append(gradient[0, p].double())
            semantics.append(basis[logits[p].argmax()] - basis[t])
    handle.remove()
    return torch.stack(v), torch.stack(gradients), torch.stack(semantics)


def delta_of(model, name):
    layer = model.base_model.model.get_submodule(name)
    neurons = layer.star_neurons["default"].long()
    return neurons, layer.star_delta["default"].detach()


@pytest.mark.parametrize("reach", ["prompt", "problem"])
@pytest.mark.parametrize(("background", "generalization"), [(0, 0.0), (150, 0.0), (0, 2.0), (150, 2.0)])
def test_one_step_is_a_strength_of_each_failure_times_the_dense_solution(
    background, generalization, reach, tiny_tokenizer
):
    """delta = P diag(c) T with nothing free but the strengths c, which are at least 0 and one for all layers.

    With `reach="problem"` the ridge is larger, and the rows' other tokens are protected, too.
    """
    sizes = {"vocab_size": len(tiny_tokenizer)}
    config = StarConfig(task_type="CAUSAL_LM", num_neurons=8, num_layers=1.0)
    model = get_peft_model(decided(**sizes), config)
    failures = [{"prompt": "parse(", "completion": "xy"}, {"prompt": "open the", "completion": " d"}]
    arguments = RepairArguments(
        max_steps=1, background=background, generalization=generalization, reach=reach, **QUICK
    )
    repair(model, tiny_tokenizer, failures, arguments)
    rows = encode_rows(failures, tiny_tokenizer)
    left, right = [], []
    for name in LAYERS:
        neurons, delta = delta_of(model, name)
        v, gradients, semantics = references(decided(**sizes), rows, name)
        v = v[:, neurons]
        beside = read_beside(decided(**sizes), rows, name)[:, neurons].double()
        protection = torch.eye(len(neurons), dtype=v.dtype)
        if background:
            shown = read_background(decided(**sizes), name, tiny_tokenizer, background)
            others = [beside] if reach == "problem" else []
            protection = moment(shown[:, neurons].double(), *others)
        targets = -(semantics / semantics.std(1, keepdim=True, correction=0)).abs() * gradients.sign()
        contexts = None
        if generalization:
            contexts = contexts_by_hand(decided(**sizes), rows, neurons)[name].double()
        answer = answer_by_hand(v, protection, RIDGE, contexts, generalization)
        # what a push of strength 1 of each failure makes of the delta
        pushes = [torch.outer(column, target).flatten() for column, target in zip(answer.T, targets)]
        left.append(torch.stack(pushes, 1))
        right.append(delta.double().flatten())
    left, right = torch.cat(left), torch.cat(right)
    strengths = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    assert (left @ strengths - right).norm() < 1e-3 * right.norm()
    assert (strengths > 0).all() and strengths.max() <= RepairArguments().learning_rate * LIMIT * (1 + RIDGE)


def read_beside(base, rows, name):
    """Activations (N, m) at the rows' tokens that are not in front of a wrong one."""
    shown = []
    for row in rows:
        inputs, said = read_row(base, name, row)
        wrong = {p for p, token in zip(row.medium_positions, row.completion_ids) if said[p] != token}
        shown.append(inputs[[p for p in range(len(row.input_ids)) if p not in wrong]])
    return torch.cat(shown)


@torch.no_grad()
def read_background(base, name, tokenizer, tokens):
    ids = torch.tensor(tokenizer(background_text(), add_special_tokens=False)["input_ids"][:tokens])
    shown = []
    find_second_matrices(base)[name].register_forward_pre_hook(lambda module, args: shown.append(args[0][0]))
    for window in ids.split(base.config.max_position_embeddings):
        base(input_ids=window[None])
    return torch.cat(shown)


# the steps, with a model that says what it is told


def scripted(states, monkeypatch, learning_rate=1.0):
    """Steps on one neuron and two failures: after each step's pushes, so many are right and so many broken."""
    medium, before = torch.tensor([0, 1]), told(0, 0)
    steps, delta = [], nn.Parameter(torch.zeros(1, 2))
    traced = SimpleNamespace(
        medium=medium,
        predictions=before,
        rows=lambda: [Row(number, "", "", (0,), (0,)) for number in range(2)],
        hidden_rms={"decoder layer": None},
        gradients=lambda name: torch.full((2, 2), -1.0),
        activations=lambda name, neurons: V,
    )
    goal = SimpleNamespace(
        batches=(),
        task=Task.of(medium, before, 0.01),
        before=before,
        look=lambda engine: (told(*states[len(steps)]), 1.0),
        look_at_the_rest=lambda engine, here: (here, ()),
        watching=lambda batches: goal,
    )
    run = SimpleNamespace(
        args=RepairArguments(
            learning_rate=learning_rate, max_steps=len(states), ridge=1e-4, norm="max", reach="prompt"
        ),
        # tokens 0 and 1, whose semantic delta is 1 in both features
        subject=SimpleNamespace(
            decoder_of={"layer": "decoder layer"}, bases=lambda tokens: tokens.double()[:, None].expand(-1, 2)
        ),
        engine=None,
        probe=lambda names: None,
    )
    monkeypatch.setattr(protected, "trace", lambda engine, batches, probe, **slots: traced)
    journal = SimpleNamespace(step=lambda step, solved, loss: steps.append(delta.detach().clone()))
    with keeping_best([delta], goal.task, before, journal) as best:
        layer = HeldLayer("layer", delta, torch.tensor([0]))
        protected.patch(run, goal, [layer], Protection([None], [None]), traced, best)
    return best.predictions, delta.detach(), steps


V = torch.tensor([[1.0], [2.0]])


def told(right, broken):
    """Two failures, of which `right` are right now, and two tokens that were right, of which `broken` are wrong."""
    fine = torch.arange(2) < right, torch.arange(2) >= broken
    gap = torch.where(torch.cat(fine), 3.0, -3.0)
    p = gap.sigmoid()
    return Predictions(torch.zeros(4).long(), (gap < 0).long(), torch.ones(4).long(), 2 * p - 1, gap, p)


@pytest.mark.parametrize(
    ("states", "best"),
    [
        ([(1, 0), (0, 0), (0, 0)], 0),
        ([(0, 0), (1, 1), (0, 0)], 1),
        ([(1, 1), (1, 2), (1, 0)], 2),
        ([(1, 0), (2, 2), (1, 0)], 1),
        ([(1, 1), (1, 1), (1, 1)], 0),
    ],
)
def test_when_the_steps_run_out_the_best_state_is_kept(states, best, monkeypatch):
    kept, delta, steps = scripted(states, monkeypatch)
    assert len(steps) == 3
    assert task_score(kept) == (states[best][0], -states[best][1])
    assert torch.equal(delta, steps[best])
    assert all(not torch.equal(steps[best], other) for number, other in enumerate(steps) if number != best)


def task_score(predictions):
    return int(predictions.right[:2].sum()), -int((~predictions.right[2:]).sum())


def test_it_stops_as_soon_as_all_is_solved(monkeypatch):
    kept, delta, steps = scripted([(1, 0), (2, 0), (0, 2)], monkeypatch)
    assert len(steps) == 2 and task_score(kept) == (2, 0) and torch.equal(delta, steps[-1])


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3])
def test_the_learning_rate_bounds_the_pushes_of_a_step(learning_rate, monkeypatch):
    """All of what is allowed is asked for here, and not more is given."""
    _, _, steps = scripted([(0, 0), (0, 0), (0, 0)], monkeypatch, learning_rate)
    targets = torch.ones(2, 2, dtype=torch.float64)
    most = protected_answer(V, None, RIDGE) @ (learning_rate * LIMIT * (1 + RIDGE) * targets)
    torch.testing.assert_close(steps[0].double(), most, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(steps[1].double(), 2 * most, rtol=1e-4, atol=1e-7)
    # what is left behind the first steps is pushed for itself
    alone = protected_answer(V, None, 1e-4) @ (learning_rate * LIMIT * (1 + 1e-4) * targets)
    torch.testing.assert_close(steps[2].double(), 2 * most + alone, rtol=1e-4, atol=1e-7)


# repairs


def test_retained_tokens_that_break_are_made_right_again_or_said(tokenizer):
    arguments = RepairArguments(background=0, **QUICK)
    careless = star()
    assert repair(careless, tokenizer, ROWS, arguments).success
    rows = own_continuations(tokenizer)
    whole, total, without = 0, 0, 0
    for start in range(0, 12, 3):
        retained = rows[start : start + 3]
        assert wrong_tokens(decided(), tokenizer, retained) == 0
        broken = wrong_tokens(careless, tokenizer, retained)
        assert broken >= 3
        model = star()
        report = repair(model, tokenizer, ROWS, arguments, retain=retained)
        left = wrong_tokens(model, tokenizer, retained)
        # what is still wrong is said, whatever it is
        assert left == len([token for token in report.broken if token.source == "retain"])
        assert report.success == (left == 0 and not report.broken and report.num_solved == len(report.failures))
        whole, total, without = whole + report.success, total + left, without + broken
        if report.success:
            assert report.steps > 1
    assert whole >= 1 and total < without / 3


def test_retained_rows_that_break_are_watched_from_then_on(tokenizer, monkeypatch):
    """Until then they are looked at only when all seems done; so are those that stay right."""
    arguments = RepairArguments(background=0, max_batch_tokens=8, **QUICK)
    careless = star()
    repair(careless, tokenizer, ROWS, arguments)
    fine = [row for row in own_continuations(tokenizer, length=1) if not wrong_tokens(careless, tokenizer, [row])]
    retained = [own_continuations(tokenizer)[0], *fine[:4]]
    watched, rests = [], []
    look, look_at_the_rest = Goal.look, Goal.look_at_the_rest

    def counted_look(goal, engine):
        watched.append(len(goal.batches))
        return look(goal, engine)

    def counted_rest(goal, engine, here):
        now, broken = look_at_the_rest(goal, engine, here)
        rests.append((len(watched), len(goal.unwatched), len(broken)))
        return now, broken

    monkeypatch.setattr(Goal, "look", counted_look)
    monkeypatch.setattr(Goal, "look_at_the_rest", counted_rest)
    assert repair(star(), tokenizer, ROWS, arguments, retain=retained).success
    assert len(rests) > 1 and watched[0] == 2
    own, unwatched = watched[0], len(retained)
    for (looks, rest, broken), (following, *_) in zip(rests, [*rests[1:], (len(watched),)]):
        assert rest == unwatched
        own, unwatched = own + broken, unwatched - broken
        assert set(watched[looks:following]) <= {own}
    assert own > 2 and unwatched > 0


def test_a_retained_row_that_contradicts_a_failure_is_reported(tokenizer):
    base = decided()
    ids = tokenizer(ROWS[1]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = base(input_ids=ids).logits[0, -1].argmax()
    # another text of the same tokens, or it would be refused
    retained = [{"prompt": ROWS[1]["prompt"].replace(" ", "  "), "completion": f" {tokenizer.decode(said)}"}]
    report = repair(star(), tokenizer, ROWS[1:], RepairArguments(max_steps=3, **QUICK), retain=retained)
    assert not report.success and report.steps == 3
    # failures come first
    assert report.num_solved == len(report.failures) == 1
    assert [token.source for token in report.broken] == ["retain"]


def test_without_a_solution_the_state_that_is_kept_is_the_one_reported(tokenizer):
    model = star()
    report = repair(model, tokenizer, MANY, RepairArguments(max_steps=2, **QUICK))
    assert report.steps == 2 and 0 < report.num_solved < len(report.failures) and not report.success
    assert wrong_tokens(model, tokenizer, MANY) == len(report.failures) - report.num_solved + len(report.broken)


def test_a_higher_margin_asks_for_a_surer_token(tokenizer):
    for margin in (0.0, 0.5, 0.95):
        report = repair(star(), tokenizer, ROWS[1:], RepairArguments(margin=margin, **QUICK))
        assert report.success and all(failure.gap_after > margin for failure in report.failures)


def test_pushes_are_no_stronger_than_needed(tokenizer):
    """Solved with a margin of 0.01, no failure ends up sure."""
    for row in ROWS:
        report = repair(star(), tokenizer, [row], RepairArguments(**QUICK))
        assert report.success
        careful = max(failure.gap_after for failure in report.failures)
        assert careful < 0.9


def test_deltas_in_layers_that_are_no_longer_chosen_are_kept_to_the_bit(tokenizer):
    model = star(layer_selection="all")
    first = repair(model, tokenizer, ROWS[:1], RepairArguments(**QUICK))
    before = {name: dense_delta(model, name) for name in LAYERS}
    assert first.success and all(value.any() for value in before.values())
    config = model.peft_config["default"]
    config.layer_selection, config.num_layers = "last", 1
    second = repair(model, tokenizer, ROWS[1:], RepairArguments(**QUICK), retain=ROWS[:1])
    assert second.success and second.failures
    for name in LAYERS[:2]:
        assert torch.equal(dense_delta(model, name), before[name])
    assert not torch.equal(dense_delta(model, LAYERS[2]), before[LAYERS[2]])
    # neurons that were patched before and are not located now keep their delta's row, too, or are built upon
    assert wrong_tokens(model, tokenizer, ROWS) == 0


@pytest.mark.parametrize("algorithm", ["protected", "prior-guided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_solved_saved_and_loaded(algorithm, dtype, tokenizer, tmp_path):
    config = StarConfig(task_type="CAUSAL_LM", num_neurons=8, num_layers=1.0)
    model = get_peft_model(decided(dtype=dtype), config)
    arguments = RepairArguments(algorithm=algorithm, max_steps=40, learning_rate=0.05, norm="rms", disable_tqdm=True)
    report = repair(model, tokenizer, ROWS, arguments)
    assert report.failures and report.num_solved == len(report.failures)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(decided(dtype=dtype), tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


# how far it reaches


@torch.no_grad()
def before_and_now(model, row):
    """Log-probabilities (T, V) in a row without the patch and with it."""
    ids = torch.tensor([row.input_ids])
    with model.disable_adapter():
        before = model(input_ids=ids).logits[0].log_softmax(-1)
    return before, model(input_ids=ids).logits[0].log_softmax(-1)


def words_lost(model, tokenizer, rows):
    """Of the model's own words beside the failures the largest loss of probability, by plain forwards."""
    lost = []
    for row in encode_rows(rows, tokenizer):
        before, now = (log_p.exp() for log_p in before_and_now(model, row))
        said = before.argmax(-1, keepdim=True)
        failing = {p for p, token in zip(row.medium_positions, row.completion_ids) if said[p, 0] != token}
        wrong = {int(said[p, 0]) for p in failing}
        beside = [p for p in range(len(row.input_ids)) if p not in failing and int(said[p, 0]) not in wrong]
        lost.append((before - now).gather(-1, said)[beside].max().item())
    return max(lost)


def deltas(model):
    return [layer.star_delta["default"] for layer in model.modules() if "default" in getattr(layer, "star_delta", {})]


def test_a_patch_for_the_problem_grows_by_the_largest_factor_that_disturbs_no_bystander(tokenizer, monkeypatch):
    arguments = RepairArguments(**QUICK)
    assert arguments.reach == "problem"
    monkeypatch.setattr(bystanders, "FEWEST", 1)
    monkeypatch.setattr(growth, "GROWTH", ())
    plain = star()
    assert repair(plain, tokenizer, ROWS, arguments).success
    start = [delta.detach().clone() for delta in deltas(plain)]
    lost = {}
    for factor in (1.2, 1.3, 1.5, 2.0, 3.0):
        with torch.no_grad():
            for delta, origin in zip(deltas(plain), start):
                delta.copy_(factor * origin)
        lost[factor] = words_lost(plain, tokenizer, ROWS)
    assert lost[1.2] < lost[1.3] < lost[1.5] < lost[2.0] < lost[3.0]
    monkeypatch.setattr(growth, "GROWTH", tuple(lost))
    # the last would do with three times the patch, but that breaks tokens of the rows
    for limit, factor in (lost[1.2] / 2, 1.0), (lost[1.3] + 1e-3, 1.3), ((lost[1.5] + lost[2.0]) / 2, 1.5), (1.0, 1.0):
        monkeypatch.setattr(bystanders, "LOSS", limit)
        model = star()
        assert repair(model, tokenizer, ROWS, arguments).success
        for delta, origin in zip(deltas(model), start):
            torch.testing.assert_close(delta.detach(), factor * origin, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reach", ["prompt", "problem"])
def test_at_retained_tokens_the_neurons_answer_less(reach, tokenizer):
    """Also where nothing would have broken: they are part of the solve."""
    arguments = RepairArguments(reach=reach, **QUICK)
    plain, careful = star(), star()
    repair(plain, tokenizer, ROWS, arguments)
    retained = [row for row in own_continuations(tokenizer, length=1) if not wrong_tokens(plain, tokenizer, [row])][:5]
    assert repair(careful, tokenizer, ROWS, arguments, retain=retained).success
    moved = []
    for model in (plain, careful):
        total = 0.0
        for row in encode_rows(retained, tokenizer):
            before, now = before_and_now(model, row)
            total += float((before.exp() * (before - now)).sum(-1).mean())
        moved.append(total)
    assert moved[1] < moved[0]
