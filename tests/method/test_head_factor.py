"""The factor behind the semantic bases: how it is made, and kept on disk."""

import pytest
import torch

from peft_star.method import head_factor
from peft_star.method.head_factor import head_digest
from peft_star.method.semantics import SemanticBases
from support.modules import head


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
    assert "values" in bases._factor
    tokens = torch.arange(50)
    found = bases(tokens)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, torch.linalg.pinv(weight, rtol=1e-5).T, rtol=1e-5, atol=1e-7)


def test_chunks_give_the_same_gram_matrix(monkeypatch):
    whole = SemanticBases(head())(torch.arange(50))
    monkeypatch.setattr("peft_star.method.head_factor._CHUNK_BYTES", 7 * 12 * 8)
    torch.testing.assert_close(SemanticBases(head())(torch.arange(50)), whole)


def test_only_a_chunk_of_the_head_is_copied(monkeypatch):
    """The largest tensor that the Gram matrix makes, besides itself, stays within the budget."""
    monkeypatch.setattr(head_factor, "_CHUNK_BYTES", 64 * 12 * 8)
    sizes = []
    whole = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: sizes.append(self.numel() * 8) or whole(self))
    head_factor._gram(head(v=1000).bfloat16())
    assert max(sizes) == 64 * 12 * 8 and sum(sizes) == 1000 * 12 * 8


# the factor on disk


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The cache in a directory of its own, used for heads of any size; counts the factors that are computed."""
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(head_factor, "_WORTH_KEEPING", 0)
    computed = []
    compute = head_factor._factorise
    monkeypatch.setattr(head_factor, "_factorise", lambda weight: computed.append(1) or compute(weight))
    return tmp_path / "cache" / "semantics", computed


def singular():
    weight = head()
    weight[:, 5] = weight[:, 2]
    return weight


@pytest.mark.parametrize("make", [head, singular], ids=["cholesky", "eigen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_factor_is_found_again_on_disk(cache, make, dtype):
    directory, computed = cache
    weight = make().to(dtype)
    first = SemanticBases(weight)
    again = SemanticBases(weight.clone())
    assert len(computed) == 1
    assert len(list(directory.iterdir())) == 1
    assert torch.equal(again(torch.arange(50)), first(torch.arange(50)))
    # a product of sums that differ by rounding would do, too: the file must hold the factor to the last bit
    assert all(torch.equal(again._factor[name], value) for name, value in first._factor.items())


def test_one_changed_entry_makes_another_head(cache):
    _, computed = cache
    weight = head().bfloat16()
    SemanticBases(weight)
    weight[17, 3] += 1
    bases = SemanticBases(weight)
    assert len(computed) == 2
    torch.testing.assert_close(bases(torch.tensor([17])), torch.linalg.pinv(weight.double()).T[17:18])


def test_the_digest_depends_on_shape_and_type_and_not_on_layout():
    weight = head().float()
    assert head_digest(weight) == head_digest(weight.T.contiguous().T)
    assert head_digest(weight) != head_digest(weight.reshape(25, 24))
    assert head_digest(weight) != head_digest(weight.view(torch.int32))


def test_the_cache_can_be_turned_off(cache, monkeypatch):
    directory, computed = cache
    monkeypatch.setenv("PEFT_STAR_CACHE", "0")
    SemanticBases(head())
    SemanticBases(head())
    assert len(computed) == 2 and not directory.exists()


def test_a_small_head_is_not_worth_a_file(cache, monkeypatch):
    directory, computed = cache
    monkeypatch.setattr(head_factor, "_WORTH_KEEPING", 50 * 12 * 12 + 1)
    SemanticBases(head())
    assert not directory.exists()
