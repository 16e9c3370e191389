"""The least squares behind a patch (equation 2, plain and under protection), solved densely from their definitions."""

from __future__ import annotations

import torch

from peft_star.method.background import FLOOR


def protected_problem(n, k, d, seed=0, background=30):
    """V (n, k), background (N, k) and targets (n, d), float64."""
    generator = torch.Generator().manual_seed(seed)
    # neurons of different sizes that move together, as real ones do
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) + torch.eye(k)
    v, b = (torch.randn(size, k, generator=generator, dtype=torch.float64) @ mix for size in (n, background))
    return v, b, torch.randn(n, d, generator=generator, dtype=torch.float64)


def moment(*groups):
    """C + ε I, as the documentation says, with C the sum over groups of what is protected."""
    c = sum(torch.outer(row, row) / len(group) for group in groups for row in group)
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
