"""vLLM says what was repaired, with the patch as a plain LoRA."""

import pytest

import vllm_cpu
from peft_star import export_lora

pytestmark = [pytest.mark.slow, pytest.mark.serving]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_row_is_generated_exactly(vllm_python, smollm2_dir, served_patch, asked, exact, tmp_path, dtype):
    export_lora(served_patch, tmp_path / "lora")
    said = vllm_cpu.says(vllm_python, smollm2_dir, dtype, asked, {"repaired": tmp_path / "lora"})
    assert not any(exact(said["alone"]))
    assert all(exact(said["repaired"]))
