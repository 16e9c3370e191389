"""How far what serves a model moves the gaps between logits: as computed for a repair's margins, and in llama.cpp.

    npm install --prefix engines/llama.cpp node-llama-cpp   # or make test-serving, which installs it in .engines
    python benchmarks/movements.py --model MODEL.gguf --failures examples/failures.jsonl --engines engines

A gap is the logit of a row's next token less that of the likeliest other one. It moves by its difference from the
one that the model has in float32. What is printed are root mean squares over all completion tokens of the rows, how
large the largest movement is beside that, and the correlation of llama.cpp's movements with those computed for its
type. With `--data DIR --rows 8` the rows are the paper's, so many of each task; with `--patch` the model is patched.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch

import llama_cpp
from harness import load
from peft_star.engine.arithmetic import predict_in
from peft_star.engine.engine import Engine
from peft_star.engine.passes import teacher_forced
from peft_star.engine.predictions import Predictions
from peft_star.failures import Row, encode_rows
from peft_star.loading import load_patch
from peft_star.method.serving import arithmetics
from peft_star.sharing.gguf_lora import patch_to_gguf
from prompts import given_rows, row_options

# by what llama.cpp is given the arithmetic that stands for it
TYPES = {"as the file is": "base", "Q8_0": "q8_0", "F32": None}


@torch.no_grad()
def computed(model: Any, rows: list[Row], names: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gaps (S) in the model's own arithmetic, and by name how far each other one moves them."""
    engine = Engine(model.eval(), 2048)
    batches = engine.batches(rows)
    here = teacher_forced(engine, batches).gap
    moved = {}
    for name, arithmetic in arithmetics(model, names).items():
        there = predict_in(engine, arithmetic, batches, Predictions.empty(len(here)))
        moved[name] = there.gap - here
    return here, moved


def in_llama_cpp(engine: Path, base: Path, patch: Path | None, rows: list[Row], kind: str) -> torch.Tensor:
    """The gaps (S) in llama.cpp, of a base as it is or with its matrices in another type."""
    asked = [(row.input_ids, len(row.prompt_ids)) for row in rows]
    length = -(-max(len(row) for row in rows) // 256) * 256
    with tempfile.TemporaryDirectory() as folder:
        model, lora = base, None
        if kind != next(iter(TYPES)):
            model = Path(folder) / "base.gguf"
            llama_cpp.unpack(base, model, gguf.GGMLQuantizationType[kind])
        if patch is not None:
            lora = Path(folder) / "lora.gguf"
            patch_to_gguf(patch, lora, str(base))
        return torch.tensor(sum(llama_cpp.gaps(engine, model, asked, lora, length), []))


def line(name: str, moved: torch.Tensor, beside: torch.Tensor | None = None) -> str:
    """A row of the table: of movements (S), and those that they are held against."""
    size = moved.square().mean().sqrt().item()
    agreement = "" if beside is None else f"{torch.corrcoef(torch.stack([moved, beside]))[0, 1].item():.2f}"
    return f"| {name} | {size:.3f} | {moved.abs().max().item() / size:.1f} | {agreement} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a .gguf file")
    row_options(options, "look at")
    options.add_argument("--patch", type=Path, help="a patch that the model has")
    options.add_argument("--engines", type=Path, default=Path(".engines"), help="holds llama.cpp/")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    rows = given_rows(given)
    model, tokenizer = load(given)
    encoded = encode_rows(rows, tokenizer)
    model = model if given.patch is None else load_patch(model, str(given.patch))
    here, moved = computed(model, encoded, ("base", "bf16", "fp16", "q8_0"))
    print(f"{len(here)} tokens of {len(rows)} rows\n")
    print("| arithmetic | movement, RMS | largest / RMS | correlation with the computed |")
    print("| --- | --- | --- | --- |")
    for name, values in moved.items():
        print(line(f"computed: {name}", values))
    engine = given.engines / "llama.cpp"
    if (engine / "node_modules").is_dir():
        for kind, name in TYPES.items():
            there = in_llama_cpp(engine, Path(given.model), given.patch, encoded, kind) - here
            print(line(f"llama.cpp: {kind}", there, moved.get(name)), flush=True)


if __name__ == "__main__":
    main()
