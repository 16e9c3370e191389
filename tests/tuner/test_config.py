"""StarConfig: what it takes, what it refuses, and that it survives the disk."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME

from peft_star import StarConfig


def test_defaults():
    config = StarConfig()
    assert config.peft_type is PeftType.STAR
    assert (config.num_neurons, config.num_layers) == ("auto", 0.25)
    assert (config.layer_selection, config.neuron_pattern) == ("last", "layer-wise")
    assert config.init_weights is True
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        assert getattr(config, name) is None
    assert config.neurons_per_module is None


def test_every_field_is_explained():
    own = set(StarConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert own >= {"num_neurons", "layer_selection", "num_layers", "neuron_pattern", "neurons_per_module"}
    for name in own:
        assert StarConfig.__dataclass_fields__[name].metadata["help"]
        assert f"{name} (`" in StarConfig.__doc__


FULL = {
    "task_type": "CAUSAL_LM",
    "num_neurons": 0.25,
    "target_modules": ["down_proj", "c_proj", "fc2"],
    "exclude_modules": ["layers.1.mlp", "layers.0.mlp"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "modules_to_save": ["score"],
    "layer_selection": [2, 0],
    "num_layers": 3,
    "neuron_pattern": "model-wise",
    "init_weights": False,
    "neurons_per_module": {"model.layers.0.mlp.down_proj": 7},
}


@pytest.mark.parametrize("cls", [StarConfig, PeftConfig])
@pytest.mark.parametrize("values", [{}, FULL, {"target_modules": ".*down_proj"}, {"num_neurons": 1.0}])
def test_round_trip(cls, values, tmp_path):
    config = StarConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(str(tmp_path))
    assert type(loaded) is StarConfig
    assert loaded == config
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.num_neurons) is type(config.num_neurons)
    for name, value in values.items():
        expected = set(value) if name in ("target_modules", "exclude_modules") and isinstance(value, list) else value
        expected = sorted(value) if name == "layer_selection" and isinstance(value, list) else expected
        assert getattr(loaded, name) == expected


def test_saved_file_is_reproducible(tmp_path):
    """Sets of strings are ordered differently in each process; the file must not be."""
    names = [f"layers.{index}.down_proj" for index in range(20)]
    StarConfig(target_modules=names, exclude_modules=names).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert saved["target_modules"] == saved["exclude_modules"] == sorted(names)


def test_numpy_numbers_become_plain_ones(tmp_path):
    config = StarConfig(num_neurons=np.int64(3), num_layers=np.float32(0.5), layer_selection=np.arange(2).tolist())
    assert type(config.num_neurons) is int and type(config.num_layers) is float
    config.save_pretrained(tmp_path)
    assert StarConfig.from_pretrained(str(tmp_path)) == config


def test_unknown_keys_of_a_later_version_are_ignored_with_a_warning(tmp_path):
    StarConfig(num_neurons=3).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(str(tmp_path)).num_neurons == 3


@pytest.mark.parametrize("name", ["num_neurons", "num_layers"])
@pytest.mark.parametrize("value", [1, 7, 0.001, 1.0])
def test_amounts_that_are_fine(name, value):
    assert getattr(StarConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["num_neurons", "num_layers"])
@pytest.mark.parametrize("value", [0, -1, 0.0, -0.5, 1.5, 64.0, math.nan, math.inf, -math.inf, np.int64(0)])
def test_amounts_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^`{name}`"):
        StarConfig(**{name: value})


@pytest.mark.parametrize("name", ["num_neurons", "num_layers"])
@pytest.mark.parametrize("value", [True, False, None, "64", [64], 1 + 0j])
def test_amounts_of_the_wrong_type(name, value):
    with pytest.raises(TypeError, match=f"^`{name}` should be an int"):
        StarConfig(**{name: value})


@pytest.mark.parametrize(
    "error, values, message",
    [
        (ValueError, {"neuron_pattern": "layerwise"}, "'layer-wise', 'model-wise'"),
        (ValueError, {"neuron_pattern": None}, "'layer-wise', 'model-wise'"),
        (ValueError, {"layer_selection": "best"}, "'occlusion', 'last', 'all' or a list"),
        (ValueError, {"layer_selection": []}, "empty list"),
        (ValueError, {"layer_selection": [1, 1]}, "twice"),
        (ValueError, {"layer_selection": [-1]}, "counted from 0"),
        (TypeError, {"layer_selection": [0.5]}, "layer indices"),
        (TypeError, {"layer_selection": [True]}, "layer indices"),
        (TypeError, {"layer_selection": 3}, "list of layer indices"),
        (TypeError, {"layer_selection": None}, "list of layer indices"),
        (TypeError, {"init_weights": 1}, "True or False"),
        (TypeError, {"init_weights": "gaussian"}, "True or False"),
        (TypeError, {"layers_to_transform": ["a"]}, "layer indices"),
        (TypeError, {"layers_to_transform": True}, "layer indices"),
        (ValueError, {"layers_to_transform": -1}, "counted from 0"),
        (ValueError, {"layers_to_transform": 1, "target_modules": ".*"}, "cannot be used when `target_modules`"),
        (ValueError, {"layers_pattern": "h", "target_modules": ".*"}, "cannot be used when `target_modules`"),
        (ValueError, {"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        (TypeError, {"neurons_per_module": ["a"]}, "dict from full module names"),
        (TypeError, {"neurons_per_module": {1: 1}}, "full module names"),
        (TypeError, {"neurons_per_module": {"a": 0.5}}, "should be an int"),
        (TypeError, {"neurons_per_module": {"a": True}}, "should be an int"),
        (ValueError, {"neurons_per_module": {"a": 0}}, "1 or more"),
        (ValueError, {"task_type": "NO_TASK"}, "Invalid task type"),
    ],
)
def test_bad_values(error, values, message):
    with pytest.raises(error, match=message) as raised:
        StarConfig(**values)
    assert len(str(raised.value).splitlines()) == 1


def test_bad_values_in_a_file(tmp_path):
    StarConfig().save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_neurons": -5}))
    with pytest.raises(ValueError, match="`num_neurons` should be a positive number"):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("pattern", ["(a+)+$", "("])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_strangers_pattern_is_never_run_before_it_is_looked_at(tmp_path, field, pattern):
    """Also where the configuration is read by PEFT's own class, as transformers does."""
    others = {"layers_to_transform": [0], "target_modules": ["a"]} if field == "layers_pattern" else {}
    StarConfig(**others).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: pattern}))
    for cls in (StarConfig, PeftConfig):
        with pytest.raises(ValueError, match=f"`{field}` is (a|no) regular expression that"):
            cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [[None], [""], "score", [3], ["(a+)+"]])
def test_modules_to_save_are_names(value):
    with pytest.raises(TypeError, match="`modules_to_save` should be a list of names"):
        StarConfig(modules_to_save=value)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "layers_pattern"])
def test_modules_are_named_by_text(name):
    settings = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    with pytest.raises(TypeError, match=f"`{name}` should be a list of names of modules or a pattern"):
        StarConfig(**{name: ["down_proj", None], **settings})
