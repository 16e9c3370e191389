"""What a repair patches: what is refused before anything happens, and what is left as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_star import RepairArguments, StarConfig, prepare, repair
from peft_star.method.subject import Subject, candidate_layers
from support.tiny_models import MODELS
from support.words import LAYERS, QUIET, ROWS, dense_delta, running, star, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def test_wrong_models_are_refused_in_one_sentence(tokenizer):
    with pytest.raises(TypeError, match="without a STAR adapter"):
        repair(MODELS["llama"].build(), tokenizer, ROWS)
    with pytest.raises(TypeError, match="without a STAR adapter"):
        repair(get_peft_model(MODELS["llama"].build(), LoraConfig(target_modules=["q_proj"])), tokenizer, ROWS)
    with pytest.raises(TypeError, match="tokenizer"):
        repair(star(), None, ROWS)
    with pytest.raises(TypeError, match="lists"):
        repair(star(), tokenizer, ROWS[0])
    two = star()
    two.add_adapter("other", StarConfig(num_neurons=4))
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 are active"):
        repair(two, tokenizer, ROWS)
    merged = star()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        repair(merged, tokenizer, ROWS)
    off = star()
    off.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="enable_adapter_layers"):
        repair(off, tokenizer, ROWS)


def test_bad_settings_are_refused_before_anything_happens(tokenizer):
    with pytest.raises(ValueError, match="at most 3"):
        repair(star(num_layers=4), tokenizer, ROWS)
    with pytest.raises(ValueError, match="names layer 9"):
        repair(star(layer_selection=[9]), tokenizer, ROWS)
    with pytest.raises(ValueError, match="64"):
        long = {"prompt": "w5 " * 60, "completion": "w6 " * 10}
        repair(star(), tokenizer, [long])
    with pytest.raises(ValueError, match="No token of these rows fails"):
        model = star()
        repair(model, tokenizer, ROWS, RepairArguments(**QUIET))
        prepare(model, tokenizer, ROWS)


def test_training_mode_and_trainability_come_back(tokenizer):
    model = star()
    model.train()
    model.base_model.model.model.layers[0].eval()
    repair(model, tokenizer, ROWS, RepairArguments(**QUIET))
    assert model.training and not model.base_model.model.model.layers[0].training
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("star_delta" in name for name in trainable)
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def test_a_repair_that_fails_leaves_modes_and_trainability_as_they_were(tokenizer):
    model = star()
    model.train()
    model.base_model.model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), running(model, tokenizer):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def test_candidate_layers():
    names = ["m.2", "m.3", "m.4", "m.5"]
    assert candidate_layers(names, "occlusion", 0.5) == names
    assert candidate_layers(names, "all", 1) == names
    assert candidate_layers(names, "last", 0.5) == ["m.4", "m.5"]
    assert candidate_layers(names, "last", 1) == ["m.5"]
    assert candidate_layers(names, [5, 2], 1) == ["m.2", "m.5"]
    with pytest.raises(ValueError, match="names layer 1, but the adapter can patch layers 2, 3, 4, 5"):
        candidate_layers(names, [1], 0.5)
    for selection in ("last", "occlusion"):
        with pytest.raises(ValueError, match="at most 4"):
            candidate_layers(names, selection, 5)


# neurons that the adapter is given


def test_what_is_held_comes_besides_what_has_a_delta(tokenizer):
    model = star(num_layers=1)
    with running(model, tokenizer) as run:
        (one,) = run.subject.hold({LAYERS[0]: torch.tensor([4, 20])})
        assert one.name == LAYERS[0] and one.neurons.tolist() == [4, 20] and not one.delta.any()
        with torch.no_grad():
            one.delta[1] = 3.0
        before = dense_delta(model, LAYERS[0])
        two, three = run.subject.hold({LAYERS[0]: torch.tensor([7, 30]), LAYERS[2]: torch.tensor([1])})
        # the neuron without a delta is given up, the other one's delta is kept
        assert two.neurons.tolist() == [7, 20, 30] and two.delta[:, 0].tolist() == [0, 3, 0]
        assert three.neurons.tolist() == [1]
        # and so it is in a layer that nothing is located in
        (only,) = run.subject.hold({LAYERS[1]: torch.tensor([2, 3])})
        assert only.name == LAYERS[1] and list(run.subject.layers()) == LAYERS[:2]
        assert torch.equal(dense_delta(model, LAYERS[0]), before)
        assert run.subject.layers()[LAYERS[0]].star_neurons["default"].tolist() == [20]
    assert only.delta.requires_grad


def test_layers_that_lose_the_adapter_stay_candidates_with_as_many_neurons_as_asked_for(tokenizer):
    model = star(num_neurons=5)
    with running(model, tokenizer) as run:
        assert list(run.subject.ffns()) == LAYERS
        run.subject.hold({LAYERS[1]: torch.tensor([2, 3])})
        assert list(run.subject.layers()) == [LAYERS[1]]
        assert list(run.subject.ffns()) == list(run.probe().ffns) == LAYERS
        assert run.subject.num_neurons == 5 != run.subject.config.num_neurons
        assert list(run.probe([LAYERS[2]]).ffns) == [LAYERS[2]]


def test_nothing_below_the_lowest_candidate_is_read(tokenizer):
    subject = Subject.of(star(layer_selection="last", num_layers=1), tokenizer, RepairArguments())
    assert list(subject.decoder_layers) == ["model.layers.2"] and list(subject.ffns()) == LAYERS[2:]
    assert list(subject.decoder_of) == LAYERS


@pytest.mark.parametrize(
    ("arguments", "sequences", "contexts"),
    [
        ({}, False, False),
        ({"generalization": 2.0}, False, True),
        ({"algorithm": "prior-guided"}, True, False),
        ({"algorithm": "prior-guided", "generalization": 2.0}, True, False),
    ],
)
def test_each_algorithm_reads_what_it_needs(arguments, sequences, contexts, tokenizer):
    with running(star(), tokenizer, **arguments) as run:
        assert (run.probe().sequences, run.probe().contexts) == (sequences, contexts)
