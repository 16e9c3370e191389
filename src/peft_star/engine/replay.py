"""Replaying the layers that a repair leaves alone: computed once a batch, not in every step.

A patch changes the output of the lowest patched decoder layer and of what lies above it. Everything below computes the
same in every step of Algorithm 1 and in every verification of the same rows, so it is recorded in the first forward
and replayed in the others, bit for bit. The model runs its own code either way; only the `forward` of the layers below
is substituted. So rotary embeddings, masks, and whatever else a model hands to its layers need no knowledge here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.utils import recursively_apply
from torch import nn

from ..models.inputs import embeddings_of
from .distributed import spans_processes
from .products import Products, recording_products, replaying_products
from .recording import forwarding

# a recorded batch takes rows x tokens x hidden width x bytes of the data type
MAX_BYTES = 1 << 30
# a forward that is asked for these reads more of the lower layers than the hidden state that leaves them
_READS_LOWER_LAYERS = ("use_cache", "output_hidden_states", "output_attentions", "output_router_logits")
# whether replaying is exact, by model and lowest layer: it depends on the model's code alone
_EXACT: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


@dataclass
class _Record:
    """What the layers below returned, in order of depth; only the last one's hidden state is kept. And what the lowest
    layer computes that does not change."""

    outputs: list[Any]
    products: Products

    @property
    def nbytes(self) -> int:
        sizes = {}

        def measure(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        recursively_apply(measure, [self.outputs, [output for _, output in self.products]])
        return sum(sizes.values())


def _placeholder(hidden: torch.Tensor) -> torch.Tensor:
    """Stands for a hidden state that nothing should read: NaN, so that it cannot pass unnoticed, in no memory."""
    return torch.full((), torch.nan, dtype=hidden.dtype, device=hidden.device).expand(hidden.shape)


def _copy(hidden: torch.Tensor) -> torch.Tensor:
    # next to a layer's computation a copy costs nothing, and then nobody can change the record in place
    return hidden.detach().clone()


def _map_hidden(function, output):
    """Apply `function` to the hidden state, which a layer returns alone or before other things (kept, detached)."""
    if isinstance(output, torch.Tensor):
        return function(output)
    hidden, *others = output
    return (function(hidden), *recursively_apply(torch.Tensor.detach, others))


class Replay:
    """Computes the layers below `lowest` once for each batch, and replays them in later forwards of that batch.

    ```python
    >>> replay = Replay(model, "model.layers.22")
    >>> for _ in range(steps):
    ...     for batch in batches:
    ...         with replay(batch):  # records in the first step, replays in the others
    ...             logits = completion_logits(model, batch)
    ```

    Logits, and gradients of everything in `lowest` and above, are bit-equal to those of the full computation. No
    gradient reaches the layers below from a replayed forward, and neither do hooks inside of them fire; hooks on these
    layers themselves see NaN, save that the last of them returns what it returned.

    Where replaying cannot be exact, forwards are computed in full: when the model is in training mode (dropout,
    gradient checkpointing), in `torch.inference_mode`, when layers talk to other processes (as in FSDP), when a
    forward is asked for a cache, hidden states, attentions or router logits, and for models whose upper layers read
    more of the lower ones than the hidden state, such as the shared keys and values of Gemma 3n. The latter is found
    out by replaying a short input when the object is made.

    Args:
        model: A causal LM, in evaluation mode; the module that is called within the context.
        lowest: The lowest layer that changes, by its name in `model.named_modules()`.
        max_bytes: Recorded tensors stay below this size on their devices; batches beyond it are computed in full.
        check: Whether to replay a short input first, to see that it is exact. A model and layer are checked once.
        caches: Replay also forwards that are given a cache. A replayed layer leaves its part of it as it is, so it is
            for the caller to know that no layer above reads that.
        changing: Modules inside of `lowest`, by name, if nothing else changes there: what its matrices compute in
            front of them is replayed as well, as far as that takes no more than half of `max_bytes`.

    Attributes:
        exact: Whether anything is recorded at all.
        nbytes: The size of what is recorded at the moment.

    Raises:
        ValueError: `lowest` is not the name of one of the model's layers.
    """

    def __init__(
        self,
        model: nn.Module,
        lowest: str,
        max_bytes: int = MAX_BYTES,
        *,
        check: bool = True,
        caches: bool = False,
        changing: Sequence[str] = (),
    ):
        parent, _, key = lowest.rpartition(".")
        layers = dict(model.named_modules(remove_duplicate=False)).get(parent)
        if not isinstance(layers, nn.ModuleList) or key not in layers._modules:
            raise ValueError(
                f"{lowest!r} is not a layer of {type(model).__name__}; give a name that `find_decoder_layers` returns."
            )
        self._model = ref(model)  # what is kept for a model must not keep the model
        self.max_bytes = max_bytes
        self._caches = caches
        self._lower = list(layers)[: list(layers._modules).index(key)]
        self._lowest, self._changing = layers._modules[key], tuple(changing)
        self._records: WeakKeyDictionary[Any, _Record] = WeakKeyDictionary()
        self.exact = not check or replays_exactly(model, lowest)

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "the model is gone"
        return model

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self._records.values())

    def drop(self, batch: Any = None) -> None:
        """Forget what was recorded of `batch`, or everything. To be called when a layer below has changed."""
        if batch is None:
            self._records.clear()
        else:
            self._records.pop(batch, None)

    @contextmanager
    def __call__(self, batch: Any) -> Iterator[None]:
        """Around one forward of `batch`, which records the layers below, or replays them if they were recorded.

        Args:
            batch: Stands for the inputs of the forward, which must be the same each time; any object that is hashable
                and can be referenced weakly, such as a [`Batch`]. What was recorded is freed along with it.
        """
        with ExitStack() as stack:

            def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                handle.remove()
                if self._applies(kwargs):
                    record = self._records.get(batch)
                    stack.enter_context(self._recording(batch) if record is None else self._replaying(record))

            # only the forward itself knows what it is asked for
            handle = self.model.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(handle.remove)
            yield

    def _applies(self, kwargs: dict[str, Any]) -> bool:
        if not self._lower or not self.exact or torch.is_inference_mode_enabled():
            return False
        if spans_processes(self.model):
            return False
        config = getattr(self.model, "config", None)
        if callable(text_config := getattr(config, "get_text_config", None)):
            config = text_config()
        for name in _READS_LOWER_LAYERS:
            if self._caches and name == "use_cache":
                continue
            asked = kwargs.get(name)
            if getattr(config, name, False) if asked is None else asked:
                return False
        if kwargs.get("past_key_values") is not None and not self._caches:
            return False
        return not any(module.training for layer in self._lower for module in layer.modules())

    @contextmanager
    def _recording(self, batch: Any) -> Iterator[None]:
        called: list[int] = []
        outputs: list[Any] = []

        def hook_of(index: int):
            keep = _copy if index == len(self._lower) - 1 else _placeholder

            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                called.append(index)
                outputs.append(_map_hidden(keep, output))

            return hook

        # before other hooks, which may change the output and will do so again when it is replayed
        handles = [
            layer.register_forward_hook(hook_of(index), prepend=True) for index, layer in enumerate(self._lower)
        ]
        changing = [self.model.get_submodule(name) for name in self._changing]
        try:
            with recording_products(self._lowest, changing) as products:
                yield
        finally:
            for handle in handles:
                handle.remove()
        record, before = _Record(outputs, products), self.nbytes
        # most is won by the layers below: these are to have room first
        if before + record.nbytes > self.max_bytes / 2:
            products.clear()
        # a layer that runs twice or out of order returns more than one thing
        if called == list(range(len(self._lower))) and before + record.nbytes <= self.max_bytes:
            self._records[batch] = record

    @contextmanager
    def _replaying(self, record: _Record) -> Iterator[None]:
        *outputs, last = record.outputs
        forwards = [lambda *args, output=output, **kwargs: output for output in outputs]
        forwards.append(lambda *args, **kwargs: _map_hidden(_copy, last))
        with ExitStack() as stack:
            for layer, forward in zip(self._lower, forwards):
                stack.enter_context(forwarding(layer, forward))
            stack.enter_context(replaying_products(record.products))
            yield


class _Key:
    """Stands for the inputs of a check."""


@torch.no_grad()
def replays_exactly(model: nn.Module, lowest: str, inputs: dict[str, torch.Tensor] | None = None) -> bool:
    """Whether a forward with the layers below `lowest` replayed gives the same logits, bit for bit.

    Args:
        model: A causal LM, in evaluation mode.
        lowest: The name of a decoder layer.
        inputs: Keyword arguments of the forward. By default three tokens; the answer is then remembered.

    Returns:
        `bool`: False also when such a forward fails, or when nothing could be recorded.
    """
    known = _EXACT.setdefault(model, {})
    if inputs is None and lowest in known:
        return known[lowest]
    replay = Replay(model, lowest, check=False)
    if not replay._lower:
        return True
    key = _Key()
    try:
        kwargs = {"use_cache": False, **(_short_inputs(model) if inputs is None else inputs)}
        with replay(key):
            full = model(**kwargs).logits
        with replay(key):
            replayed = model(**kwargs).logits
        exact = replay.nbytes > 0 and torch.equal(full, replayed)
    except Exception:  # a model's code may fail as it likes on a missing state; the full computation is always right
        exact = False
    if inputs is None and not model.training:
        known[lowest] = exact
    return exact


def _short_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    embeddings = embeddings_of(model).weight
    # accelerate moves the inputs of offloaded modules itself
    device = "cpu" if embeddings.is_meta else embeddings.device
    input_ids = torch.arange(3, device=device)[None] % embeddings.shape[0]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
