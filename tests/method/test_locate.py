"""Locating: which layers, then which neurons in them (paper section 3.1)."""

import pytest
import torch

from peft_star import RepairArguments, repair
from peft_star.method.locate import enough_neurons, locate, select_layers, select_neurons
from peft_star.method.trace import trace
from peft_star.tuner.layer import count_of
from support.words import LAYERS, QUIET, ROWS, running, star, word_tokenizer


def test_patterns():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0, 0.0]), "b": torch.tensor([9.0, 8.0, 7.0, 0.5])}
    layer_wise = select_neurons(scores, 2, "layer-wise")
    assert {key: value.tolist() for key, value in layer_wise.items()} == {"a": [0, 2], "b": [0, 1]}
    model_wise = select_neurons(scores, 2, "model-wise")
    assert {key: value.tolist() for key, value in model_wise.items()} == {"a": [0], "b": [0, 1, 2]}
    shares = select_neurons(scores, 0.25, "model-wise")
    assert {key: value.tolist() for key, value in shares.items()} == {"b": [0, 1]}
    with pytest.raises(ValueError, match="at most 4"):
        select_neurons(scores, 5)


def test_layer_selection():
    importance = {"m.2": 0.1, "m.3": -5.0, "m.4": 2.0, "m.5": 0.0}
    assert select_layers(importance, "occlusion", 2) == ["m.3", "m.4"]
    assert select_layers(importance, "occlusion", 0.75) == ["m.2", "m.3", "m.4"]
    assert select_layers(importance, "all", 1) == list(importance)
    assert select_layers(importance, [5, 2], None) == list(importance)
    with pytest.raises(ValueError, match="at most 4"):
        select_layers(importance, "occlusion", 5)


def test_counts_and_shares():
    assert [count_of(x, 30, "layers") for x in (3, 0.5, 1.0, 0.001)] == [3, 15, 30, 1]


# of a trace


def located(name, occlusion="first-order", **config):
    """What is located in ROWS, the trace, and what the journal says of the layers."""
    tokenizer = word_tokenizer()
    with running(star(name, **config), tokenizer, occlusion=occlusion) as run:
        batches = run.engine.batches(run.subject.encode(ROWS, "row"))
        traced = trace(run.engine, batches, run.probe())
        return locate(run, traced), traced, run.journal


def strongest(importance, count):
    names = list(importance)
    chosen = sorted(names, key=lambda name: -abs(importance[name]))[:count]
    return [name for name in names if name in chosen]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_layers_are_chosen_by_the_occlusion_that_is_asked_for(name):
    chosen = {}
    for occlusion in ("first-order", "exact"):
        found, traced, journal = located(name, occlusion, layer_selection="occlusion", num_layers=1)
        (module,) = found
        chosen[occlusion] = [layer for layer in traced.occlusion if module.startswith(f"{layer}.")]
        assert chosen[occlusion] == strongest(journal.occlusion[occlusion], 1)
        assert journal.occlusion["first-order"] == traced.occlusion
        assert torch.equal(found[module], traced.scores()[module].topk(8).indices.sort().values)
    # each by its own
    assert chosen["first-order"] != chosen["exact"]


def test_without_a_choice_of_layers_none_is_skipped():
    """There is nothing to measure, since all are taken."""
    found, traced, journal = located("llama", "exact", layer_selection="all")
    assert list(found) == list(traced.layers) and set(journal.occlusion) == {"first-order"}


def test_model_wise_neurons_are_not_bound_to_the_chosen_layers():
    found, traced, _ = located("llama", layer_selection="occlusion", num_layers=1, neuron_pattern="model-wise")
    wanted = select_neurons(traced.scores(), 8, "model-wise")
    assert list(found) == list(wanted) and len(found) > 1
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(
    "failures, width, wanted", [(1, 1536, 64), (8, 1536, 64), (9, 1536, 72), (500, 1536, 1536), (1, 32, 32)]
)
def test_neurons_follow_the_load(failures, width, wanted):
    assert enough_neurons(failures, {"a": torch.zeros(width), "b": torch.zeros(width + 1)}) == wanted


def test_a_number_that_was_asked_for_is_kept():
    tokenizer, counts, models = word_tokenizer(), {}, {}
    for asked in (4, "auto"):
        models[asked] = star(num_neurons=asked)
        report = repair(models[asked], tokenizer, ROWS, RepairArguments(reach="prompt", **QUIET))
        counts[asked] = {len(layer.neurons) for layer in report.layers}
    width = models[4].base_model.model.get_submodule(LAYERS[0]).in_features
    assert counts == {4: {4}, "auto": {width}} and width < 64
    config = models["auto"].peft_config["default"]
    assert config.num_neurons == "auto" and set(config.neurons_per_module.values()) == {width}
