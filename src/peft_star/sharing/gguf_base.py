"""What has to be known of a base model to write a patch for llama.cpp: its architecture, and what GGUF calls the
second matrices of its FFNs; and whether a patch fits it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM

from ..files import check_file_output
from ..models.structure import linear_shape
from .download import first_sentence, in_one_sentence, looks_like_path
from .lora import check_plain, recorded_widths
from .patch_files import Patch

GGUF_MAGIC = b"GGUF"

# What llama.cpp's converter makes of a `model_type` of transformers. Listed are those whose second matrices it takes
# as they are, up to the order in which they are stored; the tests build each of them.
ARCHITECTURES = {
    "bloom": "bloom",
    "cohere": "command-r",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mpt": "mpt",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}


@dataclass(frozen=True)
class Matrix:
    """The second matrix of an FFN.

    Attributes:
        tensor: Its name in a `.gguf` file.
        in_features: The number of neurons.
        out_features: The hidden width.
    """

    tensor: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class GgufBase:
    """A base model as llama.cpp sees it.

    Attributes:
        name: What the user calls it.
        architecture: What GGUF calls its kind of model.
        blocks: The number of layers.
        shape: (neurons, outputs) of a matrix by its names in transformers and in GGUF, or None: there is none.
    """

    name: str
    architecture: str
    blocks: int
    shape: Callable[[str, str], tuple[int, int] | None]

    @classmethod
    def read(cls, base: str | Path, *, revision: str | None = None, token: str | None = None) -> GgufBase:
        """Read of a base model what stands in its configuration or, of a `.gguf` file, in its header.

        Args:
            base: A `.gguf` file, a directory with a config.json, or a Hub id.
            revision: Branch, tag or commit, for a Hub id.
            token: Access token, for a Hub id.

        Raises:
            FileNotFoundError: Nothing lies at this path.
            ValueError: It is no model that llama.cpp is known to load.
            OSError: The Hub has no such model, refused it or did not answer.
            ImportError: The gguf package is missing.
        """
        path = Path(base).expanduser()
        if path.is_file():
            return cls.of_file(read_gguf(path), str(base))
        if not path.is_dir():
            if looks_like_path(str(base)):
                raise FileNotFoundError(f"There is no model at {base}: no such file or directory.")
            with in_one_sentence(str(base), "model"):
                path = Path(hf_hub_download(str(base), "config.json", revision=revision, token=token)).parent
        return _of_directory(path, str(base))

    @classmethod
    def of_file(cls, reader: Any, name: str) -> GgufBase:
        """A base model whose `.gguf` file is read already; errors are those of [`GgufBase.read`]."""
        architecture = gguf_value(reader, "general.architecture")
        if gguf_value(reader, "general.type") == "adapter":
            raise ValueError(f"{name} holds an adapter, not a model; give the base model instead.")
        if architecture not in import_gguf().MODEL_ARCH_NAMES.values():
            raise ValueError(f"{name} is a {architecture} model, of which the installed gguf package knows nothing.")
        if (gguf_value(reader, "split.count") or 1) > 1:
            raise ValueError(f"{name} is one of several files; join them first: llama-gguf-split --merge.")
        shapes: dict[str, Any] = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
        blocks = gguf_value(reader, f"{architecture}.block_count") or 0
        return cls(name, architecture, int(blocks), lambda module, tensor: shapes.get(tensor))

    def matrices(self, modules: Iterable[str]) -> dict[str, Matrix]:
        """The matrix that each module is.

        Args:
            modules: Names as in transformers.

        Raises:
            ValueError: One of them is not the second matrix of an FFN of this model.
        """
        gguf = import_gguf()
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(architecture, self.blocks)
        found = {}
        for module in modules:
            # a model with several modalities keeps its text model one level deeper
            known = names.get_type_and_name(f"{module.replace('language_model.', '')}.weight", (".weight",))
            kind, tensor = known or (None, "")
            shape = self.shape(module, tensor) if kind == gguf.MODEL_TENSOR.FFN_DOWN else None
            if shape is None:
                raise ValueError(
                    f"{module} is not the second matrix of an FFN of {self.name}, a {self.architecture} model of "
                    f"{self.blocks} layers; nothing else of a patch can be written for llama.cpp."
                )
            found[module] = Matrix(tensor, *shape)
        return found


def fit(patch: Patch, base: GgufBase) -> tuple[Patch, dict[str, Matrix]]:
    """A patch, checked, and the matrices that it changes, by its names of them.

    Raises:
        ValueError: It was made for a model of another architecture or size, or it holds more than neurons of FFNs.
    """
    check_plain(patch)
    own = patch.config.get("base_model_name_or_path")
    architecture = architecture_of(own) if own != base.name else None
    if architecture not in (None, base.architecture):
        raise ValueError(
            f"The patch was made for {own}, a model of another architecture ({architecture}) than {base.name} "
            f"({base.architecture})."
        )
    matrices = base.matrices(patch.neurons)
    recorded = recorded_widths(patch)
    for name, matrix in matrices.items():
        if recorded.get(name) not in (None, matrix.in_features):
            raise ValueError(
                f"The patch does not fit {base.name}: {name} has {matrix.in_features} neurons there and "
                f"{recorded[name]} in the patch."
            )
    try:
        shapes = {name: (matrix.in_features, matrix.out_features) for name, matrix in matrices.items()}
        return patch.check(shapes), matrices
    except (ValueError, TypeError) as error:
        raise ValueError(f"The patch does not fit {base.name}: {error}") from error


def check_gguf_output(
    path: Path, overwrite: bool, kind: str = "adapter", inputs: tuple[str | Path | None, ...] = ()
) -> None:
    """Refuse, before any work is done, an output that is no `.gguf` file or that may not be replaced.

    Args:
        path: The output file.
        overwrite: Whether it may be replaced.
        kind: "adapter" or "model": what is written, and nothing else is replaced.
        inputs: What the command reads.

    Raises:
        ValueError: One sentence that says why not.
    """
    path = path.expanduser()
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"{path} is no name for a GGUF file; give the output a name that ends with .gguf.")
    check_file_output(path, overwrite, GGUF_MAGIC, inputs)
    if path.exists():
        found = "adapter" if gguf_value(read_gguf(path), "general.type") == "adapter" else "model"
        if found != kind:
            raise ValueError(f"{path} holds no {kind}, so --overwrite does not replace it; choose another name.")


def import_gguf() -> Any:
    """The gguf package, which is an extra."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ImportError("This needs the gguf package: pip install 'peft_star[gguf]'") from None


def read_gguf(path: Path) -> Any:
    """Open a `.gguf` file as a `gguf.GGUFReader`, which leaves the tensors on disk until they are looked at.

    Raises:
        ValueError: It is none, or one that cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ValueError(f"{path} is not a GGUF file.")
    try:
        return import_gguf().GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {first_sentence(error)}") from error


def gguf_value(reader: Any, key: str) -> Any:
    """What a `.gguf` file says under a key, or None."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def architecture_of(base: str | None) -> str | None:
    """What GGUF calls a base model's architecture, if that can be told on this machine and without the network."""
    if not base:
        return None
    path = Path(base).expanduser()
    try:
        if path.is_file():
            return gguf_value(read_gguf(path), "general.architecture")
        config = AutoConfig.from_pretrained(str(path) if path.is_dir() else base, local_files_only=True)
    except Exception:  # whatever a configuration of unknown origin raises
        return None
    return ARCHITECTURES.get(config.model_type)


def _of_directory(path: Path, name: str) -> GgufBase:
    try:
        config = AutoConfig.from_pretrained(str(path))
    except Exception as error:
        raise ValueError(f"{name} has no configuration that can be read: {first_sentence(error)}") from error
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(
            f"What llama.cpp makes of a {config.model_type} model ({name}) is not known here; if it can load one, "
            "give the .gguf file of the base model instead."
        )
    try:
        with torch.device("meta"):
            modules = dict(AutoModelForCausalLM.from_config(config).named_modules())
    except Exception as error:
        raise ValueError(f"{name} could not be built: {first_sentence(error)}") from error
    blocks = config.get_text_config().num_hidden_layers
    return GgufBase(name, architecture, blocks, partial(_shape, modules))


def _shape(modules: Mapping[str, torch.nn.Module], module: str, tensor: str) -> tuple[int, int] | None:
    return linear_shape(modules[module]) if module in modules else None
