"""The prior and the protected answer against dense least squares (paper equation 2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_star.method.background import moment_factor
from peft_star.method.solve import answers_by_problem, held_out_answers, protected_answer, solve_prior
from support.dense import answer_by_hand, dense, moment, protected_problem


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


# under protection


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
    v, background, targets = protected_problem(n, k, d, seed)
    strengths = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    protection = moment(background) if protected else torch.eye(k, dtype=v.dtype)
    answer = protected_answer(v, moment_factor(background) if protected else None, ridge)
    assert answer.shape == (k, n) and answer.dtype == torch.float64
    # one answer serves all strengths
    wanted = dense(v, strengths * targets, protection, ridge)
    torch.testing.assert_close(answer @ (strengths * targets), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max())


def test_protection_moves_the_background_less_for_the_same_push():
    v, background, targets = protected_problem(2, 12, 3)
    plain, protected = (protected_answer(v, factor, 1e-6) for factor in (None, moment_factor(background)))
    for answer in (plain, protected):
        torch.testing.assert_close(v @ answer @ targets, targets, rtol=1e-3, atol=1e-3)
    assert (background @ protected @ targets).norm() < 0.6 * (background @ plain @ targets).norm()


@pytest.mark.parametrize(("n", "k"), [(3, 9), (6, 6), (9, 4)])
@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("weight", [0.5, 5.0])
def test_with_contexts_each_failure_gets_its_own_push(n, k, protected, weight):
    v, background, _ = protected_problem(n, k, 1, seed=3)
    contexts = v * 0.7 + protected_problem(n, k, 1, seed=4)[0] * 0.3
    factor = moment_factor(background) if protected else None
    answer = protected_answer(v, factor, 1e-4, contexts, weight)
    protection = moment(background) if protected else torch.eye(k, dtype=v.dtype)
    wanted = answer_by_hand(v, protection, 1e-4, contexts, weight)
    torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-6)
    if n <= 3:
        torch.testing.assert_close(v @ answer, torch.eye(n, dtype=v.dtype), rtol=0, atol=0.02)


def test_failures_whose_contexts_look_like_each_other_get_their_own_pushes():
    v, _, _ = protected_problem(2, 8, 1)
    answer = protected_answer(v, None, 1e-4, v.flip(0), 100.0)
    torch.testing.assert_close(v @ answer, torch.eye(2, dtype=v.dtype), rtol=0, atol=0.01)


def test_without_contexts_nothing_is_averaged_or_scaled():
    v, background, _ = protected_problem(3, 7, 1)
    factor = moment_factor(background)
    torch.testing.assert_close(
        protected_answer(v, factor, 1e-2), protected_answer(v, factor, 1e-2, None, generalization=5.0)
    )


@pytest.mark.parametrize("protected", [True, False])
def test_failures_of_a_problem_share_and_those_of_others_are_told_apart(protected):
    """With a ridge that makes failures share, a push of one problem answers less to another's failures."""
    torch.manual_seed(0)
    common, (first, second) = torch.randn(12), torch.randn(2, 12)
    v = torch.stack([common + part + 0.1 * torch.randn(12) for part in (first, first, second, second)])
    factor = moment_factor(torch.randn(50, 12)) if protected else None
    problems = ["a", "a", "b", "b"]
    apart = answers_by_problem(v, factor, 10.0, problems)
    together = protected_answer(v, factor, 10.0)

    def leak(answer):
        response = (v.double() @ answer).abs()
        return (response[:2, 2:].sum() + response[2:, :2].sum()) / response.diagonal().sum()

    assert apart.shape == (12, 4)
    assert leak(apart) < 0.5 * leak(together)
    response = v.double() @ apart
    assert response[0, 1] > 0.5 * response[1, 1]  # the other example of the problem is pushed along


def test_one_problem_is_solved_as_ever():
    v, factor = torch.randn(3, 6), moment_factor(torch.randn(20, 6))
    names = [None, "x", None]
    apart = answers_by_problem(v, factor, 0.1, names)
    others = v[1:2].double()
    moment = factor @ factor.T + others.T @ others
    wanted = protected_answer(v[[0, 2]], torch.linalg.cholesky(moment), 0.1)
    assert torch.allclose(apart[:, [0, 2]], wanted)


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 10.0])
def test_held_out_is_solved_without_the_row(protected, ridge):
    """Against least squares of the other rows alone, with the ridge as large as it was with all of them."""
    v, background, _ = protected_problem(5, 9, 1, seed=2)
    rows, protection = [0, 1, 1, 2, 0], moment(background) if protected else torch.eye(9, dtype=v.dtype)
    held_out = held_out_answers(v, moment_factor(background) if protected else None, ridge, [None] * 5, rows)
    whitened = v @ torch.linalg.inv(torch.linalg.cholesky(protection)).T
    penalty = ridge * whitened.square().sum() / len(v)
    for row in set(rows):
        own = [number for number, other in enumerate(rows) if other == row]
        others = [number for number, other in enumerate(rows) if other != row]
        # argmin_P ‖V P − I‖² + λ tr(Pᵀ (C + ε I) P) over the others
        normal = v[others].T @ v[others] + penalty * protection
        answer = torch.linalg.solve(normal, v[others].T)
        torch.testing.assert_close(held_out[own][:, others], v[own] @ answer, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(held_out[own][:, own], torch.zeros(len(own), len(own)).double(), rtol=0, atol=1e-8)


def test_held_out_of_other_problems_nothing_is_answered():
    v, background, _ = protected_problem(4, 9, 1, seed=3)
    factor, names = moment_factor(background), ["a", "b", "a", "b"]
    held_out = held_out_answers(v, factor, 0.1, names, [0, 1, 2, 3])
    assert held_out[0, 2] != 0 and held_out[1, 3] != 0
    apart = [number for number in range(16) if names[number // 4] != names[number % 4]]
    assert not held_out.flatten()[apart].any()
    # a problem is told from the others here, too
    moment = factor @ factor.T + v[[1, 3]].T @ v[[1, 3]] / 2
    alone = held_out_answers(v[[0, 2]], torch.linalg.cholesky(moment), 0.1, [None, None], [0, 2])
    torch.testing.assert_close(held_out[[0, 2]][:, [0, 2]], alone)
