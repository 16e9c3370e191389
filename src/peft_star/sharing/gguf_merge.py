"""Merges patches into a copy of a model's `.gguf` file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import new_file
from .download import first_sentence
from .gguf_base import GgufBase, fit, gguf_value, import_gguf, read_gguf
from .patch_files import Patch

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GgufMerge:
    """Patches that are to be merged into a `.gguf` file.

    Attributes:
        reader: The base model's file, a `gguf.GGUFReader`.
        changes: The neurons (k,) and deltas (k, d) of each tensor that changes, in the patches' order.
    """

    reader: Any
    changes: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]

    @classmethod
    def read(cls, base: str | Path, directories: Sequence[Path]) -> GgufMerge:
        """Read patches, and hold them against their base.

        Args:
            base: The `.gguf` file.
            directories: The patches.

        Raises:
            ValueError: The base is no `.gguf` file, or a patch does not fit it or holds more than neurons of its FFNs.
            ImportError: The gguf package is missing.
        """
        path = Path(base).expanduser()
        if not path.is_file():
            raise ValueError(
                f"A .gguf file can only be made of the base model's .gguf file, and {base} is none; merge into a "
                "directory, and convert that with llama.cpp's convert_hf_to_gguf.py."
            )
        reader = read_gguf(path)
        if reader.byte_order == "S":
            raise ValueError(f"{base} was written for machines of another byte order, which cannot be merged here.")
        known = GgufBase.of_file(reader, str(base))
        changes: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for directory in directories:
            patch, matrices = fit(Patch.read(directory), known)
            for name, matrix in matrices.items():
                changes.setdefault(matrix.tensor, []).append((patch.neurons[name], patch.deltas[name]))
        return cls(reader, changes)

    def write(self, out_file: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
        """Write a copy of the base in which the patches are added to the matrices that they change.

        Everything else stays as it is: the other tensors with their types, and what the file says of the model and its
        tokenizer.

        Args:
            out_file: The file to write. It appears complete or not at all.
            dtype: What the patched matrices are stored in. None: what the base has them in, or float32 where that is
                quantised, since quantising them again would round the patch away.
            overwrite: Whether what `out_file` already holds may be replaced.

        Raises:
            ValueError: The gguf package cannot unpack a matrix.
            OSError: `out_file` could not be written.
        """
        gguf = import_gguf()
        with new_file(Path(out_file), overwrite) as temporary:
            writer = gguf.GGUFWriter(temporary, gguf_value(self.reader, "general.architecture"))
            copy_values(self.reader, writer)
            for item in self.reader.tensors:
                if item.name in self.changes:
                    kind = _type(item, dtype)
                    shape, size = [int(n) for n in reversed(item.shape)], gguf.GGML_QUANT_SIZES[kind][1]
                    # numpy has no bfloat16: the type that counts is the last
                    writer.add_tensor_info(item.name, shape, np.dtype(np.float32), item.n_elements * size, kind)
                else:
                    writer.add_tensor_info(item.name, item.data.shape, item.data.dtype, item.n_bytes, item.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for item in self.reader.tensors:
                data = item.data
                if item.name in self.changes:
                    data = gguf.quants.quantize(_patched(item, self.changes[item.name]), _type(item, dtype))
                writer.write_tensor_data(data)
            writer.close()


def _type(tensor: Any, dtype: torch.dtype | None) -> Any:
    """What a patched matrix is stored as."""
    types = import_gguf().GGMLQuantizationType
    if dtype is not None:
        return types[_TYPES.get(dtype, "F32")]
    return tensor.tensor_type if tensor.tensor_type.name in _TYPES.values() else types.F32


def _patched(tensor: Any, changes: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    """A matrix (d, m) in float32 with deltas (k, d) added to the columns of neurons (k,)."""
    try:
        weight = import_gguf().quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"The gguf package cannot unpack {tensor.name}: {first_sentence(error)}") from error
    weight = np.array(weight, dtype=np.float32)
    for neurons, delta in changes:
        weight[:, neurons.cpu().numpy()] += delta.cpu().float().numpy().T
    return weight


def copy_values(reader: Any, writer: Any) -> None:
    """Copy what a file says of its model."""
    array = import_gguf().GGUFValueType.ARRAY
    for field in reader.fields.values():
        # the reader's own names for the header, and what the writer has written itself
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name == "general.alignment":
            writer.add_custom_alignment(field.contents())
        elif field.types[0] != array:
            writer.add_key_value(field.name, field.contents(), field.types[0])
        elif field.data:  # the writer knows no empty lists, and to llama.cpp they are as good as none
            writer.add_key_value(field.name, field.contents(), array, field.types[-1])
