"""What is kept on disk: found again, computed again where it is damaged, and never in the way."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HOME
from safetensors.torch import save_file

from peft_star import cache
from peft_star.cache import JSON, TENSORS, cache_dir, kept

FORMS = pytest.mark.parametrize("form", [JSON, TENSORS], ids=["json", "tensors"])
OF = "a model"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "things"


def thing(form, scale=1):
    return [[scale, 2], []] if form is JSON else {"a": torch.arange(6.0).view(2, 3) * scale, "b": torch.ones(2)}


def same(a, b):
    return a == b if isinstance(a, list) else a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Maker:
    """Computes a thing, and counts how often."""

    def __init__(self, form, scale=1):
        self.form, self.scale, self.times = form, scale, 0

    def __call__(self):
        self.times += 1
        return thing(self.form, self.scale)


@FORMS
def test_it_is_computed_once(form, folder):
    make = Maker(form)
    for _ in range(3):
        assert same(kept("things", OF, make, form), thing(form))
    assert make.times == 1 and [path.suffix for path in folder.iterdir()] == [form.suffix]


@FORMS
def test_what_depends_on_something_else_lies_beside_it(form, folder):
    for scale, of in enumerate(["a model", "another", "a model"]):
        kept("things", of, Maker(form, scale), form)
    assert same(kept("things", "a model", Maker(form, 9), form), thing(form, 0))
    assert same(kept("things", "another", Maker(form, 9), form), thing(form, 1)) and len(list(folder.iterdir())) == 2


@FORMS
@pytest.mark.parametrize("damage", [b"", b"something else", None], ids=["empty", "foreign", "cut short"])
def test_a_damaged_file_is_made_anew(form, folder, damage):
    kept("things", OF, Maker(form), form)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    for times in (1, 0):
        make = Maker(form)
        assert same(kept("things", OF, make, form), thing(form)) and make.times == times
    assert list(folder.iterdir()) == [path]


def test_a_changed_bit_and_another_model_s_tensors_are_noticed(folder):
    kept("things", OF, Maker(TENSORS), TENSORS)
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert same(kept("things", OF, Maker(TENSORS), TENSORS), thing(TENSORS))
    kept("things", "another", Maker(TENSORS, 5), TENSORS)
    (other,) = set(folder.iterdir()) - {path}
    other.replace(path)
    assert same(kept("things", OF, Maker(TENSORS), TENSORS), thing(TENSORS))
    save_file(thing(TENSORS, 7), path)
    assert same(kept("things", OF, Maker(TENSORS), TENSORS), thing(TENSORS))


@FORMS
def test_what_cannot_be_it_is_made_anew(form):
    kept("things", OF, Maker(form), form)
    make = Maker(form, 3)
    assert same(kept("things", OF, make, form, lambda found: same(found, thing(form, 3))), thing(form, 3))
    assert make.times == 1 and same(kept("things", OF, Maker(form), form), thing(form, 3))

    def stumbling(found):
        raise TypeError

    assert same(kept("things", OF, Maker(form), form, stumbling), thing(form))


@pytest.mark.parametrize("setting", ["", " 0 "])
def test_it_can_be_turned_off(monkeypatch, folder, setting):
    monkeypatch.setenv("PEFT_STAR_CACHE", setting)
    make = Maker(JSON)
    assert cache_dir() is None and kept("things", OF, make, JSON) == kept("things", OF, make, JSON) == thing(JSON)
    assert make.times == 2 and not folder.exists()


def test_what_cannot_be_told_is_not_kept(folder):
    assert kept("things", None, Maker(JSON), JSON) == thing(JSON) and not folder.exists()


def test_it_lies_beside_the_hub_s(monkeypatch):
    monkeypatch.delenv("PEFT_STAR_CACHE", raising=False)
    assert cache_dir() == Path(HF_HOME) / "peft_star"
    monkeypatch.setenv("PEFT_STAR_CACHE", os.path.join("~", "kept"))
    assert cache_dir() == Path.home() / "kept"


@FORMS
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, form):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path / "file"))
    make = Maker(form)
    for _ in range(2):
        assert same(kept("things", OF, make, form), thing(form))
    assert make.times == 2 and (tmp_path / "file").read_text() == "in the way"


@FORMS
def test_a_full_disk_costs_nothing_but_the_cache(folder, form):
    if (child := os.fork()) == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))
            code = int(not same(kept("things", OF, Maker(form), form), thing(form)))
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0 and list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_write_leaves_nothing_behind(monkeypatch, folder, error):
    def interrupted(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(cache, "save_file", interrupted)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                kept("things", OF, Maker(TENSORS), TENSORS)
        else:
            assert same(kept("things", OF, Maker(TENSORS), TENSORS), thing(TENSORS))
    assert list(folder.iterdir()) == []


def test_an_error_of_the_computation_is_the_caller_s(folder):
    def fails():
        raise ValueError("the weights are not finite")

    with pytest.raises(ValueError, match="not finite"):
        kept("things", OF, fails, JSON)
    assert not folder.exists()


@FORMS
def test_processes_that_fill_it_at_once_are_in_nobody_s_way(folder, form):
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            code = 1
            try:
                for number in range(60):
                    # every third time it is gone again, so all of them write, and read what is just being written
                    if number % 3 == 0 and (path := next(iter(folder.glob(f"*{form.suffix}")), None)):
                        path.unlink(missing_ok=True)
                    assert same(kept("things", OF, Maker(form), form), thing(form))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert {path.suffix for path in folder.iterdir()} <= {form.suffix}
    make = Maker(form)
    kept("things", OF, make, form)
    assert same(kept("things", OF, make, form), thing(form)) and make.times <= 1


@pytest.mark.parametrize("others", [[True, False], [True, True]])
def test_processes_that_work_together_compute_it_together(folder, others):
    """One that has found it would leave the others alone in a computation that takes all of them."""
    kept("things", OF, Maker(JSON), JSON)
    make, told = Maker(JSON), []
    assert kept("things", OF, make, JSON, gather=lambda found: told.append(found) or others) == thing(JSON)
    assert told == [True] and make.times == (not all(others))


def test_one_of_them_writes(folder):
    assert kept("things", OF, Maker(JSON), JSON, writes=False) == thing(JSON)
    assert not folder.exists()
