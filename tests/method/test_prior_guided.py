"""Algorithm 1: as an optimiser, and as a repair's."""

import copy

import pytest
import torch
from torch import nn

from peft_star import PriorGuidedSGD, RepairArguments, repair
from peft_star.method import prior_guided
from peft_star.method.semantics import semantic_delta
from peft_star.method.solve import solve_prior
from peft_star.method.trace import trace
from support.words import LAYERS, QUIET, ROWS, own_continuations, running, star, word_tokenizer, wrong_tokens


def parameter(values):
    return nn.Parameter(torch.tensor(values))


def test_algorithm_1_line_by_line():
    weight, prior, gradient = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
    param = nn.Parameter(weight.clone())
    optimizer = PriorGuidedSGD([param], lr=0.05, priors={param: prior})
    param.grad = gradient
    optimizer.step()
    f = torch.sign(gradient) * torch.sign(prior)
    u = prior * f
    torch.testing.assert_close(param.detach(), weight - 0.05 * u)


def test_where_the_gradient_is_zero_nothing_moves():
    param = parameter([1.0, 2.0])
    optimizer = PriorGuidedSGD([param], lr=1.0, priors={param: torch.tensor([3.0, 3.0])})
    param.grad = torch.tensor([0.0, -1e-30])
    optimizer.step()
    assert param.tolist() == [1.0, 5.0]


def test_every_way_of_giving_a_prior():
    params = [parameter([0.0]) for _ in range(4)]
    params[2].star_prior = torch.tensor([4.0])
    groups = [{"params": [params[0]]}, {"params": [params[1]], "prior": torch.tensor([3.0]), "lr": 1.0}]
    optimizer = PriorGuidedSGD([*groups, {"params": params[2:]}], lr=0.5, priors={params[0]: torch.tensor([-2.0])})
    for param in params:
        param.grad = torch.tensor([7.0])
    optimizer.step()
    assert [param.item() for param in params] == [-1.0, -3.0, -2.0, -0.5]


def test_a_prior_that_is_solved_after_the_optimiser_was_made_is_found():
    param = parameter([0.0])
    optimizer = PriorGuidedSGD([param], lr=1.0)
    param.star_prior = torch.tensor([2.0])
    param.grad = torch.tensor([1.0])
    optimizer.step()
    assert param.item() == -2.0


def test_parameters_without_gradient_stay():
    param = parameter([1.0])
    PriorGuidedSGD([param], lr=1.0).step()
    assert param.item() == 1.0


def test_closure_state_dict_and_schedulers():
    param = parameter([1.0, -1.0])
    optimizer = PriorGuidedSGD([param], lr=0.1, priors={param: torch.tensor([1.0, 2.0])})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    scheduler.step()
    torch.testing.assert_close(param.detach(), torch.tensor([0.9, -0.8]))

    clone = parameter(param.tolist())
    other = PriorGuidedSGD([clone], lr=0.7)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (param, clone):
        each.grad = torch.ones(2)
    optimizer.step()
    other.step()
    torch.testing.assert_close(param, clone)


def test_damping_shrinks_the_steps_of_entries_whose_gradient_turns():
    param = parameter([0.0, 0.0, 0.0])
    optimizer = PriorGuidedSGD([param], lr=1.0, priors={param: torch.tensor([1.0, 1.0, 8.0])}, damping=0.5)
    track = []
    for gradient in ([1.0, 1.0, -1.0], [1.0, -1.0, 1.0], [1.0, 0.0, 1.0], [1.0, -1.0, -1.0]):
        param.grad = torch.tensor(gradient)
        optimizer.step()
        track.append(param.tolist())
    assert track == [[-1, -1, 8], [-2, -0.5, 4], [-3, -0.5, 0], [-4, 0, 2]]


def test_growth_lengthens_the_steps_of_entries_whose_gradient_stays():
    param = parameter([0.0, 0.0])
    optimizer = PriorGuidedSGD([param], lr=1.0, damping=0.5, growth=2.0)
    track = []
    for gradient in ([1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [0.0, -1.0], [1.0, -1.0]):
        param.grad = torch.tensor(gradient)
        optimizer.step()
        track.append(param.tolist())
    assert track == [[-1, -1], [-3, -3], [-7, -2], [-7, 0], [-11, 4]]


@pytest.mark.parametrize(
    "setting", [{"damping": 0}, {"damping": 1.5}, {"damping": "half"}, {"growth": 0.9}, {"growth": float("nan")}]
)
def test_bad_factors_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PriorGuidedSGD([parameter([1.0])], **setting)


@pytest.mark.parametrize("lr", [0, -1.0, float("nan"), float("inf"), "fast"])
def test_bad_learning_rates_are_refused(lr):
    with pytest.raises(ValueError, match="lr"):
        PriorGuidedSGD([parameter([1.0])], lr=lr)


def test_priors_that_do_not_fit_are_refused():
    param = parameter([1.0, 2.0])
    with pytest.raises(ValueError, match="does not fit"):
        PriorGuidedSGD([param], priors={param: torch.ones(3)})
    with pytest.raises(ValueError, match="exactly one"):
        PriorGuidedSGD([{"params": [param, parameter([1.0])], "prior": torch.ones(2)}])


# as a repair's


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def test_located_neurons_get_priors_and_those_of_earlier_repairs_stay_as_they_are(tokenizer, monkeypatch):
    model = star()
    with running(model, tokenizer, algorithm="prior-guided", norm="l2") as run:
        (earlier, other) = run.subject.hold({name: torch.tensor([20]) for name in LAYERS[:2]})
        with torch.no_grad():
            earlier.delta.fill_(0.01)
            other.delta.fill_(0.01)
        batches = run.engine.batches(run.subject.encode(ROWS, "row"))
        traced = trace(run.engine, batches, run.probe())
        wanted = torch.tensor([4, 30])
        (layer,), (gradient,) = prior_guided.solve(run, {LAYERS[0]: wanted}, traced)
        assert layer.neurons.tolist() == [4, 20, 30]
        rival, expected = (getattr(traced.predictions, key)[traced.medium] for key in ("rival", "expected"))
        semantics = semantic_delta(run.subject.bases, rival, expected, "l2")
        prior = solve_prior(traced.activations(LAYERS[0], wanted), semantics, run.args.ridge)
        torch.testing.assert_close(layer.delta.star_prior[[0, 2]].double(), prior, rtol=1e-5, atol=1e-6)
        assert prior.any() and not layer.delta.star_prior[1].any()
        torch.testing.assert_close(gradient, traced.layers[LAYERS[0]].gradient(torch.tensor([4, 20, 30])))
        # the adapter also holds a layer that is not patched this time
        untouched = run.subject.layers()[LAYERS[1]].star_delta["default"]
        assert untouched.any() and untouched.star_prior.shape == untouched.shape and not untouched.star_prior.any()
        # where the trace could not keep what a gradient needs, the first step makes a pass of its own
        monkeypatch.setattr("peft_star.method.trace.KEEP_BYTES", 0)
        assert prior_guided.solve(run, {LAYERS[0]: wanted}, trace(run.engine, batches, run.probe()))[1] is None


def test_retained_rows_that_break_join_the_loss_until_they_are_right_again(tokenizer):
    arguments = RepairArguments(algorithm="prior-guided", **QUIET)
    retained = own_continuations(tokenizer)[:3]
    careless, careful = star(), star()
    first = repair(careless, tokenizer, ROWS, arguments)
    assert first.success and wrong_tokens(careless, tokenizer, retained) > 0
    second = repair(careful, tokenizer, ROWS, arguments, retain=retained)
    assert second.success and second.steps > first.steps
    assert wrong_tokens(careful, tokenizer, [*ROWS, *retained]) == 0
