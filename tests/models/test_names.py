"""Names of modules without what wraps them, and selections of just some of them."""

from __future__ import annotations

import re

import pytest
from peft import get_peft_model

from peft_star import StarConfig
from peft_star.models.names import check_pattern, condense, matches, own_keys, plain_name, select
from support.tiny_models import MODELS, tiny_llama

KEYS = ["a.0.fc", "a.1.fc", "a.1.up", "b.a.0.fc"]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp",
        "base_model.model.model.layers.0.mlp",
        "_orig_mod.model.layers.0._orig_mod.mlp",
        "_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp",
        "_orig_mod.base_model.model.model.layers.0.mlp",
    ],
)
def test_plain_names(name):
    assert plain_name(name) == "model.layers.0.mlp"


def test_what_lies_in_a_tuner_layer_is_no_key():
    model = get_peft_model(tiny_llama(), StarConfig(num_neurons=2))
    keys = [plain_name(key) for key in own_keys(model)]
    assert set(MODELS["llama"].names) < set(keys)
    assert not any(".base_layer" in key or ".star_" in key for key in keys)


@pytest.mark.parametrize("targets", [["a.1.fc"], ["a.0.fc"], ["b.a.0.fc"], ["a.0.fc", "b.a.0.fc"], KEYS])
def test_a_selection_selects_just_these(targets):
    selection = select(targets, KEYS)
    if isinstance(selection, str):
        chosen = [key for key in KEYS if re.fullmatch(selection, key)]
    else:
        chosen = [key for key in KEYS if matches(selection, key)]
    assert chosen == [key for key in KEYS if key in targets]
    assert isinstance(selection, str) == (targets == ["a.0.fc"])  # the end of another name


def test_condensed_names_are_suffixes_or_nothing():
    assert condense(["a.0.fc", "a.1.fc", "b.a.0.fc"], KEYS) == {"fc"}
    assert condense(["a.0.fc"], KEYS) is None


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(layers|h)\.\d+\.mlp\.(down_proj|c_proj)",
        r"model\.layers\.(1[0-9]|2[0-3])\.mlp\.down_proj",
        r"(.*\.)?(?!up_)\w+_proj",
        r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.",
        "all-linear",
        "|".join(re.escape(f"model.layers.{index}.mlp.down_proj") for index in range(500)),
    ],
)
def test_patterns_that_people_write_are_taken(pattern):
    check_pattern(pattern, "target_modules")


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "([a-z]+)*_", "a?" * 40 + "a" * 40, ".*.*.*.*.*x", r"(\w*\w*\.)+", "(a|aa){60}"]
)
def test_patterns_that_may_take_forever_are_refused(pattern):
    with pytest.raises(ValueError, match="`target_modules` is a regular expression that may take forever"):
        check_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", ["(", "*a", "[z-a]", "(" * 100_000, "a{99999999999999999999}"])
def test_patterns_that_are_none_are_refused(pattern):
    with pytest.raises(ValueError, match="`x` is no regular expression that can be used"):
        check_pattern(pattern, "x")
