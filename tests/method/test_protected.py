"""Protected patching against dense least squares, and what a repair by it promises."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn

from peft_star import RepairArguments, RepairCallback, RepairInterrupted, StarConfig, repair
from peft_star.engine.batch import make_batches
from peft_star.engine.distributed import ALONE
from peft_star.engine.passes import teacher_forced
from peft_star.engine.predictions import Predictions
from peft_star.failures import encode_rows
from peft_star.method.background import background_text
from peft_star.method.objective import Task
from peft_star.method.protected import FLOOR, REACH, SteeredLayer, protected_answer, steer_neurons
from peft_star.models.structure import find_second_matrices
from support.rows import contexts_by_hand
from support.tiny_models import VOCAB
from support.words import RETAIN, ROWS, decided, star, word_tokenizer

LAYERS = [f"model.layers.{index}.mlp.down_proj" for index in range(3)]
QUICK = {"disable_tqdm": True, "verify_generation": False}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def problem(n, k, d, seed=0, background=30):
    generator = torch.Generator().manual_seed(seed)
    # neurons of different sizes that move together, as real ones do
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) + torch.eye(k)
    v, b = (torch.randn(size, k, generator=generator, dtype=torch.float64) @ mix for size in (n, background))
    return v, b, torch.randn(n, d, generator=generator, dtype=torch.float64)


def moment(background):
    """C + ε I, as the documentation says."""
    c = sum(torch.outer(row, row) for row in background) / len(background)
    return c + FLOOR * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)


def dense(v, targets, protection, ridge):
    """argmin_W ‖V W − T‖² + λ tr(Wᵀ M W), as one stacked least squares problem in the entries of W."""
    k = v.shape[1]
    penalty = ridge * (v @ torch.linalg.inv(protection) @ v.T).trace() / min(v.shape)
    values, vectors = torch.linalg.eigh(protection)
    root = vectors @ torch.diag((penalty * values).sqrt()) @ vectors.T
    left = torch.cat([v, root])
    right = torch.cat([targets, torch.zeros(k, targets.shape[1], dtype=v.dtype)])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution


def answer_by_hand(v, protection, ridge, contexts=None, weight=0.0):
    """P: neurons combined as for the averages X, mixed such that V P is the identity."""
    eye = torch.eye(len(v), dtype=v.dtype)
    if contexts is None:
        return dense(v, eye, protection, ridge)
    combined = torch.linalg.inv(protection) @ ((v + weight * contexts) / (1 + weight)).T
    return combined @ dense(v @ combined, eye, eye, ridge)


def steered(background):
    k = background.shape[1]
    return SteeredLayer("layer", nn.Parameter(torch.zeros(k, 2)), torch.arange(k), background)


# the solution


def test_the_factor_is_that_of_the_second_moment_with_its_floor():
    _, background, _ = problem(2, 7, 3)
    factor = steered(background.float()).factor()
    assert factor.dtype == torch.float64 and factor.triu(1).abs().max() == 0
    torch.testing.assert_close(factor @ factor.T, moment(background), rtol=1e-5, atol=1e-5)
    assert SteeredLayer("layer", nn.Parameter(torch.zeros(7, 2)), torch.arange(7), None).factor() is None


def test_neurons_that_the_background_never_shows_are_not_free():
    _, background, _ = problem(1, 6, 2)
    background[:, 2] = 0
    factor = steered(background).factor()
    assert (factor @ factor.T)[2, 2] == pytest.approx(FLOOR * background.square().mean().item())
    assert torch.isfinite(steered(torch.zeros(5, 6)).factor()).all()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 10),
    k=st.integers(1, 10),
    d=st.integers(1, 4),
    ridge=st.sampled_from([1e-4, 1e-2, 1.0]),
    seed=st.integers(0, 99),
    protected=st.booleans(),
)
def test_the_answer_is_the_dense_minimiser(n, k, d, ridge, seed, protected):
    v, background, targets = problem(n, k, d, seed)
    strengths = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    protection = moment(background) if protected else torch.eye(k, dtype=v.dtype)
    answer = protected_answer(v, steered(background).factor() if protected else None, ridge)
    assert answer.shape == (k, n) and answer.dtype == torch.float64
    # one answer serves all strengths
    wanted = dense(v, strengths * targets, protection, ridge)
    torch.testing.assert_close(answer @ (strengths * targets), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max())


def test_protection_moves_the_background_less_for_the_same_push():
    v, background, targets = problem(2, 12, 3)
    plain, protected = (protected_answer(v, factor, 1e-6) for factor in (None, steered(background).factor()))
    for answer in (plain, protected):
        torch.testing.assert_close(v @ answer @ targets, targets, rtol=1e-3, atol=1e-3)
    assert (background @ protected @ targets).norm() < 0.6 * (background @ plain @ targets).norm()


@pytest.mark.parametrize(("n", "k"), [(3, 9), (6, 6), (9, 4)])
@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("weight", [0.5, 5.0])
def test_with_contexts_each_failure_gets_its_own_push(n, k, protected, weight):
    v, background, _ = problem(n, k, 1, seed=3)
    contexts = v * 0.7 + problem(n, k, 1, seed=4)[0] * 0.3
    factor = steered(background).factor() if protected else None
    answer = protected_answer(v, factor, 1e-4, contexts, weight)
    protection = moment(background) if protected else torch.eye(k, dtype=v.dtype)
    wanted = answer_by_hand(v, protection, 1e-4, contexts, weight)
    torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-6)
    if n <= 3:
        torch.testing.assert_close(v @ answer, torch.eye(n, dtype=v.dtype), rtol=0, atol=0.02)


def test_failures_whose_contexts_look_like_each_other_get_their_own_pushes():
    v, _, _ = problem(2, 8, 1)
    answer = protected_answer(v, None, 1e-4, v.flip(0), 100.0)
    torch.testing.assert_close(v @ answer, torch.eye(2, dtype=v.dtype), rtol=0, atol=0.01)


def test_without_contexts_nothing_is_averaged_or_scaled():
    v, background, _ = problem(3, 7, 1)
    factor = steered(background).factor()
    torch.testing.assert_close(
        protected_answer(v, factor, 1e-2), protected_answer(v, factor, 1e-2, None, generalization=5.0)
    )


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


def dense_delta(model, name):
    layer = model.base_model.model.get_submodule(name)
    return layer.get_delta_weight("default").detach().clone()


@pytest.mark.parametrize(("background", "generalization"), [(0, 0.0), (150, 0.0), (0, 2.0), (150, 2.0)])
def test_one_step_is_a_strength_of_each_failure_times_the_dense_solution(background, generalization, tiny_tokenizer):
    """delta = P diag(c) T with nothing free but the strengths c, which are at least 0 and one for all layers."""
    sizes = {"vocab_size": len(tiny_tokenizer)}
    config = StarConfig(task_type="CAUSAL_LM", num_neurons=8, num_layers=1.0)
    model = get_peft_model(decided(**sizes), config)
    failures = [{"prompt": "parse(", "completion": "xy"}, {"prompt": "open the", "completion": " d"}]
    ridge = 1e-3
    arguments = RepairArguments(
        max_steps=1, ridge=ridge, background=background, generalization=generalization, **QUICK
    )
    repair(model, tiny_tokenizer, failures, arguments)
    rows = encode_rows(failures, tiny_tokenizer)
    left, right = [], []
    for name in LAYERS:
        neurons, delta = delta_of(model, name)
        v, gradients, semantics = references(decided(**sizes), rows, name)
        v = v[:, neurons]
        protection = torch.eye(len(neurons), dtype=v.dtype)
        if background:
            shown = read_background(decided(**sizes), name, tiny_tokenizer, background)
            protection = moment(shown[:, neurons].double())
        targets = -(semantics / semantics.std(1, keepdim=True, correction=0)).abs() * gradients.sign()
        contexts = None
        if generalization:
            contexts = contexts_by_hand(decided(**sizes), rows, neurons)[name].double()
        answer = answer_by_hand(v, protection, ridge, contexts, generalization)
        # what a push of strength 1 of each failure makes of the delta
        pushes = [torch.outer(column, target).flatten() for column, target in zip(answer.T, targets)]
        left.append(torch.stack(pushes, 1))
        right.append(delta.double().flatten())
    left, right = torch.cat(left), torch.cat(right)
    strengths = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    assert (left @ strengths - right).norm() < 1e-3 * right.norm()
    assert (strengths > 0).all() and strengths.max() <= RepairArguments().learning_rate * REACH


@torch.no_grad()
def read_background(base, name, tokenizer, tokens):
    ids = torch.tensor(tokenizer(background_text(), add_special_tokens=False)["input_ids"][:tokens])
    shown = []
    find_second_matrices(base)[name].register_forward_pre_hook(lambda module, args: shown.append(args[0][0]))
    for window in ids.split(base.config.max_position_embeddings):
        base(input_ids=window[None])
    return torch.cat(shown)


# the steps, with a model that says what it is told


def scripted(states, learning_rate=1.0):
    """steer_neurons on one neuron and two failures: after each step's pushes, so many are right and so many broken."""
    medium, before = torch.tensor([0, 1]), told(0, 0)
    steps, delta = [], nn.Parameter(torch.zeros(1, 2))
    traced = SimpleNamespace(
        medium=medium,
        predictions=before,
        team=ALONE,
        gradients=lambda name: torch.full((2, 2), -1.0),
        activations=lambda name, neurons: V,
        contexts=lambda name, neurons: None,
    )
    kept = steer_neurons(
        [SteeredLayer("layer", delta, torch.tensor([0]), None)],
        traced,
        Task.of(medium, before, 0.01),
        lambda: (told(*states[len(steps)]), 1.0),
        lambda slots: traced,
        lambda trace, layer: torch.ones(2, 2, dtype=torch.float64),
        learning_rate=learning_rate,
        max_steps=len(states),
        ridge=1e-4,
        on_step=lambda step, solved, loss: steps.append(delta.detach().clone()),
    )
    return kept, delta.detach(), steps


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
def test_when_the_steps_run_out_the_best_state_is_kept(states, best):
    kept, delta, steps = scripted(states)
    assert len(steps) == 3
    assert task_score(kept) == (states[best][0], -states[best][1])
    assert torch.equal(delta, steps[best])
    assert all(not torch.equal(steps[best], other) for number, other in enumerate(steps) if number != best)


def task_score(predictions):
    return int(predictions.right[:2].sum()), -int((~predictions.right[2:]).sum())


def test_it_stops_as_soon_as_all_is_solved():
    kept, delta, steps = scripted([(1, 0), (2, 0), (0, 2)])
    assert len(steps) == 2 and task_score(kept) == (2, 0) and torch.equal(delta, steps[-1])


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3])
def test_the_learning_rate_bounds_the_pushes_of_a_step(learning_rate):
    """All of what is allowed is asked for here, and not more is given."""
    _, _, steps = scripted([(0, 0), (0, 0)], learning_rate)
    targets = torch.ones(2, 2, dtype=torch.float64)
    most = protected_answer(V, None, 1e-4) @ (learning_rate * REACH * targets)
    torch.testing.assert_close(steps[0].double(), most, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(steps[1].double(), 2 * most, rtol=1e-4, atol=1e-7)


# repairs


def own_continuations(tokenizer, number=30, length=4, seed=0):
    """Rows that the model completes right."""
    base, rows = decided(), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        ids = torch.randint(3, VOCAB, (1, 4), generator=generator)
        for _ in range(length):
            with torch.no_grad():
                ids = torch.cat([ids, base(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if (ids > 2).all():
            rows.append({"prompt": tokenizer.decode(ids[0, :4]), "completion": " " + tokenizer.decode(ids[0, 4:])})
    return rows


def wrong_tokens(model, tokenizer, rows):
    return int((~teacher_forced(model, make_batches(encode_rows(rows, tokenizer), 500)).right).sum())


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


def test_retained_tokens_that_nothing_breaks_change_nothing(tokenizer):
    """Looked at when all is solved, they cost neither a step nor a digit."""
    arguments = RepairArguments(**QUICK)
    plain, careful = star(), star()
    repair(plain, tokenizer, ROWS, arguments)
    rows = own_continuations(tokenizer, length=1)
    fine = [row for row in rows if wrong_tokens(plain, tokenizer, [row]) == 0]
    assert 3 < len(fine) < len(rows)
    report = repair(careful, tokenizer, ROWS, arguments, retain=fine)
    assert report.success
    for name in LAYERS:
        assert torch.equal(dense_delta(plain, name), dense_delta(careful, name))


def test_a_retained_row_that_contradicts_a_failure_is_reported(tokenizer):
    base = decided()
    ids = tokenizer(ROWS[1]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = base(input_ids=ids).logits[0, -1].argmax()
    retained = [{"prompt": ROWS[1]["prompt"], "completion": f" {tokenizer.decode(said)}"}]
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


class At(RepairCallback):
    def __init__(self, step):
        self.step, self.seen = step, []

    def on_step_end(self, args, state):
        self.seen.append(state.step)
        if state.step == self.step:
            raise KeyboardInterrupt


MANY = [*ROWS, *RETAIN]  # more than a few steps solve


def after(tokenizer, max_steps, **config):
    model = star(**config)
    report = repair(model, tokenizer, MANY, RepairArguments(max_steps=max_steps, **QUICK))
    assert report.steps == max_steps and not report.success
    return {name: dense_delta(model, name) for name in LAYERS}


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupt_after_a_step_leaves_the_state_of_that_step(step, tokenizer):
    model, callback = star(), At(step)
    with pytest.raises(RepairInterrupted) as raised:
        repair(model, tokenizer, MANY, RepairArguments(**QUICK), callbacks=[callback])
    assert callback.seen == list(range(1, step + 1)) and raised.value.report.steps == step
    assert all(torch.equal(dense_delta(model, name), value) for name, value in after(tokenizer, step).items())
    report = raised.value.report
    wrong = wrong_tokens(model, tokenizer, MANY)
    assert wrong == len(report.failures) - report.num_solved + len(report.broken)


def interrupted_look(monkeypatch, after_step, look=1):
    """Ctrl-C in the given look of the step after `after_step`, when its push is already in the deltas."""
    module = importlib.import_module("peft_star.method.repair")  # as an attribute of the package it is the function
    state = {"step": 0, "looks": 0}
    real = module.forward_backward

    def forward_backward(*args, **kwargs):
        state["looks"] += 1
        if state["step"] == after_step and state["looks"] == look:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    class Count(RepairCallback):
        def on_step_end(self, args, now):
            state.update(step=now.step, looks=0)

    monkeypatch.setattr(module, "forward_backward", forward_backward)
    return Count()


@pytest.mark.parametrize("look", [1, 2])
@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupt_during_a_look_leaves_the_last_finished_step(step, look, tokenizer, monkeypatch):
    wanted = after(tokenizer, step)
    model = star()
    callback = interrupted_look(monkeypatch, step, look)
    with pytest.raises(RepairInterrupted) as raised:
        repair(model, tokenizer, MANY, RepairArguments(**QUICK), callbacks=[callback])
    assert raised.value.report.interrupted and raised.value.report.steps == step
    assert all(torch.equal(dense_delta(model, name), value) for name, value in wanted.items())


def test_an_interrupt_in_the_first_look_leaves_what_was_there_before(tokenizer, monkeypatch):
    model = star()
    assert repair(model, tokenizer, ROWS[:1], RepairArguments(**QUICK)).success
    before = {name: dense_delta(model, name) for name in LAYERS}
    assert any(value.any() for value in before.values())
    callback = interrupted_look(monkeypatch, 0)
    with pytest.raises(RepairInterrupted) as raised:
        repair(model, tokenizer, ROWS[1:], RepairArguments(**QUICK), callbacks=[callback])
    assert raised.value.report.steps == 0
    assert all(torch.equal(dense_delta(model, name), value) for name, value in before.items())


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
