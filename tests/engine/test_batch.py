"""Batches, padded and packed: the same tokens, positions, logits and gradients; the common prefix computed once."""

import pytest
import torch
from accelerate import cpu_offload

from peft_star.engine.batch import completion_offsets, make_batches
from peft_star.failures import Row
from peft_star.models.inputs import input_device
from support.rows import assert_same, is_packed, logits_by_slot, nested_rows, shared_rows
from support.tiny_models import MODELS, tiny_llama, tiny_mixtral

# what they compute depends on where a token stands, not on its position, or they take no positions
UNPACKED = {"bloom", "mpt"}


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_have_the_logits_and_gradients_of_padded_rows(name):
    packed = assert_same(MODELS[name].build(), shared_rows())
    assert is_packed(packed) == [name not in UNPACKED]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_packed_rows_under_each_attention(name, attention):
    model = MODELS[name].build(attn_implementation=attention)
    assert is_packed(assert_same(model, shared_rows())) == [True]


def test_packed_rows_of_a_mixture_of_experts():
    assert is_packed(assert_same(tiny_mixtral(), shared_rows())) == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_rows_in_half_precision(dtype):
    model = MODELS["qwen3"].build(dtype=dtype)
    rows = shared_rows()
    packed, padded = make_batches(rows, 200, model=model), make_batches(rows, 200)
    assert is_packed(packed) == [True] and packed[0].model_inputs()["attention_mask"].dtype == dtype
    a, b = logits_by_slot(model, packed, rows).float(), logits_by_slot(model, padded, rows).float()
    assert (a - b).square().mean().sqrt() / b.std() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("seed", range(20))
def test_every_token_sees_its_own_row_and_nothing_else(seed):
    model, rows = tiny_llama(), nested_rows(seed)
    batches = make_batches(rows, 120, model=model)
    offsets = dict(zip((row.index for row in rows), completion_offsets(rows)))
    seen_slots = []
    for batch in batches:
        inputs = batch.model_inputs()
        count, length = batch.input_ids.shape
        assert count * length <= 120 or count == 1
        assert torch.equal(batch.tokens, batch.attention_mask == 1)
        if batch.segments is None:
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            visible = causal & batch.tokens[:, None]
            position_ids = torch.arange(length).expand(count, length)
        else:
            visible, position_ids = inputs["attention_mask"][:, 0] == 0, inputs["position_ids"]
        where = dict(zip(batch.slots.tolist(), zip(batch.rows.tolist(), batch.positions.tolist())))
        for row in batch.items:
            slots = range(offsets[row.index], offsets[row.index] + len(row.completion_ids))
            seen_slots += slots
            for slot, position, token in zip(slots, row.medium_positions, row.completion_ids):
                sequence, place = where[slot]
                mask = visible[sequence, place]
                assert tuple(inputs["input_ids"][sequence][mask].tolist()) == row.input_ids[: position + 1]
                assert position_ids[sequence][mask].tolist() == list(range(position + 1))
                assert batch.expected[batch.slots == slot].item() == token
        # each logit is read at a place of its own, so that medium tokens do not share activations
        assert len(set(where.values())) == len(where)
    assert sorted(seen_slots) == list(range(completion_offsets(rows)[-1]))


@pytest.mark.parametrize("seed", range(5))
def test_nested_prefixes_have_the_same_logits(seed):
    model, rows = tiny_llama(max_position_embeddings=256), nested_rows(seed)
    assert_same(model, rows, max_tokens=256)


def test_the_prefix_is_computed_once():
    rows = shared_rows(count=5, shared=20)
    (batch,) = make_batches(rows, 200, model=tiny_llama())
    assert batch.tokens.sum() == 20 + sum(len(row) - 20 for row in rows)
    assert batch.input_ids.shape[0] == 1


def test_several_packs_share_a_batch():
    model = tiny_llama(max_position_embeddings=512)
    rows = [row for seed in range(3) for row in shared_rows(4, shared=25, seed=seed, start=4 * seed)]
    (batch,) = assert_same(model, rows, max_tokens=200)
    assert batch.input_ids.shape[0] == 3 and len(batch.items) == 12


def test_rows_of_the_same_prompt_predict_from_a_token_of_their_own():
    prompt = tuple(range(3, 23))
    rows = [Row(index, "", "", prompt, (30 + index, 5)) for index in range(3)]
    (batch,) = make_batches(rows, 200, model=tiny_llama())
    assert batch.tokens.sum() == 19 + 3 * 3
    assert_same(tiny_llama(), rows)


def test_without_a_model_rows_are_padded():
    rows = shared_rows()
    (batch,) = make_batches(rows, 200)
    assert batch.segments is None and batch.input_ids.shape[0] == len(rows)
    assert batch.model_inputs().keys() == {"input_ids", "attention_mask"}
    assert torch.equal(batch.model_inputs()["attention_mask"], batch.attention_mask)


def test_batches_stay_ordered_by_length_and_within_the_budget():
    rows = nested_rows(3) + shared_rows(6, shared=30, start=100)
    for model in (None, tiny_llama()):
        batches = make_batches(rows, 60, model=model)
        assert all(batch.input_ids.numel() <= 60 for batch in batches if len(batch.input_ids) > 1)
        assert sum(len(batch.items) for batch in batches) == len(rows)
        for packed in (False, True):
            lengths = [b.input_ids.shape[1] for b in batches if (b.segments is not None) == packed]
            assert lengths == sorted(lengths)


def test_an_offloaded_model_takes_its_tokens_where_it_computes():
    model = tiny_llama()
    assert input_device(model) == torch.device("cpu")
    rows = shared_rows()
    expected = logits_by_slot(model, make_batches(rows, 200), rows)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    assert input_device(model) == torch.device("cpu")
    batches = make_batches(rows, 200, input_device(model), model)
    assert is_packed(batches) == [True]
    torch.testing.assert_close(logits_by_slot(model, batches, rows), expected, rtol=1e-4, atol=1e-5)
