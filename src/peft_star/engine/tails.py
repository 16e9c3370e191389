"""Rows from a position on: what stands in front is computed once, and held as keys and values.

Where only what happens from some token on is asked for, again and again, each forward computes that token and what
follows it, behind a cache of the rest. Whether a model allows that together with a replay of its lower layers is found
out by trying; where it does not, rows are read whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache

from ..failures import Row
from ..models.inputs import embeddings_of, evaluating, input_device
from .distributed import spans_processes
from .recording import head_reads
from .replay import Replay

# probe: the largest difference of logits, in their standard deviations, that rounding explains, at least and in
# roundings of the model's type
_ERROR, _ERROR_ROUNDINGS = 1e-4, 64


class Tails:
    """Rows of one batch, each read from a position of its own on.

    Prefixes are padded on the left and tails on the right, so that two tokens are as far apart as in the row, also for
    attention with a window.

    Args:
        model: The causal LM that will read them; its lower layers must not change afterwards.
        rows: B rows; of each the last token is not read.
        starts: Per row the first position that is read again and again. All 0: there is no prefix and no cache.
        reads: Per row the positions, from its start on, at which logits are asked for.

    Attributes:
        input_ids: The tails' tokens, shape (B, T).
        rows, positions: Where the N logits are read, as in a [`Batch`]; positions count from the starts.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, rows: Sequence[Row], starts: Sequence[int], reads: Sequence[Sequence[int]]
    ) -> None:
        device = input_device(model)
        self.input_ids, mask = _pad([row.input_ids[start:-1] for row, start in zip(rows, starts)], device)
        self.rows = torch.tensor([number for number, places in enumerate(reads) for _ in places], device=device)
        self.positions = torch.tensor(
            [place - start for start, places in zip(starts, reads) for place in places], device=device
        )
        self.attention_mask, self.position_ids = mask, None
        self._states: list[tuple[torch.Tensor, torch.Tensor]] = []
        if max(starts) == 0:
            return
        ids, prefix_mask = _pad([row.input_ids[:start] for row, start in zip(rows, starts)], device, left=True)
        first = torch.tensor(starts, device=device)[:, None]
        self.position_ids = first + torch.arange(self.input_ids.shape[1], device=device)
        self.attention_mask = torch.cat([prefix_mask, mask], 1)
        cache = DynamicCache()
        with head_reads(model, None):
            model(
                input_ids=ids,
                attention_mask=prefix_mask,
                position_ids=(torch.arange(ids.shape[1], device=device) + first - ids.shape[1]).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            )
        layers: Any = cache.layers  # those of a model that carries other states fail here, which the probe catches
        self._states = [(layer.keys, layer.values) for layer in layers]

    def logits(self, model: nn.Module) -> torch.Tensor:
        """Logits (N, V) where they are asked for."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "use_cache": False,
        }
        if self._states:
            cache = DynamicCache()  # a forward adds to the one it is given
            for index, (keys, values) in enumerate(self._states):
                cache.update(keys, values, index)
            inputs |= {"position_ids": self.position_ids, "past_key_values": cache, "use_cache": True}
        with head_reads(model, self):
            return model(**inputs).logits[0]


def _pad(ids: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask, both (B, T)."""
    longest = max(map(len, ids))
    tokens, mask = torch.zeros(2, len(ids), longest, dtype=torch.long)
    for number, row in enumerate(ids):
        place = slice(longest - len(row), None) if left else slice(len(row))
        tokens[number, place], mask[number, place] = torch.tensor(row, dtype=torch.long), 1
    return tokens.to(device), mask.to(device)


_CAN_READ: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def can_read_tails(model: nn.Module, lowest: str) -> bool:
    """Whether rows read from a position on, with the layers below `lowest` replayed, say what whole rows say.

    Found out by trying, once for each model and layer, with a change of what enters `lowest`. Not so in models that
    carry a state from token to token in another way (Mamba, short convolutions), or whose upper layers read the lower
    ones' keys.

    Args:
        model: A causal LM in evaluation mode.
        lowest: The name of a decoder layer.
    """
    if spans_processes(model) or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return False
    known = _CAN_READ.setdefault(model, {})
    if lowest not in known:
        try:
            known[lowest] = _probe(model, lowest)
        except Exception:  # whatever a model's code has against it: whole rows always work
            known[lowest] = False
    return known[lowest]


@torch.no_grad()
def _probe(model: nn.Module, lowest: str) -> bool:
    vocabulary = embeddings_of(model).weight.shape[0]
    tokens = torch.randint(vocabulary, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Row(0, "", "", tuple(tokens[:9]), tuple(tokens[9:12])), Row(1, "", "", tuple(tokens[5:12]), (tokens[12],))]
    starts = (5, 3)
    changes: list[int] = []
    reads = [range(start, len(row) - 1) for row, start in zip(rows, starts)]

    def change(module, args, kwargs):
        # at the starts, where the tails' first tokens stand
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        place = torch.arange(len(rows)), torch.tensor(changes)
        hidden[place] += hidden[place].roll(1, dims=-1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    with evaluating(model):
        whole, tails = Tails(model, rows, (0, 0), reads), Tails(model, rows, starts, reads)
        replay = Replay(model, lowest, check=False, caches=True)
        with replay(tails):
            plain = tails.logits(model).float()
        handle = model.get_submodule(lowest).register_forward_pre_hook(change, with_kwargs=True)
        try:
            changes[:] = starts
            expected = whole.logits(model).float()
            changes[:] = (0, 0)
            with replay(tails):
                found = tails.logits(model).float()
        finally:
            handle.remove()
    scale = expected.std(dim=-1).mean()
    error = ((found - expected).square().mean().sqrt() / scale).item()
    moved = ((plain - expected).square().mean().sqrt() / scale).item()
    rounding = torch.finfo(embeddings_of(model).weight.dtype).eps
    return replay.nbytes > 0 and (error <= _ERROR or error <= min(_ERROR_ROUNDINGS * rounding, moved / 4))
