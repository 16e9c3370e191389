"""Passes over rows, against forwards of each row alone."""

import pytest
import torch

from peft_star.engine.batch import completion_offsets, make_batches
from peft_star.engine.engine import Engine
from peft_star.engine.passes import generate, predict, teacher_forced
from peft_star.engine.predictions import Predictions
from peft_star.failures import Row
from support.rows import random_rows, shared_rows, unordered_rows
from support.tiny_models import MODELS
from support.words import decided, word_tokenizer


@pytest.mark.parametrize(("make_rows", "max_tokens"), [(unordered_rows, 30), (random_rows, 1000)])
def test_predictions_are_those_of_dense_logits(make_rows, max_tokens):
    rows, model = make_rows(), MODELS["llama"].build()
    now = teacher_forced(Engine(model), make_batches(rows, max_tokens))
    for row, offset in zip(rows, completion_offsets(rows)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        for number, (position, token) in enumerate(zip(row.medium_positions, row.completion_ids)):
            slot, at = offset + number, logits[position]
            others = at.clone()
            others[token] = -torch.inf
            assert now.expected[slot] == token and now.argmax[slot] == at.argmax()
            assert now.rival[slot] == others.argmax()
            p = at.softmax(-1)
            assert now.gap[slot].item() == pytest.approx((at[token] - others.max()).item(), abs=1e-5)
            assert now.p_expected[slot].item() == pytest.approx(p[token].item(), abs=1e-6)
            assert now.margin[slot].item() == pytest.approx((p[token] - p[others.argmax()]).item(), abs=1e-6)
    assert torch.equal(now.right, now.gap > 0)


def test_predictions_of_some_batches_leave_the_others_slots_alone():
    rows, engine = unordered_rows(), Engine(MODELS["llama"].build())
    batches = make_batches(rows, 10)
    assert len(batches) > 2
    everything, done = teacher_forced(engine, batches), []
    into = Predictions.empty(len(everything.right))
    assert predict(engine, batches[1:], into, done.append) is into
    read = torch.cat([batch.slots for batch in batches[1:]])
    assert torch.equal(into.gap[read], everything.gap[read])
    assert (into.expected[batches[0].slots] == -1).all()
    assert done == [len(batch.items) for batch in batches[1:]]


def test_an_engines_batches_are_packed_for_its_model():
    rows = shared_rows()
    (batch,) = Engine(MODELS["llama"].build(), 200).batches(rows)
    assert batch.segments is not None
    # positions by index do not allow it
    assert len(Engine(MODELS["mpt"].build(), max(map(len, rows))).batches(rows)) == len(rows)


def greedy(model, ids, count, eos):
    """New tokens after `ids`, one whole forward for each."""
    new = []
    while len(new) < count and (not new or new[-1] != eos):
        with torch.no_grad():
            new.append(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax().item())
    return tuple(new)


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
def test_generation_is_greedy_and_as_long_as_each_completion(max_tokens, monkeypatch):
    model, tokenizer = decided(), word_tokenizer()
    rows = [Row(0, "", "", (5, 9, 11), (20, 21, 22)), Row(1, "", "", (7,), (8,)), Row(2, "", "", (50, 51), (52,) * 6)]
    # a word that the model comes to say ends it
    stop = greedy(model, rows[2].prompt_ids, 6, None)[3]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    wanted = [greedy(model, row.prompt_ids, len(row.completion_ids), stop) for row in rows]
    assert [len(tokens) for tokens in wanted][:2] == [3, 1] and len(wanted[2]) <= 4
    shapes, done = [], []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: shapes.append(kwargs["input_ids"].shape) or real(**kwargs))
    assert generate(Engine(model, max_tokens), tokenizer, rows, done.append) == wanted
    assert sum(done) == 3 and len(done) == {1: 3, 30: 1, 1000: 1}[max_tokens]
    assert sum(count for count, _ in shapes) == 3
