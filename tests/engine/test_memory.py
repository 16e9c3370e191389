"""Batches that memory does not hold are halved until they fit, and other errors are left alone."""

import pytest
import torch

from peft_star.engine.memory import halving, is_out_of_memory


def full(tokens):
    if tokens % 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: x")


def test_what_torch_says_when_memory_runs_out():
    for error in (MemoryError(), torch.OutOfMemoryError("no")):
        assert is_out_of_memory(error)
    with pytest.raises(RuntimeError) as raised:  # what a CPU really says
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("The sizes of tensors must match")) and not is_out_of_memory(OSError())


def test_batches_are_halved_until_they_fit():
    tried = []

    def attempt(tokens):
        tried.append(tokens)
        return tokens if tokens <= 25 else full(tokens)

    with pytest.warns(UserWarning, match="Batches of 50 tokens do not fit into memory; starting over with 25"):
        assert halving(attempt, 100, 7) == 25
    assert tried == [100, 50, 25]


def test_a_row_that_does_not_fit_is_named():
    tried = []

    def attempt(tokens):
        tried.append(tokens)
        full(tokens)

    with (
        pytest.warns(UserWarning),
        pytest.raises(MemoryError, match="single row, .* 30 tokens; shorten it"),
    ):
        halving(attempt, 100, 30)
    assert tried == [100, 50, 30]


def test_other_errors_are_left_alone():
    with pytest.raises(ZeroDivisionError):
        halving(lambda tokens: 1 // 0, 8, 1)
    with pytest.raises(RuntimeError, match="shape"):
        halving(lambda tokens: (_ for _ in ()).throw(RuntimeError("shape")), 8, 1)


def test_one_of_several_processes_does_not_start_over(monkeypatch):
    monkeypatch.setattr("peft_star.engine.memory.is_distributed", lambda: True)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        halving(full, 100, 1)
