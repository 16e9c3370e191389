"""Directories that are written completely or not at all, also by runs that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_star import files
from peft_star.loading import find_patch, load_model
from support.command_line import names

pytestmark = pytest.mark.skipif(files.fcntl is None, reason="nothing is known of other processes here")


def in_a_child(work: Callable[[], None]) -> int:
    """Do something in another process; returns the number of the signal that killed it, or 0."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def kill(path: Path, moment: str) -> None:
    """Write a directory in another process, and kill it at a moment."""
    rename = Path.rename

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def renaming(self: Path, target: Path) -> None:
        kind = "old" if ".old-" in target.name else "new"
        if moment == f"before {kind}":
            die()
        rename(self, target)
        if moment == f"after {kind}":
            die()

    def run() -> None:
        Path.rename = renaming
        with files.new_directory(path) as directory:
            (directory / "file").write_text("half of")
            if moment == "writing":
                die()
            (directory / "file").write_text("new")

    assert in_a_child(run) == signal.SIGKILL


def write(path: Path, text: str) -> None:
    path.mkdir()
    (path / "file").write_text(text)


def test_a_new_directory_is_gone_when_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.new_directory(tmp_path / "x") as directory:
        (directory / "file").touch()
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("moment", "then"),
    [("writing", "old"), ("before old", "old"), ("after old", "new"), ("before new", "new"), ("after new", "new")],
)
@pytest.mark.parametrize("reader", [files.recover, files.check_output, find_patch])
def test_a_killed_run_leaves_the_old_or_the_new(tmp_path: Path, moment: str, then: str, reader: object) -> None:
    path = tmp_path / "out"
    write(path, "old")
    kill(path, moment)
    assert len(names(tmp_path)) > 1 or moment == "writing"
    if reader is files.check_output:
        with pytest.raises(ValueError, match="is not empty"):
            files.check_output(path, False, "file")
    else:
        reader(path)
    assert (path / "file").read_text() == then
    if reader is not find_patch or moment in ("after old", "before new"):
        assert names(tmp_path) == ["out"]


def test_models_are_recovered_where_they_are_read(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    kill(tmp_path / "out", "after old")
    with pytest.raises(ValueError, match="it has no config.json"):
        load_model(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_the_next_run_of_an_output_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    kill(tmp_path / "out", "writing")
    kill(tmp_path / "other", "writing")
    (tmp_path / ".out.new-of-mine").mkdir()
    with files.new_directory(tmp_path / "out") as directory:
        left = [name for name in names(tmp_path) if name.startswith(".out")]
        assert sorted(left) == sorted([".out.new-of-mine", directory.name])
    assert any(name.startswith(".other.new-") for name in names(tmp_path))


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    """By another process, and by this one."""
    path = tmp_path / "out"
    with files.new_directory(path) as directory:
        (directory / "file").touch()
        in_a_child(lambda: files.recover(path))
        files.recover(path)
        assert (directory / "file").exists()
    # a living run between its two renames
    path.rename(tmp_path / ".out.old-01234567")
    (tmp_path / ".out.new-01234567").mkdir()
    claim = files._claim(tmp_path / ".out.new-01234567")
    files.recover(path)
    assert not path.exists() and len(names(tmp_path)) == 2
    os.close(claim)
    files.recover(path)
    assert names(tmp_path) == ["out"]


def test_an_output_that_came_to_be_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(files.KeptElsewhere, match="is not empty any more; what was to be written there is kept in"):
        with files.new_directory(path, overwrite=False) as directory:
            (directory / "file").write_text("later")
            write(path, "earlier")
    assert (path / "file").read_text() == "earlier"
    (kept,) = tmp_path.glob("out.kept-*")
    assert (kept / "file").read_text() == "later" and len(names(tmp_path)) == 2


def test_an_empty_directory_that_came_to_be_meanwhile_is(tmp_path: Path) -> None:
    with files.new_directory(tmp_path / "out", overwrite=False) as directory:
        (directory / "file").touch()
        (tmp_path / "out").mkdir()
    assert names(tmp_path / "out") == ["file"]


def test_a_new_file_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    with files.new_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), files.new_file(path) as temporary:
        temporary.write_text("half of")
        raise RuntimeError
    assert (path.read_text(), names(path.parent)) == ("new", ["file"])


def test_a_file_that_came_to_be_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(files.KeptElsewhere, match="is kept in") as error, files.new_file(path, False) as temporary:
        temporary.write_text("new")
        path.write_text("old")
    [kept] = tmp_path.glob("file.kept-*")
    assert (path.read_text(), kept.read_text()) == ("old", "new") and str(kept) in str(error.value)


def test_what_a_killed_run_left_of_a_file_is_swept_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def run() -> None:
        with files.new_file(path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(run) == signal.SIGKILL
    assert len(names(tmp_path)) == 1
    with files.new_file(path) as living, files.new_file(path) as temporary:
        assert len(names(tmp_path)) == 2 and living.exists()
        temporary.write_text("new")
    assert names(tmp_path) == ["file"]


def test_outputs_that_are_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.check_file_output(path, False, b"KIND")
    path.write_bytes(b"KIND of file")
    files.check_file_output(path, True, b"KIND", inputs=(None, tmp_path / "gone"))
    (tmp_path / "other").write_text("other")
    (tmp_path / "link").symlink_to(path)
    for output, overwrite, inputs, message in (
        (tmp_path, True, (), "is a directory; the output is a file"),
        (path, False, (), "is there already; give --overwrite"),
        (tmp_path / "other", True, (), "is another kind of file"),
        (tmp_path / "link", True, (path,), "is the input"),
        (path / "below", False, (), "cannot be written: .*file is not a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            files.check_file_output(output, overwrite, b"KIND", inputs)


def test_json_that_several_processes_write_at_once_is_always_whole(tmp_path: Path) -> None:
    path, children = tmp_path / "known.json", []
    for writer in range(3):
        if (child := os.fork()) == 0:
            code = 1
            try:
                for number in range(100):
                    files.write_json(path, [writer] * 100 * (number % 3 + 1))
                    found = files.read_json(path)
                    assert len(set(found)) == 1 and len(found) in (100, 200, 300)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert list(tmp_path.iterdir()) == [path]
