"""Solving "neuron patches": the prior by least squares (paper section 3.2, equation 2), plain and under protection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def solve_prior(activations: torch.Tensor, semantics: torch.Tensor, ridge: float = 1e-4) -> torch.Tensor:
    """Equation 2 for k located neurons: `argmin_W ‖V W − S‖² + λ‖W‖²`, so that the patch steers every medium token's
    representation by its semantic delta.

    The smaller of the n x n and the k x k system is solved, in float64. The ridge is relative, λ = `ridge` x the mean
    diagonal of the system's Gram matrix, so that scaling V changes nothing but the units of W.

    Args:
        activations (`torch.Tensor`): V, the neurons' activations at the medium tokens, shape (n, k).
        semantics (`torch.Tensor`): S, the semantic deltas, shape (n, d).
        ridge (`float`): Relative ridge.

    Returns:
        `torch.Tensor`: The prior W_Δ in the layout of `star_delta`, float64, shape (k, d). Neurons silent at every
        medium token get zeros.
    """
    v, s = activations.double(), semantics.to(activations.device, torch.float64)
    if v.ndim != 2 or s.ndim != 2 or v.shape[0] != s.shape[0]:
        raise ValueError(f"activations {tuple(v.shape)} and semantics {tuple(s.shape)} must be (n, k) and (n, d).")
    n, k = v.shape
    wide = n <= k
    gram = v @ v.T if wide else v.T @ v
    scale = gram.diagonal().mean()
    if scale == 0:
        return torch.zeros(k, s.shape[1], dtype=torch.float64, device=v.device)
    gram.diagonal().add_(scale * max(ridge, 1e-12))
    factor, info = torch.linalg.cholesky_ex(gram)
    right = s if wide else v.T @ s
    solution = torch.cholesky_solve(right, factor) if info.item() == 0 else torch.linalg.pinv(gram) @ right
    return v.T @ solution if wide else solution


def protected_answer(
    activations: torch.Tensor,
    factor: torch.Tensor | None,
    ridge: float,
    contexts: torch.Tensor | None = None,
    generalization: float = 0.0,
) -> torch.Tensor:
    """P (k, n), float64: how much of each neuron's delta answers to each failure.

    With V the `activations` (n, k) and C + ε I = L Lᵀ, the protection is a plain ridge on V L⁻ᵀ. To generalise, a
    failure's neurons are combined as for the average X = (V + w U) / (1 + w) with its `contexts` U (n, k), and mixed
    such that each push reaches its own failure whole and leaves the others alone: P = (C + ε I)⁻¹ Xᵀ B with V P = I.
    """
    v = activations.double()
    if contexts is None:
        eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
        answer = solve_prior(_whitened(v, factor), eye, ridge)
    else:
        averaged = _whitened((v + generalization * contexts.double()) / (1 + generalization), factor)
        answer = averaged.T @ solve_prior(_whitened(v, factor) @ averaged.T, torch.eye(len(v)).to(v), ridge)
    return answer if factor is None else torch.linalg.solve_triangular(factor.T, answer, upper=True)


def answers_by_problem(
    activations: torch.Tensor,
    factor: torch.Tensor | None,
    ridge: float,
    problems: Sequence[str | None],
    contexts: torch.Tensor | None = None,
    generalization: float = 0.0,
) -> torch.Tensor:
    """P (k, n), float64, as [`protected_answer`], of several problems: the failures of each are told from the
    background and from those of the others, whose second moment is added to C with the weight of one mean.

    Args:
        problems: Of each failure (n) the problem's name, or None; those without a name are one problem.
    """
    v = activations.double()
    answer = torch.zeros(v.shape[1], len(v), dtype=v.dtype, device=v.device)
    for own, apart in _told_apart(v, factor, problems):
        answer[:, own] = protected_answer(
            v[own], apart, ridge, None if contexts is None else contexts[own], generalization
        )
    return answer


def held_out_answers(
    activations: torch.Tensor,
    factor: torch.Tensor | None,
    ridge: float,
    problems: Sequence[str | None],
    rows: Sequence[int],
) -> torch.Tensor:
    """How a row's failures would answer to the pushes of its problem, had these been solved without the row: Q (n, n),
    float64, in closed form.

    With G = V (C + ε I)⁻¹ Vᵀ, A = G + λ I and B = A⁻¹, failures g of one row answer to all pushes with
    I_g − (B_gg)⁻¹ B_g instead of G_g B, and so to their own not at all. The failures of other problems are not
    answered to.

    Args:
        activations, factor, ridge, problems: As for [`answers_by_problem`].
        rows: Of each failure (n) the number of its row.
    """
    v = activations.double()
    answers = torch.zeros(len(v), len(v), dtype=v.dtype, device=v.device)
    numbers = torch.tensor(rows, device=v.device)
    for own, apart in _told_apart(v, factor, problems):
        whitened = _whitened(v[own], apart)
        gram = whitened @ whitened.T
        gram.diagonal().add_(gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny) * max(ridge, 1e-12))
        inverse = torch.linalg.inv(gram)
        left_out = torch.eye(len(gram), dtype=v.dtype, device=v.device)
        for number in numbers[own].unique():
            row = (numbers[own] == number).nonzero()[:, 0]
            left_out[row] -= torch.linalg.solve(inverse[row][:, row], inverse[row])
        answers[own.nonzero(), own.nonzero()[:, 0]] = left_out
    return answers


def _whitened(rows: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """V L⁻ᵀ (n, k), with C + ε I = L Lᵀ."""
    return rows if factor is None else torch.linalg.solve_triangular(factor, rows.T, upper=False).T


def _told_apart(
    v: torch.Tensor, factor: torch.Tensor | None, problems: Sequence[str | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Of each problem which failures (n) are its own, and L (k, k) of what these are told from."""
    names = list(dict.fromkeys(problems))
    for name in names:
        own = torch.tensor([problem == name for problem in problems], device=v.device)
        if len(names) == 1:
            yield own, factor
            return
        others = v[~own]
        moment = others.T @ others / len(others)
        # where nothing else is protected, a little of everything is
        moment += (
            moment.diagonal().mean() * 0.1 * torch.eye(len(moment)).to(v) if factor is None else factor @ factor.T
        )
        yield own, torch.linalg.cholesky(moment)
