"""Semantic bases and deltas against their definitions (paper section 2.2 and equation 1)."""

import pytest
import torch
from torch import nn

from peft_star.semantics import SemanticBases, semantic_bases, semantic_delta


def head(v=50, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(v, d, generator=generator, dtype=torch.float64)


def test_bases_are_rows_of_the_pseudo_inverse():
    weight = head()
    expected = torch.linalg.pinv(weight).T
    tokens = torch.tensor([3, 49, 3, 0])
    torch.testing.assert_close(SemanticBases(weight)(tokens), expected[tokens])


def test_logits_of_a_basis_are_the_projection_of_its_one_hot_vector():
    weight = head()
    projector = weight @ torch.linalg.pinv(weight)
    torch.testing.assert_close(SemanticBases(weight)(torch.tensor([7])) @ weight.T, projector[7:8])


@pytest.mark.parametrize("kind", ["duplicate column", "zero column", "nearly dependent"])
def test_a_singular_head_falls_back_to_the_truncated_eigendecomposition(kind):
    weight = head()
    if kind == "duplicate column":
        weight[:, 5] = weight[:, 2]
    elif kind == "zero column":
        weight[:, 5] = 0
    else:
        weight[:, 5] = weight[:, 2] + 1e-9 * weight[:, 5]
    bases = SemanticBases(weight)
    assert bases._eigen is not None
    tokens = torch.arange(50)
    found = bases(tokens)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, torch.linalg.pinv(weight, rtol=1e-5).T, rtol=1e-5, atol=1e-7)


def test_fewer_tokens_than_dimensions():
    weight = head(v=6, d=12)
    torch.testing.assert_close(SemanticBases(weight)(torch.arange(6)), torch.linalg.pinv(weight).T)


def test_chunks_give_the_same_gram_matrix(monkeypatch):
    whole = SemanticBases(head())(torch.arange(50))
    monkeypatch.setattr("peft_star.semantics.CHUNK", 7)
    torch.testing.assert_close(SemanticBases(head())(torch.arange(50)), whole)


def test_half_precision_heads_are_solved_in_float64():
    bases = SemanticBases(head().bfloat16())(torch.tensor([1]))
    assert bases.dtype == torch.float64
    torch.testing.assert_close(bases, torch.linalg.pinv(head().bfloat16().double()).T[1:2])


@pytest.mark.parametrize(
    ("norm", "measure"),
    [
        ("std", lambda x: x.std(dim=-1, correction=0)),
        ("max", lambda x: x.abs().amax(dim=-1)),
        ("l2", lambda x: x.norm(dim=-1)),
    ],
)
def test_norms_of_the_semantic_delta(norm, measure):
    bases = SemanticBases(head())
    argmax, expected = torch.tensor([1, 2]), torch.tensor([3, 4])
    delta = semantic_delta(bases, argmax, expected, norm)
    torch.testing.assert_close(measure(delta), torch.ones(2, dtype=torch.float64))
    raw = bases(argmax) - bases(expected)
    torch.testing.assert_close(torch.cosine_similarity(delta, raw), torch.ones(2, dtype=torch.float64))


def test_rms_norm_follows_the_hidden_state_it_steers():
    bases = SemanticBases(head())
    rms = torch.tensor([2.0, 30.0])
    delta = semantic_delta(bases, torch.tensor([1, 2]), torch.tensor([3, 4]), "rms", rms)
    torch.testing.assert_close(delta.square().mean(dim=-1).sqrt(), rms.double())


def test_the_delta_points_from_the_expected_token_to_the_argmax():
    weight = head()
    delta = semantic_delta(SemanticBases(weight), torch.tensor([1]), torch.tensor([3]))
    change = (delta @ weight.T)[0]
    assert change[1] > 0 > change[3]


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def get_output_embeddings(self):
        return self.head


def test_bases_are_factored_once_per_head_and_again_when_it_changes():
    model = Model(nn.Linear(12, 50))
    first = semantic_bases(model)
    assert semantic_bases(model) is first
    with torch.no_grad():
        model.head.weight.add_(1.0)
    assert semantic_bases(model) is not first


def test_a_model_without_a_head_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="no LM head"):
        semantic_bases(Model(None))
