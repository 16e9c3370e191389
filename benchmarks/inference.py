"""What a patch costs at inference: latency beside the base model, LoRA and SHiRA, and the size of its file.

    python benchmarks/inference.py --model MODEL --runs 30 --json inference.json

All variants share the base's weights in memory, but for the merged one, and run in turn: in each run every variant is
timed once, in random order. A ratio is the median over the runs of a variant's time by the base's time in the same
run; "base again" is the base under another name and shows the noise. Prefill is one forward pass over the prompt,
decode one token behind it, the median of several. On a busy machine `--clock cpu` leaves out the time in which another
process had the core (with one thread only). LoRA has rank = neurons; of SHiRA the rank hardly matters, since it
adds a dense matrix to the weight in every pass. File sizes are of adapters with as many trained entries as the patch.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm

from harness import machine, setting_of, write_json
from peft_star import StarConfig
from peft_star.loading import load_model
from peft_star.models.structure import find_second_matrices, linear_shape

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
BASE, AGAIN = "base", "base again"


def share(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def fill(model: nn.Module) -> nn.Module:
    """Give the adapter values of a usual size: what is timed should compute what a trained one computes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model.eval().requires_grad_(False)


def variants(base: nn.Module, targets: list[str], neurons: int) -> dict[str, nn.Module]:
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets}
    star = StarConfig(num_neurons=neurons, **common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {
            BASE: base,
            f"STAR, {neurons} neurons": fill(get_peft_model(share(base), star)),
            f"LoRA, r={neurons}": fill(get_peft_model(share(base), LoraConfig(r=neurons, **common))),
            f"SHiRA, r={neurons}": fill(get_peft_model(share(base), ShiraConfig(r=neurons, **common))),
            "STAR, merged": fill(get_peft_model(copy.deepcopy(base), copy.deepcopy(star))).merge_and_unload(),
            AGAIN: base,
        }
    return made


@torch.no_grad()
def prefill(model: nn.Module, prompt: torch.Tensor, clock: Callable[[], float]) -> tuple[float, Any]:
    start = clock()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    return clock() - start, output.past_key_values


@torch.no_grad()
def decode(model: nn.Module, cache: Any, token: torch.Tensor, steps: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(steps):
        start = clock()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        times.append(clock() - start)
    return median(times)


def measure(
    models: dict[str, nn.Module],
    prompt: torch.Tensor,
    runs: int,
    steps: int,
    clock: Callable[[], float],
    save: Callable[[dict], None],
) -> dict[str, dict[str, list[float]]]:
    """Seconds of prefill and of decoding a token, by variant and run."""
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    shuffle = random.Random(0)
    for run in tqdm(range(runs + 1), desc="runs"):  # the first one warms up
        for name in shuffle.sample(list(models), len(models)):
            seconds, cache = prefill(models[name], prompt, clock)
            pace = decode(models[name], cache, prompt[:, :1], steps, clock)
            if run > 0:
                times[name]["prefill"].append(seconds)
                times[name]["decode"].append(pace)
            del cache
        gc.collect()
        if run > 0:
            save(times)
    return times


def summary(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    result = {}
    for name, kinds in times.items():
        result[name] = {}
        for kind, seconds in kinds.items():
            result[name][f"{kind}_ms"] = 1000 * median(seconds)
            result[name][f"{kind}_ratio"] = median(s / b for s, b in zip(seconds, times[BASE][kind]))
    return result


def equal_entries(neurons: int, inputs: int, outputs: int) -> tuple[int, int]:
    """Numbers of neurons k and a rank r, k near `neurons`, with k outputs = r (inputs + outputs) trained entries."""
    divisor = math.gcd(outputs, inputs + outputs)
    step, rank = (inputs + outputs) // divisor, outputs // divisor
    times = max(1, round(neurons / step))
    if step * times <= inputs:
        return step * times, rank * times
    return neurons, max(1, round(neurons * outputs / (inputs + outputs)))


def files(base: nn.Module, targets: list[str], neurons: int) -> dict[str, dict[str, int]]:
    inputs, outputs = linear_shape(base.get_submodule(targets[0]))
    count, rank = equal_entries(neurons, inputs, outputs)
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets}
    configs = {
        f"STAR, {neurons} neurons": StarConfig(num_neurons=neurons, **common),
        f"STAR, {count} neurons": StarConfig(num_neurons=count, **common),
        f"LoRA, r={rank}": LoraConfig(r=rank, **common),
        f"SHiRA, r={rank}": ShiraConfig(r=rank, **common),
    }
    sizes = {}
    for name, config in configs.items():
        model = get_peft_model(share(base), config)
        entries = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(directory)
            size = (Path(directory) / "adapter_model.safetensors").stat().st_size
        sizes[name] = {"entries": entries, "bytes": size}
    return sizes


def table(results: dict[str, Any]) -> str:
    lines = [
        "| | prefill, ms | of the base | decode, ms a token | of the base |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in results["latency"].items():
        lines.append(
            f"| {name} | {row['prefill_ms']:.1f} | {row['prefill_ratio']:.3f} | {row['decode_ms']:.2f} | "
            f"{row['decode_ratio']:.3f} |"
        )
    lines += ["", "| adapter file | trained entries | bytes | bytes an entry |", "| --- | --- | --- | --- |"]
    for name, row in results["files"].items():
        lines.append(f"| {name} | {row['entries']:,} | {row['bytes']:,} | {row['bytes'] / row['entries']:.2f} |")
    lines += ["", f"Largest logit difference between STAR unmerged and merged: {results['merged_difference']:.1e}."]
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="Hub id, directory or .gguf file")
    options.add_argument("--neurons", type=int, default=64, help="neurons in each patched layer, and LoRA's rank")
    options.add_argument(
        "--layers", type=float, default=0.5, help="share of the layers that are patched, as in a repair"
    )
    options.add_argument("--tokens", type=int, default=256, help="tokens of the prompt")
    options.add_argument("--steps", type=int, default=8, help="tokens decoded in each run")
    options.add_argument("--runs", type=int, default=30)
    options.add_argument("--clock", choices=CLOCKS, default="wall")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--json", type=Path, help="results")
    given = options.parse_args()
    state: dict[str, Any] = {"setting": setting_of(given), "machine": machine()}

    base, _ = load_model(given.model, dtype=given.dtype)
    base.requires_grad_(False)
    second = list(find_second_matrices(base))
    count = max(1, round(given.layers * len(second)))
    # spread evenly over the depth
    targets = [second[index * len(second) // count] for index in range(count)]
    models = variants(base, targets, given.neurons)
    prompt = torch.randint(3, base.config.vocab_size, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        star, merged = (models[name](input_ids=prompt).logits for name in list(models)[1:5:3])
        state["merged_difference"] = (star - merged).abs().max().item()

    def save(times: dict) -> None:
        if given.json:
            write_json(given.json, state | {"seconds": times})

    times = measure(models, prompt, given.runs, given.steps, CLOCKS[given.clock], save)
    del models
    state |= {"modules": targets, "latency": summary(times), "files": files(base, targets, given.neurons)}
    save(times)
    print(table(state))


if __name__ == "__main__":
    main()
