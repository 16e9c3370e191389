"""The prior against dense least squares (paper equation 2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_star.method.solve import solve_prior


def problem(n, k, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((n, k), (n, d)))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), k=st.integers(1, 12), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_both_forms_minimise_the_ridge_problem(n, k, d, seed):
    v, s = problem(n, k, d, seed)
    ridge = 1e-2
    found = solve_prior(v, s, ridge)
    gram = v @ v.T if n <= k else v.T @ v
    penalty = ridge * gram.diagonal().mean()
    gradient = v.T @ (v @ found - s) + penalty * found
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


def test_without_a_ridge_to_speak_of_it_is_the_least_squares_solution():
    for n, k in ((3, 9), (9, 3)):
        v, s = problem(n, k, 4)
        torch.testing.assert_close(solve_prior(v, s, 0.0), torch.linalg.pinv(v) @ s, rtol=1e-6, atol=1e-8)


def test_one_failure_is_steered_by_its_semantic_delta():
    v, s = problem(1, 8, 5)
    torch.testing.assert_close(v @ solve_prior(v, s, 1e-6), s, rtol=1e-5, atol=1e-5)


def test_the_ridge_is_relative_to_the_scale_of_the_activations():
    v, s = problem(4, 6, 3)
    torch.testing.assert_close(solve_prior(v * 1e4, s, 0.1) * 1e4, solve_prior(v, s, 0.1))


def test_repeated_failures_do_not_blow_up():
    v, s = problem(1, 6, 3)
    twice = solve_prior(v.repeat(5, 1), s.repeat(5, 1), 1e-4)
    torch.testing.assert_close(twice, solve_prior(v, s, 1e-4), rtol=1e-3, atol=1e-4)


def test_silent_neurons_get_zeros():
    v, s = problem(2, 4, 3)
    v[:, 1] = 0
    assert solve_prior(v, s)[1].abs().max() == 0
    assert solve_prior(torch.zeros_like(v), s).abs().max() == 0


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="must be"):
        solve_prior(torch.ones(2, 3), torch.ones(4, 5))
