"""Algorithm 1 as an optimiser."""

import copy

import pytest
import torch
from torch import nn

from peft_star import PriorGuidedSGD


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
