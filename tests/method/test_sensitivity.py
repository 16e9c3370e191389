"""The Fisher information of the FFNs' outputs, and the targets that respect it."""

import pytest
import torch

from peft_star.engine.engine import Engine
from peft_star.engine.recording import head_reads, recording
from peft_star.failures import encode_rows
from peft_star.method import sensitivity
from peft_star.method.sensitivity import FLOOR, damped, natural_targets, read_own_texts, read_states
from peft_star.models.structure import find_second_matrices
from support.byte_llama import build_model, build_tokenizer

TEXTS = [{"prompt": "ab", "completion": "cde"}, {"prompt": "x = ", "completion": "1"}]


@pytest.fixture
def rows():
    return encode_rows(TEXTS, build_tokenizer())


@pytest.fixture
def model(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path))
    return build_model().eval().requires_grad_(False)


def test_it_is_the_mean_of_squares_of_sampled_gradients(model, rows):
    """Over many draws the sampled information becomes the exact one, Σ_y p(y) g_y g_yᵀ, position by position."""
    ffns = dict(list(find_second_matrices(model).items())[-1:])
    (name,) = ffns
    row = rows[1]
    kept = {}
    handle = ffns[name].register_forward_hook(lambda module, args, output: kept.update(o=output) or None)
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(torch.tensor([row.input_ids])).requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits[0, len(row.prompt_ids) - 1]
        handle.remove()
        log_p = logits.log_softmax(-1)
        exact = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)
        for y, p in enumerate(log_p.exp().tolist()):
            (g,) = torch.autograd.grad(log_p[y], kept["o"], retain_graph=True)
            exact += p * (g[0].double().T @ g[0].double())
    sampled = torch.zeros_like(exact)
    for seed in range(1500):
        sampled += one_draw(model, row, ffns, seed)
    assert (sampled / 1500 - exact).norm() < 0.15 * exact.norm()


def one_draw(model, row, ffns, seed):
    (batch,) = Engine(model).batches([row])
    with recording(ffns, {}) as seen, head_reads(model, batch), torch.enable_grad():
        logits = model(**batch.model_inputs(), use_cache=False).logits[0]
        (gradient,) = sensitivity._sampled_gradients(logits, seed, list(seen.o.values()))
    g = gradient.reshape(-1, gradient.shape[-1]).double()
    return g.T @ g


def test_it_is_read_once_and_kept_on_disk(model, rows, monkeypatch):
    ffns = find_second_matrices(model)
    first = read_own_texts(Engine(model), rows, ffns)
    assert all(value.isfinite().all() and value.norm() > 0 for value in first.fisher.values())
    assert read_own_texts(Engine(model), rows, ffns) is first
    again = build_model().eval().requires_grad_(False)
    monkeypatch.setattr(sensitivity, "_sampled_gradients", lambda *_: pytest.fail("differentiated again"))
    found = read_own_texts(Engine(again), rows, find_second_matrices(again))
    for name in ffns:
        assert torch.equal(found.fisher[name], first.fisher[name])
        assert torch.equal(found.activations[name], first.activations[name])


def test_the_activations_are_those_where_the_model_speaks(model, rows):
    ffns = find_second_matrices(model)
    found = read_own_texts(Engine(model), rows, ffns).activations
    spoken = sum(len(row.completion_ids) for row in rows)
    assert all(values.shape == (spoken, ffns[name].in_features) for name, values in found.items())


def test_a_damaged_file_is_read_anew(model, rows, tmp_path):
    first = read_own_texts(Engine(model), rows, find_second_matrices(model))
    (path,) = (tmp_path / "sensitivity").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    again = build_model().eval().requires_grad_(False)
    found = read_own_texts(Engine(again), rows, find_second_matrices(again))
    assert all(torch.equal(found.fisher[name], first.fisher[name]) for name in first.fisher)


def test_targets_lower_the_loss_most_for_what_they_change():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    fisher, gradients = root @ root.T, torch.randn(3, 6, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([1.0, 2.0, 0.5])
    targets = natural_targets(gradients, fisher, sizes)
    assert torch.allclose(targets.norm(dim=1), sizes.double())
    damped = fisher + FLOOR * fisher.diagonal().mean() * torch.eye(6, dtype=torch.float64)

    def worth(t, g):
        return (t @ g).square() / (t @ damped @ t)

    for target, gradient in zip(targets, gradients):
        assert target @ gradient < 0
        best = worth(target, gradient)
        for _ in range(50):
            other = torch.randn(6, generator=generator, dtype=torch.float64)
            assert worth(other, gradient) <= best * (1 + 1e-9)


def test_targets_of_a_model_that_depends_on_nothing_are_finite():
    targets = natural_targets(torch.randn(2, 4), torch.zeros(4, 4), torch.ones(2))
    assert targets.isfinite().all()


def test_of_states_it_is_that_of_an_output_that_is_added_to_them(model, rows, monkeypatch):
    """A Llama layer adds its FFN's output to the state that leaves it, so the derivatives are the same."""
    layer, ffn = "model.layers.1", "model.layers.1.mlp.down_proj"
    outputs = read_own_texts(Engine(model), rows, {ffn: model.get_submodule(ffn)}).fisher[ffn]
    states = read_states(Engine(model), rows, layer, ffn)
    assert torch.allclose(states, outputs, rtol=1e-4, atol=1e-4 * outputs.abs().max().item())
    again = build_model().eval().requires_grad_(False)
    monkeypatch.setattr(sensitivity, "_sampled_gradients", lambda *_: pytest.fail("differentiated again"))
    assert torch.equal(read_states(Engine(again), rows, layer, ffn), states)


def test_the_damped_information_is_definite_where_nothing_was_read():
    factor = damped(torch.zeros(3, 3), torch.device("cpu"))
    assert factor.isfinite().all() and (factor.diagonal() > 0).all()
