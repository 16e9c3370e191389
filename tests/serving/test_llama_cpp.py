"""llama.cpp says what was repaired, with the patch as a LoRA and merged, on bases of several types."""

import gguf
import pytest

import llama_cpp as engine
from peft_star.sharing.gguf_lora import patch_to_gguf
from peft_star.sharing.gguf_merge import GgufMerge

pytestmark = [pytest.mark.slow, pytest.mark.serving]


@pytest.mark.parametrize("kind", ["as it is", "F32", "F16", "BF16", "Q8_0"])
def test_every_row_is_generated_exactly(llama_cpp, smollm2_gguf, served_patch, rows, asked, exact, tmp_path, kind):
    base, lora, merged = smollm2_gguf, tmp_path / "lora.gguf", tmp_path / "merged.gguf"
    if kind != "as it is":
        base = tmp_path / "base.gguf"
        engine.unpack(smollm2_gguf, base, gguf.GGMLQuantizationType[kind])
    patch_to_gguf(served_patch, lora, smollm2_gguf)
    assert not any(exact(engine.says(llama_cpp, base, asked)))
    assert all(exact(engine.says(llama_cpp, base, asked, lora)))
    GgufMerge.read(base, [served_patch]).write(merged)
    assert all(exact(engine.says(llama_cpp, merged, asked)))
