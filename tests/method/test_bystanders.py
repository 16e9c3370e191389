"""What is read beside the failures, against plain forwards, and when it counts as disturbed."""

import pytest
import torch

from peft_star.failures import encode_rows
from peft_star.method import bystanders
from peft_star.method.bystanders import Bystanders
from support.words import LAYERS, ROWS, decided, read_row, running, star, word_tokenizer

NEURONS = torch.tensor([2, 5, 7])


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def chosen(run, name):
    """A second matrix, and the neurons of it that are read."""
    return {name: run.subject.ffns()[name]}, {name: NEURONS}


def read_by_hand(name, rows, failing):
    """Activations (N, k) and words (N) at the tokens of these rows that are not in front of a failing token."""
    base, activations, words, slot = decided(), [], [], 0
    for row in rows:
        inputs, said = read_row(base, name, row)
        at = {position: slot + number for number, position in enumerate(row.medium_positions)}
        slot += len(row.completion_ids)
        keep = [position for position in range(len(row.input_ids)) if at.get(position) not in failing]
        activations.append(inputs[keep][:, NEURONS])
        words.append(said[keep])
    return torch.cat(activations), torch.cat(words)


@pytest.mark.parametrize("max_batch_tokens", [6, 500])
def test_it_is_what_plain_forwards_show_at_all_tokens_but_the_failing_ones(max_batch_tokens, tokenizer):
    rows, failing = encode_rows(ROWS, tokenizer), torch.tensor([0, 2])
    with running(star(), tokenizer, max_batch_tokens=max_batch_tokens) as run:
        batches = run.engine.batches(rows)
        found = Bystanders.of(run.engine, batches, failing, *chosen(run, LAYERS[1]), torch.tensor([]))
    wanted, words = read_by_hand(LAYERS[1], rows, set(failing.tolist()))
    # batches have an order of their own
    order, by_hand = (values[:, 0].argsort() for values in (found.activations[LAYERS[1]], wanted))
    torch.testing.assert_close(found.activations[LAYERS[1]][order], wanted[by_hand], rtol=1e-4, atol=1e-5)
    assert sorted(found.said.tolist()) == sorted(words.tolist())
    assert found.held.all()


def test_of_a_long_batch_some_words_are_watched(tokenizer, monkeypatch):
    monkeypatch.setattr(bystanders, "WATCHED", 3)
    with running(star(), tokenizer) as run:
        batches = run.engine.batches(encode_rows(ROWS, tokenizer))
        found = Bystanders.of(run.engine, batches, torch.tensor([0]), *chosen(run, LAYERS[0]), torch.tensor([]))
        activations = found.activations[LAYERS[0]]
    assert 1 < len(found.said) <= 3 < len(activations)


@pytest.mark.parametrize("fewest", [9, 10])
def test_of_few_words_nobody_can_tell(fewest, tokenizer, monkeypatch):
    monkeypatch.setattr(bystanders, "FEWEST", fewest)
    with running(star(), tokenizer) as run:
        batches = run.engine.batches(encode_rows(ROWS, tokenizer))
        found = Bystanders.of(run.engine, batches, torch.tensor([0]), *chosen(run, LAYERS[0]), torch.tensor([]))
        assert len(found.said) == 9 and found.undisturbed(run.engine) == (fewest <= 9)


def test_they_are_disturbed_by_a_change_of_what_is_said_but_not_where_that_is_wrong_anyhow(tokenizer, monkeypatch):
    monkeypatch.setattr(bystanders, "FEWEST", 0)
    model = star()
    with running(model, tokenizer) as run:
        run.subject.hold({LAYERS[2]: NEURONS})
        batches, failing = run.engine.batches(encode_rows(ROWS, tokenizer)), torch.tensor([0])
        none, every = (
            Bystanders.of(run.engine, batches, failing, *chosen(run, LAYERS[2]), wrong)
            for wrong in (torch.tensor([]), torch.arange(tokenizer.vocab_size))
        )
        assert none.undisturbed(run.engine) and every.undisturbed(run.engine)
        with torch.no_grad():
            for layer in run.subject.layers().values():
                layer.star_delta[run.subject.adapter].normal_(std=30)
        assert not none.undisturbed(run.engine)
        assert every.undisturbed(run.engine)
