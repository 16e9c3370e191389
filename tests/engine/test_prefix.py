"""Which rows are packed: where it pays and fits, in models that are found to compute the same then."""

import pytest
import torch
import transformers
from peft import get_peft_model

from peft_star import StarConfig
from peft_star.engine import prefix
from peft_star.engine.batch import make_batches
from peft_star.engine.prefix import can_pack, pack_rows
from support.rows import assert_same, is_packed, shared_rows
from support.tiny_models import _LLAMA_LIKE, MODELS, VOCAB, tiny_llama


def test_rows_with_little_in_common_are_padded():
    model = tiny_llama()
    assert is_packed(make_batches(shared_rows(shared=1, own=8), 200, model=model)) == [False]
    assert model not in prefix._CAN_PACK  # nothing to pack, nothing to try


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
