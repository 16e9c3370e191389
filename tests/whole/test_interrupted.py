"""Repairs that end at any moment: killed, on a full disk, where nothing can be written."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from peft_star.cli import main
from peft_star.loading import find_patch
from peft_star.report import RepairReport
from peft_star.sharing.patch_files import Patch, read_patch_config
from support.command_line import SOLVABLE, names, run_here
from support.forks import Forks, timed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "repair_report.json"}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "failures.jsonl"
    texts = [("a b", "cd"), ("xyz", "!"), ("def f", "(x)"), ("0 1", "2")]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in texts]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def patch(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch. Not to be written to."""
    directory = tmp_path_factory.mktemp("patches")
    (directory / "rows.jsonl").write_text('{"prompt": "a b", "completion": "cd"}\n')
    assert run_here(main, "repair", tiny_dir, directory / "rows.jsonl", "-o", directory / "patch", *SOLVABLE) == 0
    return directory / "patch"


def checked(patch: Path) -> str:
    """Which patch it is, after a look that it is complete; what a kill between two renames leaves is mended first."""
    directory = find_patch(patch)
    assert names(directory) and set(names(directory)) >= FILES
    assert Patch.read(directory).neurons and RepairReport.load(directory / "repair_report.json").success
    return read_patch_config(directory)["tensors_sha256"]


def while_saving(directory: Path, moment: float) -> Callable[[], None]:
    """Wait until something is being written beside the rows, and `moment` seconds longer."""

    def wait() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end and not any(".new-" in name for name in names(directory)):
            time.sleep(0.001)
        time.sleep(moment)

    return wait


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_previous_patch_or_the_new_one(
    forks: Forks, tiny_dir: Path, rows: Path, tmp_path: Path
) -> None:
    target, rng = tmp_path / "patch", random.Random(0)
    command = ("repair", tiny_dir, rows, "-o", target, "--json", *SOLVABLE)
    assert forks.run(*command) == 0
    new = checked(target)
    code, seconds = timed(forks, *command, "--overwrite", "--neurons", "16", "--steps", "400")
    assert code == 0
    longest = seconds  # that a run is given after it has begun to save; how long it needs is a machine's own
    old = checked(target)
    assert old != new
    kept = tmp_path.parent / f"{tmp_path.name}-kept"
    shutil.copytree(target, kept)

    seen = []
    for number in range(20):
        shutil.rmtree(target, ignore_errors=True)
        over = number % 2 == 1
        if over:
            shutil.copytree(kept, target)
        late = number >= 8  # most of a run is not the saving, which is what can go wrong
        moment = rng.uniform(0, longest if late else seconds / 2)
        kill = while_saving(tmp_path, moment) if late else lambda moment=moment: time.sleep(moment)
        code = forks.run(*command, "--overwrite", kill=kill)
        assert code in (-9, 0)
        if late and code == 0:  # it was done before
            longest = moment / 2
        try:
            found = "old" if checked(target) == old else "new"
            assert over or found == "new"
        except FileNotFoundError:
            found = "none"
            assert not over
        seen.append((code, late, over, found))
    print(seen)
    assert sum(code == -9 for code, late, *_ in seen if late) >= 4

    # the next run of the same output sweeps what all of them have left
    assert forks.run(*command, "--overwrite") == 0
    assert names(tmp_path) == ["failures.jsonl", "patch"] and checked(target) == new


def test_what_killed_runs_leave_is_swept_by_the_next(tiny_dir: Path, rows: Path, tmp_path: Path) -> None:
    for name in (".patch.new-0123abcd", ".patch.new-89abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    assert run_here(main, "repair", tiny_dir, rows, "-o", tmp_path / "patch", "--json", *SOLVABLE) == 0
    assert names(tmp_path) == ["failures.jsonl", "patch"]


@pytest.mark.parametrize("size", [0, 3_000, 20_000])
def test_a_full_disk_costs_no_earlier_patch_and_is_told_in_one_sentence(
    tiny_dir: Path, rows: Path, tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("repair", tiny_dir, rows, "-o", tmp_path / "patch", "--overwrite", "--json", *SOLVABLE)
    assert run_here(main, *command) == 0
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # Python turns the signal into an error
    try:
        code = run_here(main, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("Error: The patch could not be saved in") and error.count("\n") == 1
    after = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    assert before.items() <= after.items()
    kept = {path.parent for path in after.keys() - before.keys()}
    if size < 20_000:  # not even the tensors fit
        assert not kept
    else:
        (directory,) = kept
        assert str(directory) in error and Patch.read(directory).neurons


def as_nobody(*args: object) -> int:
    """The exit code of a command in a fork that is nobody's, if this process is root's, who may write anywhere."""
    child = os.fork()
    if not child:
        code = 99
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            code = run_here(main, *args)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_read_only_folder_is_refused_before_any_work(
    patch: Path, rows: Path, capfd, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    # pytest's folders are for their owner alone, and one of its workers' lies a step deeper
    for parent in (patch, *patch.parents, tmp_path, *tmp_path.parents):
        if parent.is_relative_to(tmp_path_factory.getbasetemp()) or parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    folder.chmod(0o555)
    none = "./no-model-is-needed"
    for command in (
        ("repair", none, rows, "-o", folder / "new"),
        ("report", patch, "-o", folder / "page.html"),
        ("revert", patch, "1", "--no-base", "-o", folder / "new"),
        ("export", patch, "-o", folder / "new"),
        ("stack", patch, patch, "-o", folder / "new"),
        ("merge", none, patch, "-o", folder / "new"),
        ("evaluate", none, rows, "-o", folder / "new.json"),
    ):
        assert as_nobody(*command) == 2, command
        error = capfd.readouterr().err
        assert "is not a directory that you may write to." in error and error.count("\n") == 1, command
    assert names(folder) == []


@pytest.mark.parametrize("command", ["report", "revert", "export", "stack", "merge"])
def test_a_full_disk_is_told_by_every_command_that_writes(
    command: str, patch: Path, tiny_dir: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python and safetensors tell of it in ways of their own."""
    real = Path.write_text

    def write_text(path: Path, *args: object, **kwargs: object) -> int:
        if ".new-" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **kwargs)

    def save_file(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if command == "report":
        monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_file)
    output = tmp_path / "out"
    words = {
        "report": (patch, "-o", output),
        "revert": (patch, "1", "--no-base", "-o", output),
        "export": (patch, "-o", output),
        "stack": (patch, patch, "-o", output),
        "merge": (tiny_dir, patch, "-o", output),
    }[command]
    assert run_here(main, command, *words) == 2 and names(tmp_path) == []
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("Error: No space is left where the output goes") and "Traceback" not in "".join(error)


def test_a_folder_that_becomes_read_only_keeps_the_patch_elsewhere(
    tiny_dir: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, folder = os.mkdir, tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "temporary").mkdir()

    def mkdir(path: str, *args: int, **kwargs: int) -> None:
        if Path(path).parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    code = run_here(main, "repair", tiny_dir, rows, "-o", folder / "patch", "--json", *SOLVABLE)
    (kept,) = (tmp_path / "temporary").iterdir()
    error = capsys.readouterr().err
    assert code == 2 and "Permission denied" in error and f"it is kept in {kept}" in error
    assert Patch.read(kept).neurons and RepairReport.load(kept / "repair_report.json").success


def steps_in(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["journal"])["steps"]


@pytest.mark.slow
def test_a_killed_repair_goes_on(forks: Forks, tiny_dir: Path, rows: Path, tmp_path: Path) -> None:
    """With nothing but the command line: killed once its file of what is finished is there, and started again."""
    target, unfinished = tmp_path / "patch", tmp_path / ".patch.unfinished"
    # hundreds of steps of the paper's algorithm, none of which solves anything
    command = ("repair", tiny_dir, rows, "-o", target, "--algorithm", "prior-guided", "--lr", "1e-9")
    command = (*command, "--damping", "1", "--growth", "1", "--steps", "1000000")

    def kill() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and not unfinished.is_file():
            time.sleep(0.05)

    assert forks.run(*command, kill=kill) == -9
    assert names(tmp_path) == [".patch.unfinished", "failures.jsonl"]
    kept = unfinished.read_bytes()
    steps = steps_in(unfinished)
    assert steps > 1
    # the same settings go on from it
    assert forks.run(*command, "--resume", kill=lambda: time.sleep(20)) == -9
    assert unfinished.read_bytes() != kept
    went_on, kept = steps_in(unfinished), unfinished.read_bytes()
    assert went_on > steps

    def kill_at_the_first_writing() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and unfinished.read_bytes() == kept:
            time.sleep(0.05)

    # and others do not: they begin at nothing, while those that went on would count further
    assert forks.run(*command, "--resume", "--margin", "0.02", kill=kill_at_the_first_writing) == -9
    assert unfinished.read_bytes() != kept and steps_in(unfinished) < went_on
