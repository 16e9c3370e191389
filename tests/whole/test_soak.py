"""Hundreds of repairs in one process: memory stays flat, and every patch is verified, saved and loaded again."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_star import RepairArguments, StarConfig, repair
from support.byte_llama import build_model, build_tokenizer

REPAIRS, WARM = 300, 100
GROWTH = 8 * 2**20  # bytes that memory may differ by, from the hundredth repair to the last


def resident() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def one(number: int, directory: Path, tokenizer) -> None:
    """Repair a fresh model of other rows than before, and load what was saved."""
    base = build_model()
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=32))
    rows = [{"prompt": f"{number} is", "completion": chr(65 + number % 26)}, {"prompt": "a b", "completion": "c"}]
    mode = ("multiple", "single")[number % 2]
    algorithm = ("protected", "prior-guided")[number // 2 % 2]
    reach = ("problem", "prompt")[number // 4 % 2]
    args = RepairArguments(
        disable_tqdm=True, learning_rate=0.05, max_steps=200, mode=mode, algorithm=algorithm, reach=reach
    )
    report = repair(model, tokenizer, rows, args)
    assert report.success, (number, report.summary())
    model.save_pretrained(directory)
    inputs = tokenizer(rows[0]["prompt"], return_tensors="pt")
    with torch.no_grad():
        said = model(**inputs).logits
        again = PeftModel.from_pretrained(build_model(), directory)(**inputs).logits
    assert torch.equal(said, again) and tokenizer.decode(said[0, -1].argmax()) == rows[0]["completion"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_300_repairs_in_one_process(tmp_path: Path) -> None:
    tokenizer, found = build_tokenizer(), {}
    for number in range(1, REPAIRS + 1):
        one(number, tmp_path / "patch", tokenizer)
        if number % WARM == 0:
            found[number] = resident()
    print({number: f"{size / 2**20:.1f} MiB" for number, size in found.items()})
    assert found[REPAIRS] - found[WARM] < GROWTH
