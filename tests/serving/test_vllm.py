"""vLLM says what was repaired, with the patch as a plain LoRA."""

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peft_star import export_lora
from peft_star.failures import encode_rows

pytestmark = [pytest.mark.slow, pytest.mark.serving]

# in one process: an engine of its own would import this script again
ENGINE = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
job = json.load(open(sys.argv[1]))
llm = LLM(job["model"], dtype=job["dtype"], enable_lora=True, max_lora_rank=job["rank"], max_model_len=512,
          enforce_eager=True, seed=0)
lora = LoRARequest("repaired", 1, job["lora"])
said = {}
for name, request in (("base", None), ("repaired", lora)):
    said[name] = []
    for row in job["rows"]:
        sampling = SamplingParams(temperature=0, max_tokens=len(row["completion"]), ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": row["prompt"]}], sampling, lora_request=request, use_tqdm=False)
        said[name].append(list(output.outputs[0].token_ids))
json.dump(said, open(job["out"], "w"))
"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_row_is_generated_exactly(vllm_python, smollm2_dir, served_patch, rows, tmp_path: Path, dtype):
    export_lora(served_patch, tmp_path / "lora")
    rank = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"]
    ranks = [allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank]
    encoded = encode_rows(rows, AutoTokenizer.from_pretrained(smollm2_dir))
    job = {
        "model": str(smollm2_dir),
        "dtype": dtype,
        "lora": str(tmp_path / "lora"),
        "rank": ranks[0],
        "rows": [{"prompt": row.prompt_ids, "completion": row.completion_ids} for row in encoded],
        "out": str(tmp_path / "said.json"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "run.py").write_text(ENGINE)
    run = subprocess.run([vllm_python, "run.py", "job.json"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads((tmp_path / "said.json").read_text())
    expected = [list(row.completion_ids) for row in encoded]
    assert not any(tokens == wanted for tokens, wanted in zip(said["base"], expected))
    assert said["repaired"] == expected
