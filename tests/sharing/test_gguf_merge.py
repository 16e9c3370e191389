"""Patches merged into a `.gguf` file: the patched matrices, and everything else as it was."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from peft_star.sharing.gguf_merge import GgufMerge
from peft_star.sharing.patch_files import write_adapter
from support.byte_llama import build_model
from support.gguf_models import read_tensors, read_values, write_llama

NAME = "model.layers.2.mlp.down_proj"
PATCHED = "blk.2.ffn_down.weight"


def save_patch(directory: Path, seed: int, name: str = NAME) -> torch.Tensor:
    """Write a patch of three neurons of one module, and return its delta (d, m)."""
    torch.manual_seed(seed)
    neurons, delta = torch.randperm(96)[:3], torch.randn(3, 32)
    directory.mkdir()
    tensors = {f"{name}.star_neurons": neurons, f"{name}.star_delta": delta}
    write_adapter(directory, {"peft_type": "STAR", "in_features": 96}, tensors)
    dense = torch.zeros(32, 96)
    dense[:, neurons] = delta.T
    return dense


@pytest.mark.parametrize(
    ("matrices", "dtype", "kind"),
    [
        ("F32", None, "F32"),
        ("F16", None, "F16"),
        ("BF16", None, "BF16"),
        ("Q8_0", None, "F32"),
        ("Q4_1", None, "F32"),
        ("Q8_0", torch.float16, "F16"),
        ("F32", torch.bfloat16, "BF16"),
    ],
)
def test_patched_matrices_and_nothing_else_change(tmp_path, matrices, dtype, kind):
    base = write_llama(tmp_path / "base.gguf", build_model(), matrices, general__alignment=64)
    dense = [save_patch(tmp_path / name, seed) for seed, name in enumerate("ab")]
    merge = GgufMerge.read(base, [tmp_path / "a", tmp_path / "b"])
    merge.write(tmp_path / "merged.gguf", dtype=dtype)
    before, after = read_tensors(base), read_tensors(tmp_path / "merged.gguf")
    assert list(after) == list(before)
    expected = torch.from_numpy(before[PATCHED][1]) + dense[0] + dense[1]
    rounded = expected.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
    assert after[PATCHED][0] == kind
    torch.testing.assert_close(torch.from_numpy(after[PATCHED][1]), rounded, atol=2e-6, rtol=0)
    old, new = (
        {item.name: item for item in gguf.GGUFReader(path).tensors} for path in (base, tmp_path / "merged.gguf")
    )
    for name in before.keys() - {PATCHED}:
        assert new[name].tensor_type == old[name].tensor_type
        np.testing.assert_array_equal(new[name].data, old[name].data)
    values = read_values(tmp_path / "merged.gguf")
    assert values == read_values(base)
    assert values["general.alignment"] == 64 and len(values["tokenizer.ggml.tokens"]) == 259


def test_types_of_what_the_file_says_are_kept(tmp_path):
    base = write_llama(tmp_path / "base.gguf", build_model(), custom__number=7)
    save_patch(tmp_path / "patch", 0)
    GgufMerge.read(base, [tmp_path / "patch"]).write(tmp_path / "merged.gguf")
    old, new = (
        {name: field.types for name, field in gguf.GGUFReader(path).fields.items()}
        for path in (base, tmp_path / "merged.gguf")
    )
    assert new == old


def test_an_empty_list_is_left_out(tmp_path):
    """The writer refuses what other writers may have written."""
    base = write_llama(tmp_path / "base.gguf", build_model(), custom__number=7)
    save_patch(tmp_path / "patch", 0)
    merge = GgufMerge.read(base, [tmp_path / "patch"])
    field = merge.reader.fields["custom.number"]
    merge.reader.fields["custom.number"] = field._replace(types=[gguf.GGUFValueType.ARRAY], data=[])
    merge.write(tmp_path / "merged.gguf")
    assert "custom.number" not in read_values(tmp_path / "merged.gguf")


def test_what_is_refused(tmp_path):
    base = write_llama(tmp_path / "base.gguf", build_model())
    save_patch(tmp_path / "patch", 0)
    save_patch(tmp_path / "attention", 0, "model.layers.2.self_attn.o_proj")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ValueError, match="can only be made of the base model's .gguf file, and .*directory is none"):
        GgufMerge.read(tmp_path / "directory", [tmp_path / "patch"])
    with pytest.raises(ValueError, match="o_proj is not the second matrix of an FFN"):
        GgufMerge.read(base, [tmp_path / "patch", tmp_path / "attention"])
    foreign = gguf.GGUFWriter(tmp_path / "foreign.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    foreign.write_header_to_file()
    foreign.write_kv_data_to_file()
    foreign.write_tensors_to_file()
    foreign.close()
    with pytest.raises(ValueError, match="another byte order"):
        GgufMerge.read(tmp_path / "foreign.gguf", [tmp_path / "patch"])


def test_a_matrix_that_cannot_be_unpacked(tmp_path, monkeypatch):
    base = write_llama(tmp_path / "base.gguf", build_model())
    save_patch(tmp_path / "patch", 0)

    def dequantize(data, kind):
        raise NotImplementedError(f"no {kind.name}")

    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    with pytest.raises(ValueError, match="cannot unpack blk.2.ffn_down.weight: no F32"):
        GgufMerge.read(base, [tmp_path / "patch"]).write(tmp_path / "merged.gguf")
    assert not list(tmp_path.glob("*merged*"))
