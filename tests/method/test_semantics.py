"""Semantic bases and deltas against their definitions (paper section 2.2 and equation 1)."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from huggingface_hub.constants import HF_HOME
from safetensors.torch import save_file
from torch import nn

from peft_star.method import semantics
from peft_star.method.semantics import SemanticBases, cache_dir, head_digest, semantic_bases, semantic_delta
from support.tiny_models import tiny_llama


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
    assert "values" in bases._factor
    tokens = torch.arange(50)
    found = bases(tokens)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, torch.linalg.pinv(weight, rtol=1e-5).T, rtol=1e-5, atol=1e-7)


def test_fewer_tokens_than_dimensions():
    weight = head(v=6, d=12)
    torch.testing.assert_close(SemanticBases(weight)(torch.arange(6)), torch.linalg.pinv(weight).T)


def test_chunks_give_the_same_gram_matrix(monkeypatch):
    whole = SemanticBases(head())(torch.arange(50))
    monkeypatch.setattr("peft_star.method.semantics._CHUNK_BYTES", 7 * 12 * 8)
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


def test_a_head_that_is_not_finite_is_refused_in_one_sentence():
    weight = head()
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        SemanticBases(weight)


def test_only_a_chunk_of_the_head_is_copied(monkeypatch):
    """The largest tensor that the Gram matrix makes, besides itself, stays within the budget."""
    monkeypatch.setattr(semantics, "_CHUNK_BYTES", 64 * 12 * 8)
    sizes = []
    whole = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: sizes.append(self.numel() * 8) or whole(self))
    semantics._gram(head(v=1000).bfloat16())
    assert max(sizes) == 64 * 12 * 8 and sum(sizes) == 1000 * 12 * 8


# the factor on disk


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The cache in a directory of its own, used for heads of any size; counts the factors that are computed."""
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(semantics, "_WORTH_KEEPING", 0)
    computed = []
    compute = semantics._factorise
    monkeypatch.setattr(semantics, "_factorise", lambda weight: computed.append(1) or compute(weight))
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
    assert [path.name for path in directory.iterdir()] == [f"{head_digest(weight)}.safetensors"]
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


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def of_another_head(path):
    other = path.with_name(f"{head_digest(head(seed=1))}.safetensors")
    SemanticBases(head(seed=1))
    other.replace(path)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        of_another_head,
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("something else"),
        lambda path: save_file({"cholesky": torch.eye(12, dtype=torch.float64)}, path),
    ],
    ids=["a bit", "another head", "truncated", "empty", "no safetensors", "no metadata"],
)
def test_a_damaged_or_foreign_file_is_made_anew(cache, damage):
    directory, computed = cache
    expected = SemanticBases(head())(torch.arange(50))
    (path,) = directory.iterdir()
    damage(path)
    computed.clear()
    assert torch.equal(SemanticBases(head())(torch.arange(50)), expected)
    assert len(computed) == 1
    SemanticBases(head())
    assert len(computed) == 1 and list(directory.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_done_without(cache, monkeypatch, tmp_path):
    _, computed = cache
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        torch.testing.assert_close(SemanticBases(head())(torch.arange(50)), torch.linalg.pinv(head()).T)
    assert len(computed) == 2 and (tmp_path / "file").read_text() == "in the way"


def test_an_interrupted_write_leaves_nothing_behind(cache, monkeypatch):
    directory, computed = cache

    def interrupted(factor, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(semantics, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            SemanticBases(head())
    assert list(directory.iterdir()) == []
    SemanticBases(head())
    assert len(list(directory.iterdir())) == 1


@pytest.mark.parametrize("setting", ["", "0"])
def test_the_cache_can_be_turned_off(cache, monkeypatch, setting):
    directory, computed = cache
    monkeypatch.setenv("PEFT_STAR_CACHE", setting)
    assert cache_dir() is None
    SemanticBases(head())
    SemanticBases(head())
    assert len(computed) == 2 and not directory.exists()


def test_the_cache_lies_beside_the_hub_s(monkeypatch):
    monkeypatch.delenv("PEFT_STAR_CACHE", raising=False)
    assert cache_dir() == Path(HF_HOME) / "peft_star"
    monkeypatch.setenv("PEFT_STAR_CACHE", os.path.join("~", "kept"))
    assert cache_dir() == Path.home() / "kept"


def test_a_small_head_is_not_worth_a_file(cache, monkeypatch):
    directory, computed = cache
    monkeypatch.setattr(semantics, "_WORTH_KEEPING", 50 * 12 * 12 + 1)
    SemanticBases(head())
    assert not directory.exists()


# heads that accelerate moves about


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
def test_an_offloaded_head_is_read_through_its_hook(where, tied, tmp_path):
    model = tiny_llama(tie_word_embeddings=tied)
    expected = torch.linalg.pinv(model.lm_head.weight.detach().double()).T
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif where == "disk":
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        device_map = {"model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        device_map |= {"model.embed_tokens": "disk", "lm_head": "disk"}
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.lm_head.weight.is_meta
    bases = semantic_bases(model)
    tokens = torch.tensor([5, 63, 5, 0])
    torch.testing.assert_close(bases(tokens), expected[tokens], rtol=1e-9, atol=1e-9)
    assert model.lm_head.weight.is_meta
    assert torch.isfinite(model(input_ids=tokens[None]).logits).all()


def test_a_head_without_data_is_refused_in_one_sentence():
    with torch.device("meta"):
        model = Model(nn.Linear(12, 50))
    with pytest.raises(ValueError, match="not loaded"):
        semantic_bases(model)


def test_the_bases_of_a_head_on_a_gpu_come_back_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = Model(nn.Linear(12, 50).cuda())
    expected = torch.linalg.pinv(model.head.weight.detach().cpu().double()).T
    for tokens in (torch.tensor([5, 49]), torch.tensor([5, 49], device="cuda")):
        torch.testing.assert_close(semantic_bases(model)(tokens), expected[[5, 49]])
