"""Layers below the lowest patched one are computed once a batch; what is replayed is equal bit for bit."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_star import StarConfig
from peft_star.engine.batch import make_batches
from peft_star.engine.passes import completion_logits
from peft_star.engine.replay import Replay, replays_exactly
from peft_star.failures import Row
from peft_star.models.structure import find_decoder_layers
from peft_star.tuner.layer import star_layers
from support import tiny_models
from support.modules import hooks
from support.tiny_models import MODELS, tiny_llama

ALL = sorted(MODELS)


@dataclass(eq=False)
class Inputs:
    """Stands for a batch: token ids (rows, length), some of the last row's masked as padding."""

    ids: torch.Tensor
    padding: int = 2

    @property
    def kwargs(self) -> dict:
        mask = torch.ones_like(self.ids)
        mask[-1, self.ids.shape[1] - self.padding :] = 0
        return {"input_ids": self.ids, "attention_mask": mask, "use_cache": False}


class Calls:
    """Counts the forwards of what lies inside of a layer."""

    def __init__(self, layer: nn.Module):
        self.count = 0
        for module in layer.modules():
            if module is not layer:
                module.register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1


def layer_names(model: nn.Module) -> list[str]:
    return [name for name, _ in find_decoder_layers(model)]


def logits(model: nn.Module, inputs: Inputs, replay: Replay | None = None, **kwargs) -> torch.Tensor:
    with torch.no_grad(), replay(inputs) if replay else nullcontext():
        return model(**inputs.kwargs, **kwargs).logits


def logits_and_gradients(model: nn.Module, inputs: Inputs, context) -> list[torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with context:
        output = model(**inputs.kwargs).logits
    loss = output.log_softmax(dim=-1)[0, :, 5].sum()
    return [output.detach(), *torch.autograd.grad(loss, parameters)]


def forwards(model: nn.Module) -> list:
    return [vars(module).get("forward") for module in model.modules()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("lowest", [0, 1, 2])
@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients_are_bit_equal(name, lowest):
    tiny = MODELS[name]
    config = StarConfig(num_neurons=5, init_weights=False, target_modules=tiny.names[lowest:])
    model = get_peft_model(tiny.build(), config).eval()
    inputs = Inputs(tiny_models.tokens(2, 9))
    full = logits_and_gradients(model, inputs, nullcontext())
    assert len(full) == 1 + tiny.layers - lowest
    assert all(gradient.any() for gradient in full[1:])

    names = layer_names(model)
    replay = Replay(model, names[lowest])
    assert replay.exact
    assert same(logits_and_gradients(model, inputs, replay(inputs)), full)
    assert (replay.nbytes > 0) == (lowest > 0)
    calls = [Calls(model.get_submodule(layer)) for layer in names]
    assert same(logits_and_gradients(model, inputs, replay(inputs)), full)
    assert [call.count > 0 for call in calls] == [index >= lowest for index in range(tiny.layers)]


@pytest.mark.parametrize("name", ALL)
def test_in_front_of_what_changes_the_lowest_layer_is_replayed_bit_for_bit(name):
    tiny = MODELS[name]
    config = StarConfig(num_neurons=5, init_weights=False, target_modules=tiny.names[1:])
    model = get_peft_model(tiny.build(), config).eval()
    inputs, lowest = Inputs(tiny_models.tokens(2, 9)), layer_names(model)[1]
    changing = [name for name in star_layers(model) if name.startswith(f"{lowest}.")]
    assert len(changing) == 1
    full = logits_and_gradients(model, inputs, nullcontext())
    layers_alone, replay = Replay(model, lowest), Replay(model, lowest, changing=changing)
    for one in (layers_alone, replay):
        assert same(logits_and_gradients(model, inputs, one(inputs)), full)
    assert replay.nbytes > layers_alone.nbytes
    # nothing reads the matrices in front of the first that changes
    second = model.get_submodule(changing[0])
    before = [m for m in model.get_submodule(lowest).modules() if isinstance(m, (nn.Linear, Conv1D))]
    before = before[: next(index for index, m in enumerate(before) if m in set(second.modules()))]
    assert before
    with torch.no_grad():
        for module in before:
            module.weight.fill_(torch.nan)
    assert same(logits_and_gradients(model, inputs, replay(inputs)), full)


def test_a_change_further_up_in_the_lowest_layer_is_seen():
    """Of two modules that change, what lies between them is computed anew."""
    model, lowest = tiny_llama(), "model.layers.1"
    inputs = Inputs(tiny_models.tokens())
    changing = [f"{lowest}.self_attn.o_proj", f"{lowest}.mlp.down_proj"]
    config = StarConfig(num_neurons=5, init_weights=False, target_modules=changing)
    model = get_peft_model(model, config).eval()
    changing = [f"base_model.model.{name}" for name in changing]
    replay = Replay(model, f"base_model.model.{lowest}", changing=changing)
    logits(model, inputs, replay)
    with torch.no_grad():
        model.get_submodule(changing[0]).star_delta["default"].mul_(2)
    full = logits(model, inputs)
    assert torch.equal(logits(model, inputs, replay), full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_data_types(dtype):
    model, inputs = tiny_llama(dtype=dtype), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.2")
    full = logits(model, inputs)
    assert torch.equal(logits(model, inputs, replay), full)
    assert torch.equal(logits(model, inputs, replay), full)
    hidden = inputs.ids.numel() * 16 * 2
    assert hidden <= replay.nbytes < hidden + 16


def test_what_changes_above_is_seen_and_what_changed_below_after_a_drop():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.1")
    before = logits(model, inputs, replay)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.1)
    above = logits(model, inputs, replay)
    assert not torch.equal(above, before)
    assert torch.equal(above, logits(model, inputs))

    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(0.1)
    assert torch.equal(logits(model, inputs, replay), above)
    replay.drop(inputs)
    assert replay.nbytes == 0
    assert torch.equal(logits(model, inputs, replay), logits(model, inputs))
    assert not torch.equal(logits(model, inputs, replay), above)
    replay.drop()
    assert replay.nbytes == 0


def test_batches_interleaved():
    model = tiny_llama()
    batches = [Inputs(tiny_models.tokens(2, 8, seed=1)), Inputs(tiny_models.tokens(3, 5, seed=2))]
    full = [logits(model, batch) for batch in batches]
    replay = Replay(model, "model.layers.2")
    for _ in range(3):
        assert same([logits(model, batch, replay) for batch in batches], full)


def test_the_batches_of_a_repair():
    model = tiny_llama()
    rows = [
        Row(index=index, prompt_ids=tuple(ids[:5]), completion_ids=tuple(ids[5:]), prompt="", completion="")
        for index, ids in enumerate(tiny_models.tokens(3, 9).tolist())
    ]
    batches = make_batches(rows, max_tokens=18)
    assert len(batches) == 2
    replay = Replay(model, "model.layers.1")
    with torch.no_grad():
        full = [completion_logits(model, batch) for batch in batches]
        for _ in range(2):
            for batch, expected in zip(batches, full, strict=True):
                with replay(batch):
                    assert torch.equal(completion_logits(model, batch), expected)
    assert replay.nbytes == 27 * 16 * 4


def test_a_record_is_freed_with_its_batch():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.1")
    logits(model, inputs, replay)
    assert replay.nbytes > 0
    del inputs
    gc.collect()
    assert replay.nbytes == 0


def test_memory_stays_within_the_budget():
    model = tiny_llama()
    first, second = Inputs(tiny_models.tokens(2, 8, seed=1)), Inputs(tiny_models.tokens(2, 8, seed=2))
    replay = Replay(model, "model.layers.2", max_bytes=2 * 8 * 16 * 4 + 16)
    full = [logits(model, first), logits(model, second)]
    for _ in range(2):
        assert same([logits(model, first, replay), logits(model, second, replay)], full)
        assert 0 < replay.nbytes <= replay.max_bytes
    calls = Calls(model.model.layers[0])
    logits(model, first, replay)
    assert calls.count == 0
    logits(model, second, replay)
    assert calls.count > 0


def test_the_layers_below_have_room_before_what_the_lowest_computes():
    model, inputs = tiny_llama(), [Inputs(tiny_models.tokens(2, 8, seed=seed)) for seed in range(2)]
    lowest, changing = "model.layers.2", ["model.layers.2.mlp.down_proj"]
    whole = Replay(model, lowest, changing=changing)
    logits(model, inputs[0], whole)
    hidden = 2 * 8 * 16 * 4
    assert whole.nbytes > 2 * hidden
    replay = Replay(model, lowest, max_bytes=2 * whole.nbytes, changing=changing)
    sizes = []
    for one in inputs:
        logits(model, one, replay)
        sizes.append(replay.nbytes)
    assert sizes[0] == whole.nbytes and hidden <= sizes[1] - sizes[0] < hidden + 16


@pytest.mark.parametrize("offload", ["cpu_offload", "dispatch", "disk"])
def test_accelerate_hooks_stay(offload, tmp_path):
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    full = logits(model, inputs)
    if offload == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
        places |= {f"model.layers.{index}": "disk" if offload == "disk" else "cpu" for index in range(3)}
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    before = forwards(model)
    assert any(before)
    replay = Replay(model, "model.layers.2")
    assert replay.exact
    assert torch.equal(logits(model, inputs, replay), full)
    calls = Calls(model.model.layers[1])
    assert torch.equal(logits(model, inputs, replay), full)
    assert calls.count == 0
    assert all(one is other for one, other in zip(forwards(model), before, strict=True))


@pytest.mark.parametrize("recorded", [False, True])
def test_everything_is_restored_after_an_exception(recorded):
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    full = logits(model, inputs)
    replay = Replay(model, "model.layers.2")
    if recorded:
        logits(model, inputs, replay)
    size, installed = replay.nbytes, hooks(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(model, inputs, replay)
    handle.remove()
    assert not any(forwards(model))
    assert hooks(model) == installed
    assert replay.nbytes == size
    assert torch.equal(logits(model, inputs), full)
    assert torch.equal(logits(model, inputs, replay), full)


def test_nothing_is_left_when_no_forward_was_run():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.2")
    installed = hooks(model)
    with replay(inputs):
        pass
    assert hooks(model) == installed
    assert replay.nbytes == 0


def test_hooks_on_the_layers_do_the_same():
    """Hooks of others change what leaves the last layer below, and what enters the lowest one, in every forward."""
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + 1)
    model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    full = logits(model, inputs)
    replay = Replay(model, "model.layers.2")
    assert replay.exact
    seen.clear()
    for _ in range(3):
        assert torch.equal(logits(model, inputs, replay), full)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_a_record_is_not_changed_in_place():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    model.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    full = logits(model, inputs)
    replay = Replay(model, "model.layers.2")
    assert replay.exact
    for _ in range(3):
        assert torch.equal(logits(model, inputs, replay), full)


def test_two_forwards_in_one_context_are_not_recorded():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    other = Inputs(tiny_models.tokens(seed=1))
    full = logits(model, inputs)
    replay = Replay(model, "model.layers.2")
    with replay(inputs):
        logits(model, inputs)
        logits(model, other)
    assert replay.nbytes == 0
    assert torch.equal(logits(model, inputs, replay), full)


def computed_in_full(model: nn.Module, inputs: Inputs, replay: Replay, **kwargs) -> bool:
    """Whether a forward within the replay runs the lowest layer."""
    calls = Calls(model.get_submodule(layer_names(model)[0]))
    logits(model, inputs, replay, **kwargs)
    return calls.count > 0


def test_a_forward_that_returns_more_than_logits_is_computed_in_full():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.2")
    logits(model, inputs, replay)
    assert not computed_in_full(model, inputs, replay)
    with torch.no_grad():
        full = model(**inputs.kwargs, output_hidden_states=True).hidden_states
        with replay(inputs):
            assert same(model(**inputs.kwargs, output_hidden_states=True).hidden_states, full)
        cached = {**inputs.kwargs, "use_cache": True}
        full = model(**cached).past_key_values
        with replay(inputs):
            replayed = model(**cached).past_key_values
    for one, other in zip(full.layers, replayed.layers, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_a_cache_that_is_passed_is_filled():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.2")
    for _ in range(2):
        cache = transformers.DynamicCache()
        logits(model, inputs, replay, past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [inputs.ids.shape[1]] * 3
    assert replay.nbytes == 0


def tiny_gemma3_with_vision() -> transformers.PreTrainedModel:
    """A model whose configuration holds another one for its text."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=MODELS["gemma3"].settings, vision_config={**vision, "image_size": 8, "patch_size": 4}
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3_with_vision])
def test_a_cache_that_the_config_asks_for_is_filled(build):
    model, inputs = build(), Inputs(tiny_models.tokens())
    replay = Replay(model, layer_names(model)[2])
    assert replay.exact
    with torch.no_grad():
        for _ in range(2):
            with replay(inputs):
                cache = model(inputs.ids).past_key_values
            assert [layer.get_seq_length() for layer in cache.layers] == [inputs.ids.shape[1]] * 3
    assert replay.nbytes == 0
    full = logits(model, inputs)
    for _ in range(2):
        assert torch.equal(logits(model, inputs, replay), full)
    assert replay.nbytes > 0


@pytest.mark.parametrize("regional", [False, True])
def test_compiled_models(regional):
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    full = logits(model, inputs)
    for module in model.model.layers if regional else [model]:
        module.compile(backend="eager")
    replay = Replay(model, "model.layers.2")
    other = Inputs(tiny_models.tokens(seed=1))
    for _ in range(2):
        assert torch.equal(logits(model, inputs, replay), full)
        logits(model, other, replay)
    assert torch.equal(logits(model, inputs), full)


def test_training_mode_is_computed_in_full():
    """Dropout is drawn anew, and gradient checkpointing runs layers again after the context is left."""
    model, inputs = tiny_models.tiny_gpt2(), Inputs(tiny_models.tokens())
    replay = Replay(model, "transformer.h.2")
    logits(model, inputs, replay)
    assert not computed_in_full(model, inputs, replay)
    model.train()
    model.gradient_checkpointing_enable()
    assert computed_in_full(model, inputs, replay)
    assert not torch.equal(logits(model, inputs, replay), logits(model, inputs, replay))
    model.eval()
    assert not computed_in_full(model, inputs, replay)


def test_inference_mode_is_computed_in_full():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.2")
    with torch.inference_mode():
        logits(model, inputs, replay)
    assert replay.nbytes == 0


def test_layers_that_talk_to_other_processes_are_computed_in_full():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.2")
    logits(model, inputs, replay)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert not computed_in_full(model, inputs, replay)  # each process has the whole model
        model._tp_size = 2  # what transformers sets under tensor parallelism
        assert computed_in_full(model, inputs, replay)
        del model._tp_size
    finally:
        torch.distributed.destroy_process_group()
    assert not computed_in_full(model, inputs, replay)


def test_mixture_of_experts():
    model, inputs = tiny_models.tiny_mixtral(), Inputs(tiny_models.tokens())
    replay = Replay(model, "model.layers.2")
    full = logits(model, inputs)
    for _ in range(2):
        assert torch.equal(logits(model, inputs, replay), full)
    with torch.no_grad():
        expected = model(**inputs.kwargs, output_router_logits=True).router_logits
        with replay(inputs):
            assert same(model(**inputs.kwargs, output_router_logits=True).router_logits, expected)


def test_shared_keys_and_values_are_computed_in_full():
    """The upper layers of Gemma 3n read keys and values of lower ones."""
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **{**MODELS["gemma3"].settings, "num_hidden_layers": 4, "intermediate_size": [40] * 4},
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=tiny_models.VOCAB,
        hidden_size_per_layer_input=4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    inputs = Inputs(tiny_models.tokens())
    full = logits(model, inputs)
    for lowest in layer_names(model)[1:]:
        replay = Replay(model, lowest)
        assert not replay.exact
        for _ in range(2):
            assert torch.equal(logits(model, inputs, replay), full)


def test_upper_layers_that_read_lower_ones_are_noticed():
    model = tiny_llama()
    assert replays_exactly(model, "model.layers.2")
    other = tiny_llama()
    lower = []
    other.model.layers[0].register_forward_hook(lambda module, args, output: lower.append(output))
    other.model.layers[2].register_forward_hook(lambda module, args, output: output + lower.pop())
    assert not replays_exactly(other, "model.layers.2")
    # what the layer below returned is all there is to read
    assert replays_exactly(other, "model.layers.1")


def test_a_layer_that_runs_twice_is_computed_in_full():
    model, inputs = tiny_llama(), Inputs(tiny_models.tokens())
    model.model.layers[1] = model.model.layers[0]
    full = logits(model, inputs)
    assert not Replay(model, "model.layers.2").exact
    replay = Replay(model, "model.layers.2", check=False)
    for _ in range(2):
        assert torch.equal(logits(model, inputs, replay), full)
    assert replay.nbytes == 0


def test_the_check_is_made_once_for_a_model_and_layer():
    model = tiny_llama()
    calls = Calls(model)
    Replay(model, "model.layers.2")
    assert calls.count > 0
    calls.count = 0
    assert Replay(model, "model.layers.2").exact
    assert calls.count == 0
    assert replays_exactly(model, "model.layers.2", Inputs(tiny_models.tokens()).kwargs)
    assert calls.count > 0


def test_a_check_that_cannot_run_says_no():
    model = tiny_llama()
    model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    assert not replays_exactly(model, "model.layers.2")
    assert not any(forwards(model))


@pytest.mark.parametrize("lowest", ["model.layers.3", "model.layers", "lm_head", "", "no.such.layer"])
def test_names_that_are_no_layers(lowest):
    with pytest.raises(ValueError, match="is not a layer of LlamaForCausalLM; give a name"):
        Replay(tiny_llama(), lowest)
