"""Targets for states midway through a model: what they reach, what bounds them, and that sites do not mix."""

import pytest
import torch

from peft_star.engine import tails
from peft_star.failures import Row, encode_rows
from peft_star.method import targets
from peft_star.method.targets import LARGEST, Site, find_targets
from support.modules import hooks
from support.words import ROWS, decided, word_tokenizer

NAMES = [f"model.layers.{index}" for index in range(3)]


@pytest.fixture(scope="module")
def sites():
    """Two rows, each as it is and behind another text; the second one's site has two tokens."""
    found = []
    for row, places in zip(encode_rows(ROWS, word_tokenizer()), ((1,), (1, 2))):
        front = Row(1, "", "", (*row.prompt_ids[:1], *row.prompt_ids), row.completion_ids)
        found.append(Site((row, front), (places, tuple(place + 1 for place in places))))
    return found


def find(sites, max_tokens=1000, fisher=None):
    model = decided().requires_grad_(False)
    before = hooks(model)
    found = find_targets(model, NAMES[0], NAMES[1], sites, max_tokens, fisher=fisher)
    assert hooks(model) == before
    return model, found


def entropy(model, row, places, delta):
    """Cross entropy of the completion with the change at the site's tokens, and the states' sizes there."""
    ids, sizes = torch.tensor([row.input_ids]), []

    def add(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        sizes.append(hidden[0, list(places)].norm(dim=-1))
        hidden[0, list(places)] += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.get_submodule(NAMES[0]).register_forward_hook(add)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
    handle.remove()
    return -sum(logits[p, t] for p, t in zip(row.medium_positions, row.completion_ids)).item(), sizes[0]


def test_a_target_makes_its_completion_likelier_and_is_bounded(sites):
    model, found = find(sites)
    for site, delta in zip(sites, found):
        row, places = site.rows[0], site.positions[0]
        assert delta.shape == (site.size, model.config.hidden_size)
        plain, sizes = entropy(model, row, places, torch.zeros_like(delta))
        assert entropy(model, row, places, delta)[0] < plain - 0.1
        # the bound is a share of the mean size over the row as it is and behind another text
        assert (delta.norm(dim=-1) <= LARGEST * 2 * sizes.max()).all()


def test_sites_that_share_a_forward_find_what_they_find_alone(sites, monkeypatch):
    monkeypatch.setattr(targets, "NOISE", 0.0)
    together, apart = find(sites)[1], find(sites, max_tokens=1)[1]
    for ours, theirs in zip(together, apart):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_whole_rows_give_the_same_as_tails(sites, monkeypatch):
    monkeypatch.setattr(targets, "NOISE", 0.0)
    fast = find(sites)[1]
    monkeypatch.setattr(targets, "can_read_tails", lambda *args: False)
    for ours, theirs in zip(fast, find(sites)[1]):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_step_computes_no_token_in_front_of_the_site(sites, monkeypatch):
    read = []
    logits = tails.Tails.logits

    def watched(self, model):
        read.append(self.input_ids.shape[1])
        return logits(self, model)

    monkeypatch.setattr(tails.Tails, "logits", watched)
    model = decided().requires_grad_(False)
    assert tails.can_read_tails(model, NAMES[1])
    read.clear()
    find_targets(model, NAMES[0], NAMES[1], sites[:1], 1000)
    row, (place,) = sites[0].rows[0], sites[0].positions[0]
    assert set(read) == {len(row) - 1 - place}


def test_what_follows_a_site_is_blurred_and_nothing_else(sites):
    batch = targets._Batch(decided(), sites, range(2), tails=False)
    hidden = torch.ones(4, 7, 16)
    noise = targets._Change()._noise(hidden, batch.lines, batch.places)
    noisy = noise.abs().sum(-1) > 0
    # sites at 1 and 2 (behind a text) of one token, at 1-2 and 2-3 of two
    assert noisy.tolist() == [[place > last for place in range(7)] for last in (1, 2, 2, 3)]


def test_sites_that_are_done_are_dropped_and_the_others_go_on(sites, monkeypatch):
    built = []
    batch = targets._Batch

    class Watched(batch):
        def __init__(self, model, sites, numbers, tails):
            built.append(list(numbers))
            super().__init__(model, sites, numbers, tails)

    monkeypatch.setattr(targets, "_Batch", Watched)
    monkeypatch.setattr(targets, "NOISE", 0.0)
    # the second site gets there in a step, the first one does not
    monkeypatch.setattr(targets, "STEPS", (1, 5))
    monkeypatch.setattr(targets, "ENOUGH", 3.5)
    _, (alone,) = find(sites[:1])
    built.clear()
    _, found = find(sites)
    assert built == [[0, 1], [0]]
    torch.testing.assert_close(found[0], alone, rtol=1e-3, atol=1e-5)


def test_with_information_of_what_the_model_says_a_target_moves_less_of_that(sites):
    model, plain = find(sites)
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    fisher = basis[:, : width // 4] @ basis[:, : width // 4].T
    _, found = find(sites, fisher=fisher)
    for site, delta, before in zip(sites, found, plain):
        row, places = site.rows[0], site.positions[0]
        untouched = entropy(model, row, places, torch.zeros_like(delta))[0]
        assert entropy(model, row, places, delta)[0] < untouched - 0.1
        shares = [
            ((one.double() @ fisher) * one.double()).sum() / one.double().square().sum() for one in (delta, before)
        ]
        assert shares[0] < 0.5 * shares[1]
    # information that tells no direction from another changes nothing
    _, same = find(sites, fisher=torch.eye(width))
    for delta, before in zip(same, plain):
        assert torch.allclose(delta, before, rtol=1e-3, atol=1e-5)
