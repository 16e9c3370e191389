"""What llama.cpp says with a `.gguf` model, and with a LoRA of it: greedy, on one thread, several rows at once."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from peft_star.sharing.gguf_base import gguf_value, read_gguf
from peft_star.sharing.gguf_merge import copy_values

# rows that are generated at once, as a server does
PARALLEL = 8

ENGINE = """
import fs from "fs";
import {getLlama, LlamaCompletion} from "node-llama-cpp";
const {model: modelPath, lora, rows, length, parallel, out} = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath});
const sequences = Math.min(rows.length, parallel);
const context = await model.createContext({contextSize: length, sequences, threads: 1, ...(lora ? {lora} : {})});
const texts = [];
let next = 0;
async function serve() {
  const contextSequence = context.getSequence(), generator = new LlamaCompletion({contextSequence});
  while (next < rows.length) {
    const row = next++, [prompt, maxTokens] = rows[row];
    // without saying so, tokens that were said before are made less likely
    const greedily = {maxTokens, temperature: 0, repeatPenalty: false};
    texts[row] = await generator.generateCompletion(model.tokenize(prompt, false), greedily);
    await contextSequence.clearHistory();
  }
}
await Promise.all(Array.from({length: sequences}, serve));
fs.writeFileSync(out, JSON.stringify(texts));
process.exit(0);
"""


def unpack(base: Path, out: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write a model with all its matrices in another type."""
    reader = read_gguf(base)
    writer = gguf.GGUFWriter(out, gguf_value(reader, "general.architecture"))
    copy_values(reader, writer)
    for item in reader.tensors:
        values = np.array(gguf.quants.dequantize(item.data, item.tensor_type), dtype=np.float32)
        own = kind if len(item.shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(item.name, gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def says(
    engine: Path, model: Path, rows: Sequence[tuple[str, int]], lora: Path | None = None, length: int = 1024
) -> list[str]:
    """What is generated from each row.

    Args:
        engine: Where node-llama-cpp is installed.
        model: A `.gguf` file.
        rows: Prompts, and how many tokens are generated from each.
        lora: A `.gguf` file of a LoRA.
        length: The most tokens that a prompt and what is said may have.

    Raises:
        RuntimeError: llama.cpp ended with an error, whose last lines are the message.
    """
    with tempfile.TemporaryDirectory(dir=engine) as folder:  # there the script finds the package
        script, job, out = (Path(folder).resolve() / name for name in ("run.mjs", "job.json", "texts.json"))
        script.write_text(ENGINE)
        paths = {"model": str(model.resolve()), "lora": lora and str(lora.resolve()), "out": str(out)}
        job.write_text(json.dumps({**paths, "length": length, "parallel": PARALLEL, "rows": list(rows)}))
        run = subprocess.run(["node", script, job], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if run.returncode or not out.is_file():
            raise RuntimeError(f"llama.cpp ended with {run.returncode}: {run.stderr[-3000:]}")
        return json.loads(out.read_text())
