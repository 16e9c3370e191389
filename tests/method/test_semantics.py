"""Semantic bases and deltas against their definitions (paper section 2.2 and equation 1)."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from peft_star.method.semantics import SemanticBases, semantic_bases, semantic_delta
from support.modules import head
from support.tiny_models import tiny_llama


def test_bases_are_rows_of_the_pseudo_inverse():
    weight = head()
    expected = torch.linalg.pinv(weight).T
    tokens = torch.tensor([3, 49, 3, 0])
    torch.testing.assert_close(SemanticBases(weight)(tokens), expected[tokens])


def test_logits_of_a_basis_are_the_projection_of_its_one_hot_vector():
    weight = head()
    projector = weight @ torch.linalg.pinv(weight)
    torch.testing.assert_close(SemanticBases(weight)(torch.tensor([7])) @ weight.T, projector[7:8])


def test_fewer_tokens_than_dimensions():
    weight = head(v=6, d=12)
    torch.testing.assert_close(SemanticBases(weight)(torch.arange(6)), torch.linalg.pinv(weight).T)


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
