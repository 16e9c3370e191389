"""What llama.cpp says with a `.gguf` model, and with a LoRA of it, on one thread: greedily, several rows at once, or
how far apart the logits of given tokens and of their rivals are."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peft_star.sharing.gguf_base import gguf_value, read_gguf
from peft_star.sharing.gguf_merge import copy_values

# rows that are generated at once, as a server does
PARALLEL = 8

LOADED = """
import fs from "fs";
import {getLlama, LlamaCompletion} from "node-llama-cpp";
const {model: modelPath, lora, rows, length, parallel, out} = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath});
const sequences = Math.min(rows.length, parallel);
const context = await model.createContext({contextSize: length, sequences, threads: 1, ...(lora ? {lora} : {})});
const found = [];
"""
SAYS = """
let next = 0;
async function serve() {
  const contextSequence = context.getSequence(), generator = new LlamaCompletion({contextSequence});
  while (next < rows.length) {
    const row = next++, [prompt, maxTokens] = rows[row];
    // without saying so, tokens that were said before are made less likely
    const greedily = {maxTokens, temperature: 0, repeatPenalty: false};
    found[row] = await generator.generateCompletion(model.tokenize(prompt, false), greedily);
    await contextSequence.clearHistory();
  }
}
await Promise.all(Array.from({length: sequences}, serve));
"""
GAPS = """
const contextSequence = context.getSequence();
for (const [tokens, start] of rows) {
  const wanted = (at) => ({generateNext: {logits: {filter: {tokens: [tokens[at + 1]], includeTop: 2}}}});
  const input = tokens.slice(0, -1).map((token, at) => at + 1 < start ? token : [token, wanted(at)]);
  const outputs = await contextSequence.controlledEvaluate(input);
  found.push(tokens.slice(start).map((expected, number) => {
    const logits = outputs[start - 1 + number].next.logits;
    const others = [...logits].filter(([token]) => token !== expected).map(([, logit]) => logit);
    return logits.get(expected) - Math.max(...others);
  }));
  await contextSequence.clearHistory();
}
"""
DONE = """
fs.writeFileSync(out, JSON.stringify(found));
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
    return _run(engine, SAYS, model, lora, list(rows), length, PARALLEL)


def gaps(
    engine: Path,
    model: Path,
    rows: Sequence[tuple[Sequence[int], int]],
    lora: Path | None = None,
    length: int = 1024,
) -> list[list[float]]:
    """How far apart the logits of each row's tokens, from one on, and of the likeliest other tokens are, given what
    stands before them.

    Args:
        engine: Where node-llama-cpp is installed.
        model: A `.gguf` file.
        rows: Tokens, and the number of the first that is looked at.
        lora: A `.gguf` file of a LoRA.
        length: The most tokens that a row may have.

    Raises:
        RuntimeError: llama.cpp ended with an error, whose last lines are the message.
    """
    return _run(engine, GAPS, model, lora, [(list(tokens), start) for tokens, start in rows], length, 1)


def _run(
    engine: Path, work: str, model: Path, lora: Path | None, rows: list[Any], length: int, parallel: int
) -> list[Any]:
    """What a piece of a script finds."""
    with tempfile.TemporaryDirectory(dir=engine) as folder:  # there the script finds the package
        script, job, out = (Path(folder).resolve() / name for name in ("run.mjs", "job.json", "found.json"))
        script.write_text(LOADED + work + DONE)
        paths = {"model": str(model.resolve()), "lora": lora and str(lora.resolve()), "out": str(out)}
        job.write_text(json.dumps({**paths, "length": length, "parallel": parallel, "rows": rows}))
        run = subprocess.run(["node", script, job], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if run.returncode or not out.is_file():
            raise RuntimeError(f"llama.cpp ended with {run.returncode}: {run.stderr[-3000:]}")
        return json.loads(out.read_text())
