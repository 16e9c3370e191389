"""How many rows llama.cpp gets right with a patch: as a LoRA and merged, on a base in several types.

    npm install --prefix engine node-llama-cpp
    python benchmarks/llama_cpp.py MODEL.gguf PATCH ROWS.jsonl --engine engine

Greedy, on a CPU. A row is right when what is generated begins with its completion.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np

from peft_star.sharing.gguf_base import gguf_value, read_gguf
from peft_star.sharing.gguf_lora import patch_to_gguf
from peft_star.sharing.gguf_merge import GgufMerge, copy_values
from prompts import read_jsonl

ENGINE = """
import fs from "fs";
import {getLlama, LlamaCompletion} from "node-llama-cpp";
const {model: modelPath, lora, rows, out} = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 512, threads: 1, ...(lora ? {lora} : {})});
const texts = [];
for (const {prompt, completion} of rows) {
  const contextSequence = context.getSequence();
  const generator = new LlamaCompletion({contextSequence});
  const maxTokens = model.tokenize(completion, false).length + 3;
  texts.push(await generator.generateCompletion(model.tokenize(prompt, false), {maxTokens, temperature: 0}));
  generator.dispose();
  contextSequence.dispose();
}
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


def right(engine: Path, model: Path, lora: Path | None, rows: list[dict]) -> int:
    """How many rows are right."""
    with tempfile.TemporaryDirectory(dir=engine) as folder:  # there the script finds the package
        script, job, out = (Path(folder).resolve() / name for name in ("run.mjs", "job.json", "texts.json"))
        script.write_text(ENGINE)
        paths = {"model": str(model.resolve()), "lora": lora and str(lora.resolve()), "out": str(out)}
        job.write_text(json.dumps({**paths, "rows": rows}))
        subprocess.run(["node", script, job], check=True, stdin=subprocess.DEVNULL)
        texts = json.loads(out.read_text())
    return sum(text.startswith(row["completion"]) for text, row in zip(texts, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("patch", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--engine", type=Path, required=True, help="where node-llama-cpp is installed")
    parser.add_argument("--types", nargs="*", default=["F32", "F16", "BF16", "Q8_0"])
    args = parser.parse_args()
    rows = read_jsonl(args.rows)
    print(f"{'base':8} {'alone':>6} {'LoRA':>6} {'merged':>6}   of {len(rows)}")
    with tempfile.TemporaryDirectory() as folder:
        lora, base, merged = (Path(folder) / f"{name}.gguf" for name in ("lora", "base", "merged"))
        patch_to_gguf(args.patch, lora, args.model)
        for name in ("as it is", *args.types):
            model = args.model
            if name != "as it is":
                model = base
                unpack(args.model, base, gguf.GGMLQuantizationType[name])
            GgufMerge.read(model, [args.patch]).write(merged, overwrite=True)
            cells = [right(args.engine, *pair, rows) for pair in ((model, None), (model, lora), (merged, None))]
            print(f"{name:8} {cells[0]:6} {cells[1]:6} {cells[2]:6}", flush=True)


if __name__ == "__main__":
    main()
