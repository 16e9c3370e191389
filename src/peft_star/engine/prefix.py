"""Which rows are packed behind a common prefix (`packs.py`): where that pays, in models that compute the same then."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..failures import Row
from ..models.inputs import embeddings_of, evaluating, input_device, mask_dtype, text_config
from .packs import Pack, pad, prefix_mask

# Attention of T tokens to T tokens takes 4 T² d operations, the matrices of a layer about 24 d² for each token: it
# costs as much as T² / (6 d) tokens.
_QUADRATIC = 6
# Of the cost that a pack must save: below that, a mask of its own is not worth the trouble.
_SAVING = 0.1
# No longer packs than this: a mask has T² entries.
_MAX_LENGTH = 8192
# Windows that transformers lays into the mask, so that they do not apply to a mask that is given.
_MASKED_WINDOWS = ("sliding_window", "attention_chunk_size")
_WINDOW = re.compile(r"window|chunk|local_att")
_NO_WINDOW = re.compile(r"layers|pattern|feed_forward")
# Probe: differences of logits, in their standard deviations, that rounding explains, at least and in roundings. Seen
# on SmolLM2 and Gemma 3: errors of 2e-6 to 2e-5 in float32, 0.02 to 0.25 in bfloat16 (0.2 to 2 with wrong positions).
_LEAK, _LEAK_ROUNDINGS = 1e-5, 1
_ERROR, _ERROR_ROUNDINGS = 1e-4, 64


def pack_rows(rows: Sequence[Row], max_tokens: int, model: nn.Module) -> list[Pack]:
    """Pack rows that begin alike wherever that saves computation and the model computes the same; else one by one.

    Every completion token is predicted from a position of its row's own, so that each medium token has activations and
    gradients of its own, packed or not.

    Args:
        rows: The rows.
        max_tokens: The longest sequence; one row always fits.
        model: A causal LM.
    """
    packs = _group(rows, max_tokens, model)
    if any(len(pack.rows) > 1 for pack in packs) and not can_pack(model):
        return [Pack((row,)) for row in rows]
    return packs


def _group(rows: Sequence[Row], max_tokens: int, model: nn.Module) -> list[Pack]:
    width = embeddings_of(model).weight.shape[-1]
    longest_row, longest_pack = _limits(model)
    longest_pack = min(longest_pack, max_tokens, _MAX_LENGTH)

    def cost(length: int) -> float:
        return length + length**2 / (_QUADRATIC * width)

    packs: list[Pack] = []
    pack, common = None, 0
    # in the order of their tokens, neighbours have the most in common
    for row in sorted(rows, key=lambda row: row.prompt_ids):
        if pack is not None:
            # the last token of a prompt predicts the first of the completion: it belongs to the row
            common = min(common, len(row.prompt_ids) - 1, _common(pack.rows[-1].prompt_ids, row.prompt_ids))
            longer = Pack((*pack.rows, row), common)
            fits = len(longer) <= longest_pack and len(row) <= longest_row
            if fits and cost(len(longer)) < cost(len(pack)) + cost(len(row)):
                pack = longer
                continue
            packs.append(pack)
        pack, common = Pack((row,)), len(row.prompt_ids) - 1 if len(row) <= longest_row else 0
    if pack is not None:
        packs.append(pack)
    worth = []
    for pack in packs:
        alone = [Pack((row,)) for row in pack.rows]
        pays = cost(len(pack)) < (1 - _SAVING) * sum(map(cost, map(len, alone)))
        worth += [pack] if len(alone) > 1 and pays else alone
    return worth


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((index for index, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _limits(model: nn.Module) -> tuple[int, int]:
    """The longest row that can be packed, and the longest pack, as far as the model's configuration tells.

    A window in the mask is replaced by the pack's mask, so rows must fit into it. A window by index, as GPT-Neo's,
    would hide a prefix that lies far in front, so packs must fit into it; and into the positions that there are, since
    some models keep tables of that size.
    """
    config = text_config(model)
    own = not type(_base(model)).__module__.startswith("transformers.")
    row, pack = _MAX_LENGTH, getattr(config, "max_position_embeddings", None) or _MAX_LENGTH
    for name, value in config.to_dict().items():
        if type(value) is not int or value <= 0 or not _WINDOW.search(name) or _NO_WINDOW.search(name):
            continue
        if name in _MASKED_WINDOWS and not own:
            row = min(row, value)
        else:
            pack = min(pack, value)
    return row, pack


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_CAN_PACK: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


def can_pack(model: nn.Module) -> bool:
    """Whether `model` computes the same for packed rows as for rows of their own, up to rounding.

    Found out by trying, once for each model: a short row packed behind others must say what it says alone. Not so in
    models whose attention takes no mask of this form (flash attention, ALiBi), goes by the place in the sequence, or
    that carry a state from token to token (Mamba, short convolutions); the flash kernels are not even tried.

    Args:
        model: A causal LM; in training mode, it is put into evaluation mode for the time being.
    """
    attention = getattr(text_config(model), "_attn_implementation", None)
    # flash attention might read out of bounds, after which a GPU cannot be used any more: not to be tried
    if attention not in ("eager", "sdpa") or "position_ids" not in inspect.signature(_base(model).forward).parameters:
        return False
    # convolutions over tokens, alone or in front of a recurrence, leak little where weights are small
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return False
    known = _CAN_PACK.setdefault(model, {})
    key = attention, mask_dtype(model)
    if key not in known:
        try:
            known[key] = _probe(model)
        except Exception:  # whatever a model's code has against such a mask: padded rows always work
            known[key] = False
    return known[key]


@torch.no_grad()
def _probe(model: nn.Module) -> bool:
    vocabulary, device = embeddings_of(model).weight.shape[0], input_device(model)
    tokens = torch.randint(vocabulary, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    # many models round badly in a text that does not begin as all texts do
    begin = getattr(text_config(model), "bos_token_id", None)
    tokens[0] = begin if isinstance(begin, int) and begin < vocabulary else tokens[0]
    prefix, other, another, last = (tuple(tokens[i:j]) for i, j in ((0, 6), (6, 30), (30, 54), (54, 60)))
    row = Row(0, "", "", prefix, last)

    def logits(**inputs: torch.Tensor) -> torch.Tensor:
        return model(**inputs, use_cache=False).logits[0, -len(last) :].float()

    def packed(between: tuple[int, ...]) -> dict[str, torch.Tensor]:
        tensors = pad([Pack((Row(1, "", "", prefix, between), row), len(prefix))], device)
        mask = prefix_mask(tensors["segments"], mask_dtype(model))
        return {"input_ids": tensors["input_ids"], "attention_mask": mask, "position_ids": tensors["position_ids"]}

    with evaluating(model):
        inputs = packed(other)
        in_pack, swapped = logits(**inputs), logits(**packed(another))
        wrong = logits(**{**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1], device=device)[None]})
        input_ids = torch.tensor([row.input_ids], device=device)
        alone = logits(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).square().mean().sqrt() / alone.std(dim=-1).mean()).item()

    rounding = torch.finfo(mask_dtype(model)).eps
    # a suffix must not notice which other one lies in front of it ...
    if not difference(in_pack, swapped) <= max(_LEAK, _LEAK_ROUNDINGS * rounding):
        return False
    # ... and say what it says alone; where roundings are large, wrong positions must make much more of a difference
    error = difference(in_pack, alone)
    return error <= _ERROR or error <= min(_ERROR_ROUNDINGS * rounding, difference(in_pack, wrong) / 4)
