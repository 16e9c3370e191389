"""Repairs shared out over processes that each hold the whole model (data parallelism).

The rows' batches are dealt out; what each process finds in its own goes to all of them: predictions, losses, scores,
and the medium tokens' activations and gradients of just the patched neurons. From then on every process computes the
same, so all decide alike and end with the same patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, get_int_from_env, parse_flag_from_env, reduce
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.inputs import embeddings_of

if TYPE_CHECKING:
    from ..failures import Row
    from .batch import Batch
    from .predictions import Predictions

# wrappers whose forward talks to other processes; by name, since importing them takes a build with distributed
_WRAPPERS = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
# where launchers say how many processes they have started; the last three are MPI's
_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


@contextmanager
def launched() -> Iterator[str | None]:
    """Joins the processes that a launcher such as `accelerate launch`, `torchrun` or, on CPUs, `mpirun` has started,
    and gives this one's device; None where there is but one."""
    if get_int_from_env(_SIZES, 1) == 1:
        yield None
        return
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    yield str(state.device)
    # not after an error: the others may wait for this process then, until the launcher ends them
    state.destroy_process_group()


def is_distributed() -> bool:
    """Whether this process is one of several that can talk to each other."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not is_distributed() or distributed.get_rank() == 0


def spans_processes(model: nn.Module) -> bool:
    """Whether the model's layers talk to other processes: FSDP, tensor or expert parallelism, ZeRO 3, DDP.

    Such a model has to run the same inputs at the same time in all processes.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    for module in model.modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        if isinstance(module, DistributedDataParallel) or not names.isdisjoint(_WRAPPERS):
            return True
    from torch.distributed.tensor import DTensor

    # DeepSpeed marks the parameters that ZeRO 3 shards
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


class Team:
    """The processes that the batches of a repair are dealt out to, seen from one of them.

    All of them have to call the same functions with the same rows. Without a model, or where there is but one process,
    or where the model's layers themselves talk to other processes, this process does everything.

    Args:
        model: A causal LM, the whole of it in each process.

    Attributes:
        size, rank: How many processes there are, and which of them this is.
    """

    def __init__(self, model: nn.Module | None = None):
        self.size, self.rank = 1, 0
        self._owners: WeakKeyDictionary[Batch, int] = WeakKeyDictionary()
        if model is None or not is_distributed():
            return
        state = PartialState(cpu=distributed.get_backend() == "gloo")
        # accelerate reads a launcher's variables; processes that were joined by other means it does not know
        if state.num_processes == distributed.get_world_size() and not spans_processes(model):
            self.size, self.rank, self._device = state.num_processes, state.process_index, state.device
            self._dtype = torch.promote_types(embeddings_of(model).weight.dtype, torch.float32)

    def check_same(self, rows: Sequence[Any]) -> None:
        """Raises `ValueError`, in every process, when they were not given the same rows."""
        if any(other != rows for other in self.gather(rows)):
            raise ValueError(
                "The processes were given different rows; give repair() the same in each, it deals them out itself."
            )

    def rows(self, batches: Sequence[Batch]) -> int:
        """How many rows this process's part of the batches holds."""
        return sum(len(batch.items) for batch in self.share(batches))

    def share_rows(self, rows: Sequence[Row]) -> list[Row]:
        """This process's part of the rows, long and short ones alike."""
        return sorted(rows, key=len)[self.rank :: self.size] if self.size > 1 else list(rows)

    def limit(self, tokens: int, rows: Sequence[Row]) -> int:
        """The size of batches, at most `tokens`, with which each process gets one."""
        if self.size == 1 or not rows:
            return tokens
        return max(1, min(tokens, -(-max(map(len, rows)) * len(rows) // self.size)))

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This process's part of the batches; a batch stays with the process that it was first given to."""
        if self.size == 1:
            return list(batches)
        load = [0] * self.size
        for batch in batches:
            if batch in self._owners:
                load[self._owners[batch]] += batch.input_ids.numel()
        new = [batch for batch in batches if batch not in self._owners]
        for batch in sorted(new, key=lambda batch: batch.input_ids.numel(), reverse=True):
            owner = self._owners[batch] = load.index(min(load))
            load[owner] += batch.input_ids.numel()
        return [batch for batch in batches if self._owners[batch] == self.rank]

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, in the same order everywhere. Tensors should be small, and on the CPU."""
        return [value] if self.size == 1 else gather_object([value])

    def total(self, value: float) -> float:
        return sum(self.gather(value))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes; the shape is the same in each."""
        if self.size == 1:
            return tensor
        return reduce(tensor.to(self._device), "sum").to(tensor.device)

    def place(self, own: torch.Tensor | None, places: torch.Tensor, size: int) -> torch.Tensor | None:
        """One matrix (`size`, w) of all processes' rows: those of `own` (n, w) or None come to the `places` (n). None
        where the only process has none."""
        if self.size == 1:
            return own
        width = max(self.gather(0 if own is None else own.shape[1]))
        whole = torch.zeros(size, width, dtype=self._dtype, device=self._device if own is None else own.device)
        if own is not None:
            whole[places.to(whole.device)] = own.to(whole.dtype)
        return self.sum(whole)

    def join(self, predictions: Predictions, batches: Sequence[Batch]) -> None:
        """Put what the other processes predict for their parts of the batches into `predictions`."""
        if self.size == 1 or not batches:
            return
        own = {id(batch) for batch in self.share(batches)}
        slots = torch.cat([batch.slots.cpu() for batch in batches])
        mine = torch.cat([torch.full((len(batch),), id(batch) in own) for batch in batches])
        names = [item.name for item in fields(predictions)]
        # token ids and float32 are exact in float64, and so is adding zeros
        table = torch.stack([getattr(predictions, name)[slots].double() for name in names])
        table = self.sum(table.masked_fill(~mine, 0))
        for name, values in zip(names, table):
            tensor = getattr(predictions, name)
            tensor[slots] = values.to(tensor.dtype)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the parameters' gradients; one that no process has a gradient of is left without."""
        if self.size == 1:
            return
        present = self.gather([parameter.grad is not None for parameter in parameters])
        for parameter, anywhere in zip(parameters, map(any, zip(*present))):
            if anywhere:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.sum(own.to(self._dtype)).to(parameter.dtype)


ALONE = Team()
