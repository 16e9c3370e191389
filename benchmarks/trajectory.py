"""The paths of SGD and of STAR over the loss surface of one row (paper Figure 3).

    python benchmarks/trajectory.py --model MODEL --data DIR --json trajectory.json --plot trajectory.png

Both start at deltas of zero, on the same neurons, with the same step size, and take all their steps: nothing stops
them once the failures are solved. STAR is drawn twice: Algorithm 1 to the letter, and with the package's adaptive step
sizes. The loss is the cross entropy over all completion tokens of the row, so that what a path breaks shows; its sum
is descended, its mean drawn.

The picture's plane goes through the start and the ends of SGD and of Algorithm 1, so that there the surface is exact;
how much of a path's distance from the start lies in the plane is said in the caption. Next to it is the loss on the
paths themselves. Points of the grid that are done are kept in the JSON file; an interrupted run walks the paths again
(they span the plane) and goes on with the grid.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm

from figures import BLUE, GREEN, VERMILION, drawing, save
from harness import load, resumable, resume, setting_of, write_json
from peft_star import PriorGuidedSGD, RepairArguments, StarConfig, prepare
from peft_star.engine.engine import Engine
from peft_star.engine.passes import completion_logits, loss_at
from peft_star.failures import encode_rows
from peft_star.models.inputs import input_device
from prompts import TASKS, few_shot_rows

SGD, STAR, ADAPTIVE = "SGD", "STAR, Algorithm 1", "STAR, adaptive steps"
LOOKS = {SGD: (VERMILION, "-"), STAR: (BLUE, "-"), ADAPTIVE: (GREEN, "--")}
PATH_BYTES = 1 << 30
FLOOR = 1e-6


class Surface:
    """The loss of one row as a function of the deltas, which are seen as one vector (n).

    Args:
        model: A `PeftModel` with prepared STAR deltas.
        batches: The row, from `Engine.batches`.
        deltas: The deltas in order.
    """

    def __init__(self, model: nn.Module, batches: Sequence, deltas: list[nn.Parameter]):
        self.model, self.batches, self.deltas = model, batches, deltas
        self.tokens = sum(map(len, batches))

    def place(self, point: torch.Tensor) -> None:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(point, self.deltas)

    def point(self) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(self.deltas).detach().clone()

    def loss(self) -> torch.Tensor:
        """Cross entropy, summed over the completion tokens."""
        return sum(
            loss_at(completion_logits(self.model, batch), batch, torch.ones(len(batch), dtype=torch.bool))
            for batch in self.batches
        )

    @torch.no_grad()
    def mean_loss(self, point: torch.Tensor) -> float:
        self.place(point)
        return float(self.loss()) / self.tokens


def walk(surface: Surface, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[tuple[torch.Tensor, float]]:
    """The points of a path from zero, the start included, each with its mean loss."""
    surface.place(torch.zeros_like(surface.point()))
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = surface.loss()
        yield surface.point(), loss.item() / surface.tokens
        if step < steps:
            loss.backward()
            optimizer.step()


def optimizers(deltas: list[nn.Parameter], rate: float) -> dict[str, torch.optim.Optimizer]:
    default = RepairArguments()
    return {
        SGD: torch.optim.SGD(deltas, lr=rate),
        STAR: PriorGuidedSGD(deltas, lr=rate),
        ADAPTIVE: PriorGuidedSGD(deltas, lr=rate, damping=default.damping, growth=default.growth),
    }


def plane_through(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis (2, n) of the plane through zero and two points.

    Raises:
        ValueError: Zero and the two points lie on a line.
    """
    one = first / first.norm()
    rest = second - (second @ one) * one
    if not torch.isfinite(one).all() or rest.norm() <= 1e-6 * second.norm():
        raise ValueError("The start and the two ends lie on a line; take more steps or another row.")
    return torch.stack([one, rest / rest.norm()])


def project(points: torch.Tensor, plane: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Coordinates (t, 2) of points (t, n), and the share of their squared distances from zero that is in the plane."""
    coordinates = points @ plane.T
    return coordinates, float(coordinates.square().sum() / points.square().sum().clamp_min(1e-30))


def axes_of_grid(paths: dict[str, dict[str, Any]], size: int) -> tuple[list[float], list[float]]:
    """`size` values along each direction, a quarter beyond what the paths reach."""
    spans = []
    for name in ("x", "y"):
        values = [value for path in paths.values() for value in path[name]]
        low, high = min(values), max(values)
        room = 0.25 * (high - low)
        spans.append(torch.linspace(low - room, high + room, size).tolist())
    return spans[0], spans[1]


def run(base, tokenizer, row: dict[str, str], given: argparse.Namespace, state: dict[str, Any]) -> None:
    """Walk the paths and fill the grid, saving after every point of it."""
    config = StarConfig(task_type="CAUSAL_LM", num_neurons=given.neurons, num_layers=given.layers)
    model = get_peft_model(base, config).eval()
    try:
        prepare(model, tokenizer, [row], RepairArguments(learning_rate=given.learning_rate, disable_tqdm=True))
    except ValueError as error:
        raise SystemExit(f"Row {given.row} of {given.task} has no path: {error} Choose another with --row.") from None
    model.requires_grad_(False)
    deltas = [parameter for name, parameter in model.named_parameters() if "star_delta" in name]
    for delta in deltas:
        delta.requires_grad_(True)
    device, engine = input_device(model), Engine(model, RepairArguments.max_batch_tokens)
    batches = engine.batches(encode_rows([row], tokenizer))
    surface = Surface(model, batches, deltas)
    entries = sum(delta.numel() for delta in deltas)
    stride = max(1, math.ceil((given.steps + 1) * entries * 4 / PATH_BYTES))
    walked: dict[str, tuple[list[int], torch.Tensor, list[float]]] = {}
    for name, optimizer in optimizers(deltas, given.learning_rate).items():
        kept, points, losses = [], [], []
        bar = tqdm(walk(surface, optimizer, given.steps), total=given.steps + 1, desc=name)
        for step, (point, loss) in enumerate(bar):
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3g}")
            if step % stride == 0 or step == given.steps:
                kept.append(step)
                points.append(point.cpu())
        walked[name] = kept, torch.stack(points), losses
    try:
        plane = plane_through(walked[STAR][1][-1], walked[SGD][1][-1])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    paths = {}
    for name, (kept, points, losses) in walked.items():
        coordinates, inside = project(points, plane)
        x, y = coordinates.T.tolist()
        paths[name] = {"steps": kept, "x": x, "y": y, "loss": losses, "in_plane": inside}
    del walked
    results = state["results"]
    results |= {"paths": paths, "entries": entries, "tokens": surface.tokens, "layers": len(deltas)}
    # the same machine walks the same paths; another one's grid would lie elsewhere
    xs, ys = axes_of_grid(paths, given.grid)
    if (results.get("grid", {}).get("x"), results.get("grid", {}).get("y")) != (xs, ys):
        results["grid"] = {"x": xs, "y": ys, "loss": {}}
    write_json(given.json, state)
    done = results["grid"]["loss"]
    for i, y in enumerate(tqdm(ys, desc="grid rows")):
        for j, x in enumerate(xs):
            if f"{i},{j}" not in done:
                point = (x * plane[0] + y * plane[1]).to(device)
                done[f"{i},{j}"] = surface.mean_loss(point)
        write_json(given.json, state)
    model.unload()


def caption(state: dict[str, Any]) -> str:
    """What the picture shows, and how much of the paths lies in its plane."""
    found = state["results"]
    shares = ", ".join(f"{name}: {path['in_plane']:.0%}" for name, path in found["paths"].items())
    return (
        f"{found['entries']:,} parameters in {found['layers']} layers; a row of {found['tokens']} completion tokens. "
        f"Stars mark the ends.\nShare of the squared distances from the start that lies in the plane: {shares}."
    )


def table(state: dict[str, Any]) -> str:
    """The paths' losses as Markdown."""
    lines = [
        "| path | loss at the start | lowest loss (step) | loss after the last step | in the plane |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, path in state["results"]["paths"].items():
        loss = path["loss"]
        best = min(range(len(loss)), key=loss.__getitem__)
        lines.append(
            f"| {name} | {loss[0]:.3f} | {loss[best]:.2g} ({best}) | {loss[-1]:.2g} ({len(loss) - 1}) | "
            f"{path['in_plane']:.0%} |"
        )
    return "\n".join(lines)


def plot(state: dict[str, Any], path: Path) -> None:
    """Draw the plane with the paths, and the loss along them."""
    xs, ys, values = (state["results"]["grid"][name] for name in ("x", "y", "loss"))
    surface = [[values[f"{i},{j}"] for j in range(len(xs))] for i in range(len(ys))]
    with drawing() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), width_ratios=(3, 2))
        # interpolated in the logarithm; below the floor float32 has nothing more to tell
        heights = [[math.log10(max(value, FLOOR)) for value in row] for row in surface]
        low, high = math.floor(min(map(min, heights))), max(map(max, heights))
        shades = [low + k / 4 for k in range(math.ceil(4 * (high - low)) + 1)]
        filled = left.contourf(xs, ys, heights, shades, cmap="Greys", alpha=0.55)
        decades = [level for level in range(low, math.ceil(high)) if 10**level > FLOOR]
        lines = left.contour(xs, ys, heights, decades, colors="#444444", linestyles="-", linewidths=0.6)
        left.clabel(lines, fmt=lambda level: f"{10**level:g}", fontsize=8)
        bar = figure.colorbar(filled, ax=left, label="cross entropy, nats a token")
        bar.set_ticks(decades, labels=[f"{10.0**level:g}" for level in decades])
        for name, walked in state["results"]["paths"].items():
            color, style = LOOKS[name]
            left.plot(walked["x"], walked["y"], style, color=color, label=name, linewidth=1.4)
            left.plot(walked["x"][-1], walked["y"][-1], "*", color=color, markersize=15, markeredgecolor="white")
            right.plot(range(len(walked["loss"])), walked["loss"], style, color=color, label=name)
            right.plot(len(walked["loss"]) - 1, walked["loss"][-1], "*", color=color, markersize=12)
        left.plot(0, 0, "o", color="black", markersize=7, markeredgecolor="white", label="start")
        left.grid(False)
        left.set_xlabel("distance from the start towards STAR's end")
        left.set_ylabel("distance across it, towards SGD's end")
        left.set_title("plane through the start and the ends of SGD and Algorithm 1")
        right.set_yscale("log")
        right.set_xlabel("step")
        right.set_ylabel("cross entropy, nats a token")
        right.set_title("loss on the paths")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figure.supxlabel(caption(state), fontsize=8)
        save(figure, path)


def _amount(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="Hub id, directory or .gguf file")
    options.add_argument("--data", type=Path, required=True, help="folder with conala/, ia32/, tldr/")
    options.add_argument("--task", default="conala", choices=TASKS)
    options.add_argument("--rows", type=int, default=10, help="spread this many rows over the split ...")
    options.add_argument("--row", type=int, default=0, help="... and take this one of them")
    options.add_argument("--demonstrations", type=int, default=3)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--learning-rate", type=float, default=1e-2)
    options.add_argument("--neurons", type=_amount, default=64, help="neurons in each layer: a number, or 1.0 for all")
    options.add_argument("--layers", type=_amount, default=0.5, help="share or number of the layers")
    options.add_argument("--grid", type=int, default=13, help="points along each side")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", help="cpu (default), cuda, ...")
    options.add_argument("--json", type=Path, required=True, help="results; an existing file is gone on with")
    options.add_argument("--plot", type=Path, help="draw the picture here")
    given = options.parse_args()
    if not 0 <= given.row < given.rows:
        options.error(f"--row {given.row} is not among the {given.rows} rows; give 0 to {given.rows - 1}.")
    state = {"benchmark": "trajectory"} | resume(given.json, setting_of(given, "data", "plot", "device"))
    if len(state["results"].get("grid", {}).get("loss", ())) < given.grid**2:
        row = few_shot_rows(given.data, given.task, given.rows, given.demonstrations)[given.row]
        base, tokenizer = load(given)
        with resumable(given.json):
            run(base, tokenizer, row, given, state)
    print(table(state))
    if given.plot is not None:
        plot(state, given.plot)


if __name__ == "__main__":
    main()
