"""Writes a patch as a LoRA for llama.cpp, in one `.gguf` file.

llama.cpp adds B A, scaled by `adapter.lora.alpha` over the rank of each pair (an alpha of 0 means a scale of 1). Alpha
is one for the whole file, so all pairs have one rank, as in the LoRA of `lora.py`, and alpha equals it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import new_file
from .download import find_patch
from .gguf_base import GgufBase, check_gguf_output, fit, import_gguf
from .lora import lora_pairs
from .patch_files import Patch


def patch_to_gguf(
    patch: str | Path,
    out_file: str | Path,
    base: str | Path | None = None,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Write a saved patch as an exact LoRA for llama.cpp.

    Args:
        patch: A directory or a Hub id.
        out_file: The `.gguf` file to write. It appears complete or not at all.
        base: The base model: a `.gguf` file, a directory with a config.json, or a Hub id; no weights are read. None:
            the one that the patch names.
        overwrite: Whether an adapter that `out_file` already holds may be replaced.
        revision: Branch, tag or commit of `base` on the Hub.
        token: Access token for the Hub.

    Returns:
        The "base" that was asked, its "architecture", and the "rank".

    Raises:
        ValueError: It is no patch or a damaged one, it holds what a plain LoRA cannot, it does not fit the base, or
            `out_file` cannot be written.
        FileNotFoundError: Nothing lies at the path of the patch or of the base.
        OSError: The Hub has no such model, refused it or did not answer.
        ImportError: The gguf package is missing.
    """
    gguf, path = import_gguf(), Path(out_file).expanduser()
    directory = find_patch(patch)
    found = Patch.read(directory)
    if base is None:
        base, revision = found.config.get("base_model_name_or_path"), found.config.get("revision")
        if not base:
            raise ValueError(f"{patch} does not say which base model it is for; give that, too (--base).")
    check_gguf_output(path, overwrite, inputs=(base,))
    known = GgufBase.read(base, revision=revision, token=token)
    found, matrices = fit(found, known)

    rank = max(neurons.numel() for neurons in found.neurons.values())
    pairs = lora_pairs(found, {name: matrix.in_features for name, matrix in matrices.items()}, rank)
    with new_file(path, overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, known.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for name, (down, up) in pairs.items():
            writer.add_tensor(f"{matrices[name].tensor}.lora_a", down.float().numpy())
            writer.add_tensor(f"{matrices[name].tensor}.lora_b", up.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {"base": str(base), "architecture": known.architecture, "rank": rank}
