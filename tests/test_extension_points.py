"""A canary: what the package overrides and calls in PEFT and transformers, some of it private, is as it was.

When one of these tests fails, the installed library has changed there. Look whether the named module still does what
it should, then write the new parameters down here.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version

import pytest

from peft_star import StarConfig
from peft_star.tuner.experts import Experts
from peft_star.tuner.layer import Linear, StarLayer
from peft_star.tuner.model import StarModel

# the place, its parameters, and the module of this package that extends or calls it
POINTS = [
    ("peft.utils:register_peft_method", "name config_cls model_cls prefix is_mixed_compatible", "registration.py"),
    ("peft.tuners.tuners_utils:BaseTuner._prepare_adapter_config", "self peft_config model_config", "tuner/model.py"),
    (
        "peft.tuners.tuners_utils:BaseTuner.inject_adapter",
        "self model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict",
        "tuner/model.py",
    ),
    (
        "peft.tuners.tuners_utils:BaseTuner._create_and_replace",
        "self peft_config adapter_name target target_name parent current_key parameter_name",
        "tuner/model.py",
    ),
    (
        "peft.tuners.tuners_utils:BaseTuner._replace_module",
        "self parent child_name new_module child",
        "tuner/model.py",
    ),
    (
        "peft.tuners.tuners_utils:BaseTuner._get_adapter_state_dict",
        "model config adapter_name state_dict unwanted_adapter_names",
        "tuner/model.py",
    ),
    (
        "peft.tuners.tuners_utils:BaseTuner._remap_adapter_state_dict_for_load",
        "model config adapter_name state_dict",
        "tuner/model.py",
    ),
    ("peft.peft_model:PeftModel._enable_peft_forward_hooks", "self args kwargs", "tuner/model.py"),
    ("peft.tuners.tuners_utils:BaseTunerLayer.get_base_layer", "self", "tuner/layer.py"),
    (
        "peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer",
        "self adapter_name device",
        "tuner/layer.py",
    ),
    (
        "peft.tuners.tuners_utils:BaseTunerLayer._get_base_layer_device_and_dtype",
        "self base_layer",
        "tuner/experts.py",
    ),
    ("peft.tuners.tuners_utils:BaseTunerLayer.get_base_weight", "self", "tuner/layer.py"),
    ("peft.tuners.tuners_utils:BaseTunerLayer.supports_lora_conversion", "self adapter_name", "tuner/layer.py"),
    ("peft.tuners.tuners_utils:BaseTunerLayer.weight", None, "tuner/experts.py"),
    ("peft.tuners.tuners_utils:BaseTunerLayer.bias", None, "tuner/experts.py"),
    ("peft.tuners.tuners_utils:BaseTunerLayer.merge", "self safe_merge adapter_names", "tuner/layer.py"),
    ("peft.tuners.tuners_utils:BaseTunerLayer.unmerge", "self", "tuner/layer.py"),
    ("peft.tuners.tuners_utils:_get_in_out_features", "module", "tuner/layer.py"),
    ("peft.tuners.tuners_utils:check_adapters_to_merge", "module adapter_names", "tuner/layer.py"),
    ("peft.tuners._buffer_dict:BufferDict.__init__", "self buffers persistent", "tuner/neurons.py"),
    ("peft.tuners.tuners_utils:check_target_module_exists", "config key", "loading.py"),
    ("peft.tuners.tuners_utils:_find_minimal_target_modules", "target_modules other_module_names", "models/names.py"),
    ("peft.utils.other:_get_submodules", "model key", "tuner/model.py"),
    (
        "peft.utils.other:AuxiliaryTrainingWrapper.adapter_state_dict_load_map",
        "self adapter_name",
        "tuner/loading.py",
    ),
    ("peft.utils:get_quantization_kwargs", "model", "tuner/model.py"),
    (
        "peft.utils:resolve_quantization_backend",
        "base_layer kwargs",
        "models/quantized.py",
    ),
    ("peft.config:PeftConfigMixin.save_pretrained", "self save_directory kwargs", "tuner/config.py"),
    (
        "peft.config:PeftConfigMixin.from_pretrained",
        "pretrained_model_name_or_path subfolder kwargs",
        "tuner/config.py",
    ),
    ("peft.config:PeftConfigMixin._split_kwargs", "kwargs", "tuner/config.py"),
    ("peft.config:PeftConfigMixin.to_dict", "self", "tuner/config.py"),
    ("peft.peft_model:PeftModel.create_or_update_model_card", "self output_dir", "sharing/card.py"),
    ("transformers:PreTrainedModel._load_pretrained_model", None, "tuner/loading.py"),
    ("transformers.utils:PushToHubMixin._upload_modified_files", None, "sharing/hub.py"),
]


def found_at(place: str) -> tuple[object, list[str]]:
    """What stands at a place such as `package.module:Class.method`, and the names of its parameters."""
    module, _, path = place.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found, [] if isinstance(found, property) else list(inspect.signature(found).parameters)


def check_point(place: str, parameters: str | None, module: str) -> None:
    library = place.partition(".")[0].partition(":")[0]
    installed = f"{library} {version(library)}"
    try:
        _, names = found_at(place)
    except (ImportError, AttributeError):
        raise AssertionError(f"{installed} has no {place} any more, which peft_star/{module} builds upon.") from None
    if parameters is not None and names != parameters.split():
        raise AssertionError(
            f"{installed} has changed {place}: its parameters are now {' '.join(names)}, and were {parameters}; see "
            f"peft_star/{module}."
        )


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point[0])
def test_what_is_extended_is_as_it_was(point: tuple[str, str | None, str]) -> None:
    check_point(*point)


def test_whatever_is_overridden_is_listed() -> None:
    listed = {place.partition(":")[2] for place, _, _ in POINTS}
    for ours in (StarModel, StarLayer, Linear, Experts, StarConfig):
        for name in vars(ours):
            theirs = next((base for base in ours.__mro__[1:] if name in vars(base)), None)
            if theirs is not None and theirs.__module__.startswith(("peft.", "transformers.")):
                is_code = callable(getattr(theirs, name)) or isinstance(vars(theirs)[name], property)
                if is_code and not name.startswith("__"):
                    assert f"{theirs.__qualname__}.{name}" in listed, f"{ours.__name__}.{name} is listed nowhere"


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (
            ("peft.utils:gone", "a", "x.py"),
            r"peft [\d.]+ has no peft.utils:gone .*peft_star/x.py builds",
        ),
        (("peft.gone:a", "a", "x.py"), "has no peft.gone:a any more"),
        (
            ("peft.utils:get_quantization_kwargs", "model other", "x.py"),
            "are now model, and were model other",
        ),
    ],
)
def test_the_canary_sings(point: tuple[str, str, str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_point(*point)


def test_peft_names_its_methods_in_an_enum_that_can_be_extended() -> None:
    from peft.utils.peft_types import PeftType

    for name in ("_member_names_", "_member_map_", "_value2member_map_"):
        assert hasattr(PeftType, name), f"PeftType has no {name} any more; see peft_star/registration.py."
