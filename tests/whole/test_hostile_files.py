"""Mutated patches and failures files: refused with one sentence, or read to something equal; nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from peft_star import StarConfig
from peft_star.failures import encode_rows, read_rows
from peft_star.loading import load_patch
from support.byte_llama import build_model, build_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.arange(3, 40)[None]


def times(number: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=number, deadline=None, suppress_health_check=checks, derandomize=True)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["(a+)+$", "("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(StarConfig().to_dict()))
TENSORS = st.sampled_from(
    [torch.zeros(8, 32), torch.arange(8, dtype=torch.int32), torch.zeros(259, 32), torch.zeros(0), torch.tensor(1.0)]
)
NAMES = st.sampled_from(
    [f"model.layers.{index}.mlp.down_proj.{part}" for index in range(5) for part in ("star_delta", "star_neurons")]
    + ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.base_layer.weight", "model.norm.weight", "x"]
).map("base_model.model.{}".format)
MUTATIONS = st.one_of(
    st.tuples(st.just("value"), KEYS, VALUES),
    st.tuples(st.just("tensor"), NAMES, TENSORS),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("drop"), NAMES, st.none()),
    st.tuples(
        st.just("byte"), st.sampled_from([CONFIG, WEIGHTS]), st.tuples(st.integers(0, 2**20), st.integers(1, 255))
    ),
    st.tuples(st.just("cut"), st.sampled_from([CONFIG, WEIGHTS]), st.integers(0, 2**20)),
)


@pytest.fixture(scope="module")
def patch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("patch")
    torch.manual_seed(0)
    config = StarConfig(task_type="CAUSAL_LM", num_neurons=8, init_weights=False)
    get_peft_model(build_model(), config).save_pretrained(directory)
    return directory


def content_of(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def mutate(directory: Path, kind: str, where: str, what: Any) -> None:
    if kind == "value":
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, where: what}))
    elif kind in ("byte", "cut"):
        content = bytearray((directory / where).read_bytes())
        if kind == "cut":
            content = content[: what % len(content)]
        else:
            content[what[0] % len(content)] ^= what[1]
        (directory / where).write_bytes(content)
    else:
        tensors = load_file(directory / WEIGHTS)
        tensor = tensors.pop(where, torch.ones(3))
        if kind != "drop":
            tensors[where if kind == "tensor" else what] = what if kind == "tensor" else tensor
        save_file(tensors, directory / WEIGHTS)


PATCHES = given(mutations=st.lists(MUTATIONS, min_size=1, max_size=2), old=st.booleans())


@times(100)
@PATCHES
def test_a_mutated_patch_is_refused_or_equal(
    patch: Path, tmp_path: Path, mutations: list[tuple[str, str, Any]], old: bool
) -> None:
    refused_or_equal(patch, tmp_path, mutations, old)


@pytest.mark.slow
@times(1000)
@PATCHES
def test_a_thousand_mutated_patches(
    patch: Path, tmp_path: Path, mutations: list[tuple[str, str, Any]], old: bool
) -> None:
    refused_or_equal(patch, tmp_path, mutations, old)


def refused_or_equal(patch: Path, tmp_path: Path, mutations: list[tuple[str, str, Any]], old: bool) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(patch, copy)
    for mutation in mutations:
        try:
            mutate(copy, *mutation)
        except Exception:
            return  # an earlier mutation has left nothing to mutate
    if old:  # a patch without a checksum may say something else, but never touch the base
        with contextlib.suppress(ValueError, AttributeError):
            mutate(copy, "value", "tensors_sha256", None)
    before = content_of(tmp_path)
    try:
        loaded = load_patch(build_model(), copy)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return event("refused")
    finally:
        assert content_of(tmp_path) == before
    event("loaded")
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(build_model()))
    if not old:
        assert torch.equal(logits(loaded), logits(load_patch(build_model(), patch)))


ROWS = st.dictionaries(
    st.sampled_from(["prompt", "completion", "focus", "problem", "end", "id", "x"]),
    st.text(max_size=9) | st.just("a b") | st.just("\ud800") | VALUES,
)
LINES = ROWS.map(json.dumps) | st.text(max_size=20) | st.sampled_from(["[" * 100_000, "", "null", "1e999", "{}"])
LINES |= st.sampled_from(
    ['{"prompt": "a", "prompt": "b", "completion": "c"}', '{"prompt": "x", "completion": "y", "id": "Z"}']
)
ODD_CELLS = st.sampled_from(['"', "true", '"a\n""b"', "\0"])
CELLS = st.lists(st.text(max_size=9) | ODD_CELLS, max_size=6).map(",".join) | st.just("x,y,,,9")
COLUMNS = {
    "prompt": st.text(max_size=9) | st.just("a b"),
    "completion": st.none() | st.text(max_size=9),
    "focus": st.none() | st.just("a"),
    "end": st.none() | st.booleans(),
    "id": st.none() | st.integers(-9, 9),
}
TABLES = st.lists(st.fixed_dictionaries(COLUMNS), min_size=1, max_size=3)
GOOD = {"prompt": "a b", "completion": "c", "focus": "a", "end": True, "id": 7}


def json_lines(lines: list[str]) -> bytes:
    return "\n".join([json.dumps(GOOD), *lines]).encode("utf-8", "surrogatepass")


def csv_lines(lines: list[str]) -> bytes:
    return "\n".join([",".join(GOOD), ",".join(map(str, GOOD.values())), *lines]).encode("utf-8", "surrogatepass")


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([GOOD, *rows]), file)
    return file.getvalue()


FILES = st.one_of(
    st.tuples(st.just("jsonl"), st.lists(LINES, max_size=3).map(json_lines)),
    st.tuples(st.just("csv"), st.lists(CELLS, max_size=3).map(csv_lines)),
    st.tuples(st.just("parquet"), TABLES.map(parquet_bytes)),
)
PLACES = st.tuples(st.integers(0, 2**14), st.integers(0, 255))


@times(500)
@given(file=FILES, flips=st.just([]) | st.lists(PLACES, max_size=2))
def test_a_mutated_failures_file_is_refused_or_read(
    tmp_path: Path, file: tuple[str, bytes], flips: list[tuple[int, int]]
) -> None:
    kind, content = file[0], bytearray(file[1])
    for place, value in flips:
        content[place % len(content)] = value
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content)
    try:
        rows = encode_rows(read_rows(path), build_tokenizer(), 256)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return event(f"{kind} refused")
    event(f"{kind} read")
    assert rows and all(len(row.completion_ids) > 0 for row in rows)
