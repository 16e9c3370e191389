"""Batches, padded and packed: the same tokens, positions, logits and gradients; the common prefix computed once."""

import random

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import get_peft_model

from peft_star import StarConfig
from peft_star.engine import prefix
from peft_star.engine.batch import completion_offsets, make_batches
from peft_star.engine.packs import Pack, prefix_mask
from peft_star.engine.passes import completion_logits, loss_at
from peft_star.engine.prefix import can_pack, pack_rows
from peft_star.failures import Row
from peft_star.models.inputs import input_device
from support.rows import is_packed, shared_rows
from support.tiny_models import _LLAMA_LIKE, MODELS, VOCAB, tiny_llama, tiny_mixtral

# what they compute depends on where a token stands, not on its position, or they take no positions
UNPACKED = {"bloom", "mpt"}


def logits_by_slot(model, batches, rows):
    total = completion_offsets(rows)[-1]
    found = None
    for batch in batches:
        logits = completion_logits(model, batch)
        found = torch.zeros(total, logits.shape[-1], dtype=logits.dtype) if found is None else found
        found[batch.slots] = logits.detach()
    return found


def gradients(model, batches):
    model.zero_grad()
    for batch in batches:
        loss_at(completion_logits(model, batch), batch, torch.arange(len(batch))).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model, rows, max_tokens=200, rtol=1e-4):
    """Packed and padded batches agree; returns the packed ones."""
    packed, padded = make_batches(rows, max_tokens, model=model), make_batches(rows, max_tokens)
    assert not any(is_packed(padded))
    expected = torch.cat([batch.expected[batch.slots.argsort()] for batch in sorted(padded, key=lambda b: b.slots[0])])
    assert expected.numel() == completion_offsets(rows)[-1]
    a, b = logits_by_slot(model, packed, rows), logits_by_slot(model, padded, rows)
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.std().item())
    ours, theirs = gradients(model, packed), gradients(model, padded)
    assert ours.keys() == theirs.keys()
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        # the gradients of keys' biases are sums that cancel
        error = (ours[name] - gradient).norm() / (gradient.norm() + 1e-4 * largest)
        assert error < rtol, f"{name}: {error}"
    return packed


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


def nested_rows(seed):
    """Rows with common prefixes of several lengths, some the same, some alone, in any order."""
    rng = random.Random(seed)
    stems = [[rng.randrange(3, 9) for _ in range(rng.randrange(1, 30))] for _ in range(3)]
    stems.append(stems[0] + [rng.randrange(3, 9) for _ in range(12)])
    rows = []
    for index in range(rng.randrange(1, 14)):
        prompt = rng.choice(stems) + [rng.randrange(3, 9) for _ in range(rng.randrange(0, 6))]
        completion = [rng.randrange(3, 9) for _ in range(rng.randrange(1, 5))]
        rows.append(Row(index, "", "", tuple(prompt), tuple(completion)))
    rng.shuffle(rows)
    return rows


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


def test_padding_sees_something():
    """A row of the mask that is all closed would put NaN into some attentions."""
    mask = prefix_mask(torch.tensor([[0, 0, 1, 2, -1, -1]]), torch.float32)
    assert (mask == 0).any(dim=-1).all()


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


def test_rows_with_little_in_common_are_padded():
    model = tiny_llama()
    assert is_packed(make_batches(shared_rows(shared=1, own=8), 200, model=model)) == [False]
    assert model not in prefix._CAN_PACK  # nothing to pack, nothing to try


def test_batches_stay_ordered_by_length_and_within_the_budget():
    rows = nested_rows(3) + shared_rows(6, shared=30, start=100)
    for model in (None, tiny_llama()):
        batches = make_batches(rows, 60, model=model)
        assert all(batch.input_ids.numel() <= 60 for batch in batches if len(batch.input_ids) > 1)
        assert sum(len(batch.items) for batch in batches) == len(rows)
        for packed in (False, True):
            lengths = [b.input_ids.shape[1] for b in batches if (b.segments is not None) == packed]
            assert lengths == sorted(lengths)


def test_a_pack_stays_within_the_budget_and_the_positions_there_are():
    rows = shared_rows(20, shared=14)
    for model, max_tokens, longest in ((tiny_llama(max_position_embeddings=512), 50, 50), (tiny_llama(), 500, 64)):
        packs = pack_rows(rows, max_tokens, model)
        assert len(packs) > 1 and max(map(len, packs)) <= longest and max(len(pack.rows) for pack in packs) > 1


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "mistral", "qwen2"])
def test_rows_that_fit_a_sliding_window_are_packed_beyond_it(name):
    model = MODELS[name].build(sliding_window=24, max_position_embeddings=512)
    (batch,) = assert_same(model, shared_rows(8))
    assert batch.segments is not None and batch.input_ids.shape[1] > 24


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "mistral"])
def test_rows_longer_than_a_sliding_window_are_padded(name):
    model = MODELS[name].build(sliding_window=16, max_position_embeddings=512)
    short, long = shared_rows(4, shared=10, own=2), shared_rows(4, shared=20, start=4)
    assert max(map(len, short)) <= 16 < min(map(len, long))
    plain, packed = assert_same(model, short + long)
    assert {row.index for row in plain.items} == {row.index for row in long}
    assert {row.index for row in packed.items} == {row.index for row in short}


def test_a_window_by_index_holds_the_whole_pack(monkeypatch):
    """GPT-Neo's local attention masks by the place in the sequence, whatever the positions say."""
    rows = shared_rows(8)
    model = MODELS["gpt_neo"].build(window_size=40, max_position_embeddings=512)
    packed = assert_same(model, rows)
    assert any(is_packed(packed)) and max(batch.input_ids.shape[1] for batch in packed) <= 40
    monkeypatch.setattr(prefix, "_limits", lambda model: (512, 512))
    with pytest.raises(AssertionError):
        assert_same(model, rows)


class OwnCode(transformers.MistralForCausalLM):
    """A class from outside of transformers may apply its window as it likes."""


def test_windows_of_models_from_elsewhere_hold_the_whole_pack():
    model = OwnCode(transformers.MistralConfig(**{**_LLAMA_LIKE, "max_position_embeddings": 512}, sliding_window=24))
    assert prefix._limits(model)[1] == 24
    assert prefix._limits(MODELS["mistral"].build(sliding_window=24))[0] == 24


# models that cannot be packed


def unpackable(name):
    torch.manual_seed(0)
    small = {key: value for key, value in _LLAMA_LIKE.items() if key != "max_position_embeddings"}
    if name == "alibi":
        return MODELS["falcon"].build(alibi=True)
    if name == "mamba":
        config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    elif name == "jamba":
        config = transformers.JambaConfig(
            **small, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
        )
    elif name == "convolution":
        config = transformers.Lfm2Config(**small, layer_types=["conv", "full_attention", "conv"])
    else:
        config = transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, context_length=64)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["alibi", "mamba", "jamba", "convolution", "recurrence"])
def test_other_models_get_padded_batches(name):
    model = unpackable(name)
    assert not can_pack(model)
    assert is_packed(make_batches(shared_rows(), 200, model=model)) == [False]


@pytest.mark.parametrize("name", ["jamba", "convolution", "mpt"])
def test_the_probe_finds_them_by_what_they_compute(name):
    assert not prefix._probe(MODELS["mpt"].build() if name == "mpt" else unpackable(name))


def test_flash_attention_is_not_even_tried(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(prefix, "_probe", lambda model: pytest.fail("tried"))
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    assert model.config._attn_implementation == "flash_attention_2"
    assert not can_pack(model)


def test_positions_that_are_ignored_are_noticed():
    model = tiny_llama()
    forward = model.model.forward

    def by_index(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    model.model.forward = by_index
    assert not can_pack(model)


def test_a_mask_that_is_ignored_is_noticed():
    model = tiny_llama()
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    assert not can_pack(model)


def test_a_model_that_refuses_the_mask_gets_padded_batches():
    model = tiny_llama()
    forward = model.model.forward

    def refuses(*args, attention_mask=None, **kwargs):
        if attention_mask.ndim != 2:
            raise ValueError("2D masks only")
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = refuses
    assert is_packed(assert_same(model, shared_rows())) == [False]


def test_a_model_is_tried_once_for_each_attention(monkeypatch):
    tried = []
    probe = prefix._probe
    monkeypatch.setattr(prefix, "_probe", lambda model: tried.append(1) or probe(model))
    model = tiny_llama()
    for _ in range(3):
        make_batches(shared_rows(), 200, model=model)
    assert len(tried) == 1
    model.set_attn_implementation("eager")
    make_batches(shared_rows(), 200, model=model)
    assert len(tried) == 2


def test_a_model_in_training_mode_is_tried_without_dropout_and_left_as_it_was():
    model = MODELS["gpt2"].build().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert can_pack(model)
    assert [module.training for module in model.modules()] == modes


def test_the_probe_asks_for_no_gradients_and_leaves_the_random_numbers_alone():
    model = tiny_llama()
    state = torch.random.get_rng_state()
    assert can_pack(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_an_adapter_is_packed_from_outside_and_from_inside():
    model = get_peft_model(tiny_llama(), StarConfig(task_type="CAUSAL_LM", num_neurons=4, init_weights=False)).eval()
    for target in (model, model.base_model.model):
        assert is_packed(assert_same(target, shared_rows())) == [True]


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


def test_a_pack_of_one_row_is_the_row():
    (row,) = shared_rows(1)
    pack = Pack((row,))
    assert tuple(pack.input_ids()) == row.input_ids and len(pack) == len(row)
    assert pack.medium_positions() == list(row.medium_positions)
