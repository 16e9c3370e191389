"""Patches by strangers who know the checksums: whatever such a patch says of itself, the commands that need no base
model refuse it with one sentence or take it, and what they print and write moves nothing and runs nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_star.cli import main
from peft_star.loading import load_patch
from peft_star.sharing.hub import push
from peft_star.sharing.patch_files import checksum
from support.byte_llama import build_model
from support.command_line import SOLVABLE, run_here

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LEDGER, LEDGER_WEIGHTS, REPORT = "repair_ledger.json", "repair_ledger.safetensors", "repair_report.json"
MODULE = "model.layers.3.mlp.down_proj"  # the one that the repairs patch
SECRET = "what only this machine knows"
GONE = object()  # in the place of a value: the key is taken out
MOVING = "\x1b\x9b\x07\u202e\u2066"
HOSTILE = [
    "\x1b[2Jgone\x9b1A\u202ereversed\x07",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    'main"); import os; os.remove("/"); x = ("',
    *("\ud800", "~nobody/x", "a" * 3000, "", -1, 1.5, 2**70, -(2**70), 10**400, float("nan"), float("inf")),
    *(True, None, GONE, [], {}, [None], [[["a"]]], {"a": 1}, {"\x1b[1m": "\x1b"}),
]


@pytest.fixture(scope="module")
def grown(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A patch of one repair, and the same after a second one. Not to be written to."""
    directory = tmp_path_factory.mktemp("grown")
    first, second = directory / "first", directory / "second"
    for row, output, more in (
        ({"prompt": "a b", "completion": "cd", "id": "BUG-1"}, first, ()),
        ({"prompt": "xyz", "completion": "!", "problem": "P"}, second, ("--adapter", first, "--serve", "bf16")),
    ):
        rows = directory / "rows.jsonl"
        rows.write_text(json.dumps(row) + "\n")
        assert run_here(main, "repair", tiny_dir, rows, "-o", output, *more, *SOLVABLE) == 0
    return first, second


def paths_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where in a JSON document something stands; of lists the first two items."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_in(item, (*path, key))


def put(document: Any, path: tuple, value: Any) -> Any:
    """The document with another value in this place."""
    if not path:
        return None if value is GONE else value
    document = copy.deepcopy(document)
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    if value is GONE:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return document


def sign(patch: Path) -> None:
    """Give the patch's configuration the checksums of what lies beside it, as whoever made it can."""
    config = json.loads((patch / CONFIG).read_text())
    if isinstance(config, dict):
        config["ledger_sha256"] = hashlib.sha256((patch / LEDGER).read_bytes()).hexdigest()
        config["tensors_sha256"] = checksum(load_file(patch / WEIGHTS))
        (patch / CONFIG).write_text(json.dumps(config))


def commands(patch: Path, other: Path, output: Path) -> list[tuple[object, ...]]:
    about = [("inspect", patch), ("log", patch, "--rows"), ("diff", other, patch), ("diff", patch, other)]
    return [
        *(words for command in about for words in (command, (*command, "--json"))),
        ("report", patch, "-o", output / "page.html"),
        ("revert", patch, "1", "-o", output / "reverted", "--no-base"),
        ("stack", other, patch, "-o", output / "stack"),
        ("export", patch, "-o", output / "lora"),
    ]


def check_commands(patch: Path, other: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run all of them, and look at how they end, what they print and what they write."""
    for command in commands(patch, other, output):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        capsys.readouterr()
        code = run_here(main, *command)  # any exception but SystemExit fails the test
        shown = capsys.readouterr()
        last = (shown.err.splitlines() or [""])[-1]
        assert code in (0, 2), (command, shown.err)
        assert code == 0 or last.startswith("Error: ") and "codec" not in last and "Traceback" not in shown.err
        assert not set(MOVING) & set(shown.out + shown.err), command
        for path in output.rglob("*"):
            if path.suffix in (".html", ".md"):
                text = path.read_text(encoding="utf-8")
                assert not set(MOVING) & set(text) and "os.remove" not in python_in(text), (command, path)
                assert path.suffix == ".md" or "<script" not in text and "<img src=x" not in text
        if code == 2:
            assert not list(output.iterdir()), command


def python_in(card: str) -> str:
    return "".join(part.split("```")[0] for part in card.split("```python")[1:])


def mutated(grown: tuple[Path, Path], place: Path, kind: str, where: int, value: Any) -> Path:
    patch = place / "patch"
    shutil.rmtree(patch, ignore_errors=True)
    shutil.copytree(grown[1], patch)
    document = json.loads((patch / kind).read_text())
    found = list(paths_in(document))
    (patch / kind).write_text(json.dumps(put(document, found[where % len(found)], value)))
    if kind == LEDGER:
        sign(patch)
    return patch


MUTATIONS = given(
    kind=st.sampled_from([CONFIG, LEDGER, REPORT]), where=st.integers(0, 10**6), value=st.sampled_from(HOSTILE)
)


def times(number: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=number, deadline=None, suppress_health_check=checks, derandomize=True)


@times(40)
@MUTATIONS
def test_whatever_a_patch_says_of_itself_is_refused_or_harmless(
    grown: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, where: int, value: Any
) -> None:
    patch = mutated(grown, tmp_path, kind, where, value)
    check_commands(patch, grown[0], tmp_path / "output", capsys)


@pytest.mark.slow
@times(300)
@MUTATIONS
def test_hundreds_of_patches_that_say_something_else_of_themselves(
    grown: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, where: int, value: Any
) -> None:
    patch = mutated(grown, tmp_path, kind, where, value)
    check_commands(patch, grown[0], tmp_path / "output", capsys)


def edited(patch: Path, name: str, end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a file whose names end so."""
    tensors = {key: change(value) if key.endswith(end) else value for key, value in load_file(patch / name).items()}
    save_file(tensors, patch / name)
    if name == LEDGER_WEIGHTS:
        ledger = json.loads((patch / LEDGER).read_text())
        (patch / LEDGER).write_text(json.dumps({**ledger, "tensors_sha256": checksum(tensors)}))
    sign(patch)


@pytest.mark.parametrize(
    ("name", "end", "change"),
    [
        (WEIGHTS, "delta", lambda delta: delta.to(torch.float8_e4m3fn)),
        (WEIGHTS, "delta", lambda delta: delta.to(torch.complex64)),
        (WEIGHTS, "delta", lambda delta: delta.int()),
        (WEIGHTS, "delta", lambda delta: delta[:, :0].contiguous()),
        (WEIGHTS, "delta", lambda delta: torch.zeros(len(delta), 3000)),
        (WEIGHTS, "delta", lambda delta: delta * 1e38),
        (WEIGHTS, "neurons", lambda neurons: neurons.to(torch.uint64)),
        (WEIGHTS, "neurons", lambda neurons: neurons.long() + 2**40),
        (LEDGER_WEIGHTS, "right", lambda right: torch.cat([right, right], 1).contiguous()),
        (LEDGER_WEIGHTS, "right", lambda right: right[:, :0].contiguous()),
        (LEDGER_WEIGHTS, "right", lambda right: right.bfloat16()),
        (LEDGER_WEIGHTS, "neurons", lambda neurons: neurons + 2**30),
    ],
)
def test_tensors_of_other_kinds_and_sizes(
    grown: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    end: str,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    patch = tmp_path / "patch"
    shutil.copytree(grown[1], patch)
    edited(patch, name, end, change)
    check_commands(patch, grown[0], tmp_path / "output", capsys)
    try:
        load_patch(build_model(), patch)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


def test_names_of_no_modules(grown: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("\x1b[31mred", "../../x", "<script>alert(1)</script>", "\u202ea"):
        patch = tmp_path / "patch"
        shutil.copytree(grown[1], patch, dirs_exist_ok=True)
        tensors = {f"base_model.model.{name}.star_delta": torch.ones(1, 32)}
        tensors[f"base_model.model.{name}.star_neurons"] = torch.tensor([1])
        save_file({**load_file(grown[1] / WEIGHTS), **tensors}, patch / WEIGHTS)
        sign(patch)
        assert run_here(main, "inspect", patch) == 2
        check_commands(patch, grown[0], tmp_path / "output", capsys)


@pytest.mark.parametrize(
    ("module", "more", "message"),
    [
        ("model.layers.9.mlp.down_proj", {}, "lacks"),
        (MODULE, {f"{MODULE}/keys": torch.ones(2, 7)}, "7 neurons"),
        (MODULE, {"model.layers.9.mlp.down_proj/keys": torch.ones(2, 96)}, "lacks"),
    ],
)
def test_a_ledger_of_another_model_is_not_built_upon(
    grown: tuple[Path, Path],
    tiny_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    module: str,
    more: dict[str, torch.Tensor],
    message: str,
) -> None:
    patch = tmp_path / "patch"
    shutil.copytree(grown[1], patch)
    ledger = json.loads((patch / LEDGER).read_text().replace(MODULE, module))
    tensors = {key.replace(MODULE, module): value for key, value in load_file(patch / LEDGER_WEIGHTS).items()}
    tensors |= {f"{ledger['entries'][0]['id']}/{key}": value.bfloat16() for key, value in more.items()}
    save_file(tensors, patch / LEDGER_WEIGHTS)
    (patch / LEDGER).write_text(json.dumps({**ledger, "tensors_sha256": checksum(tensors)}))
    sign(patch)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "r"}\n')
    words = ("repair", tiny_dir, tmp_path / "rows.jsonl", "--adapter", patch, "-o", tmp_path / "new", *SOLVABLE)
    assert run_here(main, *words) == 2 and not (tmp_path / "new").exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Error: ") and "ledger" in error and message in error


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "lora/adapter_config.json"])
def test_a_link_out_of_a_patch_is_not_followed(
    grown: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A patch that was unpacked from an archive could name any file of the machine, which would be published."""
    (tmp_path / "secret").write_text(SECRET)
    patch = tmp_path / "patch"
    shutil.copytree(grown[1], patch)
    (patch / name).parent.mkdir(exist_ok=True)
    (patch / name).unlink(missing_ok=True)
    (patch / name).symlink_to(tmp_path / "secret")
    monkeypatch.setattr("peft_star.sharing.hub.HfApi", lambda **kwargs: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match="is a link to something outside of the patch"):
        push(patch, "me/patch", token="hf_x")
    assert run_here(main, "revert", patch, "1", "--no-base") == 2  # in place, where other files stay
    assert run_here(main, "revert", patch, "1", "--no-base", "-o", tmp_path / "out") == 2
    assert (tmp_path / "secret").read_text() == SECRET and not (tmp_path / "out").exists()


def test_links_within_a_patch_and_in_the_cache_of_the_hub_are_fine(grown: tuple[Path, Path], tmp_path: Path) -> None:
    patch, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(grown[1], patch)
    blobs.mkdir()
    (patch / "README.md").rename(blobs / "0")
    (patch / "README.md").symlink_to("../../blobs/0")
    (patch / "again.md").symlink_to("README.md")
    assert run_here(main, "revert", patch, "1", "--no-base", "-o", tmp_path / "out") == 0


def test_a_path_of_a_user_whom_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(main, "inspect", "~nobody-here/patch") == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: A path begins with ~") and error.count("\n") == 1
