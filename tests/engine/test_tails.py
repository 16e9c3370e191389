"""Rows read from a position on behind a cache, against rows read whole."""

import pytest
import torch

from peft_star.engine.replay import Replay
from peft_star.engine.tails import Tails, can_read_tails
from peft_star.failures import Row
from support.modules import hooks
from support.tiny_models import MODELS, tiny_llama

ROWS = [Row(0, "", "", (5, 9, 11, 30, 7), (20, 21)), Row(1, "", "", (1, 8, 40), (31,)), Row(2, "", "", (6,), (3, 4))]
STARTS = (3, 1, 0)
READS = [range(start, len(row) - 1) for row, start in zip(ROWS, STARTS)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral", "gpt_neox", "bloom"])
def test_tails_say_what_whole_rows_say(name):
    model = MODELS[name].build().requires_grad_(False)
    lowest = MODELS[name].names[1].rpartition(".mlp")[0]
    whole = Tails(model, ROWS, (0, 0, 0), READS)
    tails = Tails(model, ROWS, STARTS, READS)
    before = hooks(model)
    if not can_read_tails(model, lowest):
        pytest.skip("this model reads rows whole")
    assert hooks(model) == before
    with torch.no_grad():
        expected = whole.logits(model)
        torch.testing.assert_close(tails.logits(model), expected, rtol=1e-4, atol=1e-5)
        # again, and with the layers below replayed
        replay = Replay(model, lowest, check=False, caches=True)
        for _ in range(2):
            with replay(tails):
                torch.testing.assert_close(tails.logits(model), expected, rtol=1e-4, atol=1e-5)
    assert replay.nbytes > 0
    assert tails.input_ids.shape[1] == 3 and whole.input_ids.shape[1] == 6


def test_an_ordinary_model_can():
    assert can_read_tails(tiny_llama().requires_grad_(False), "model.layers.1")


def test_a_model_that_ignores_its_cache_cannot(monkeypatch):
    model = tiny_llama().requires_grad_(False)
    forward = model.forward

    def forgetful(*args, past_key_values=None, attention_mask=None, position_ids=None, **kwargs):
        mask = attention_mask[:, -kwargs["input_ids"].shape[1] :]
        return forward(*args, attention_mask=mask, **kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    assert not can_read_tails(model, "model.layers.1")


def test_a_model_whose_upper_layers_read_the_lower_ones_keys_cannot(monkeypatch):
    model = tiny_llama().requires_grad_(False)
    upper = model.model.layers[2]
    forward = upper.forward

    def reading_below(hidden, *args, past_key_values=None, **kwargs):
        keys = past_key_values.layers[0].keys.flatten(2) if past_key_values is not None else None
        out = forward(hidden, *args, past_key_values=past_key_values, **kwargs)
        return out if keys is None else out + keys.mean() + keys.shape[1] + past_key_values.layers[0].keys.shape[2]

    monkeypatch.setattr(upper, "forward", reading_below)
    assert not can_read_tails(model, "model.layers.1")
