"""Rows of token ids, and what a repair reads of them, computed by plain means."""

from __future__ import annotations

import random

import torch

from peft_star.engine.batch import completion_offsets
from peft_star.failures import Row
from peft_star.models import structure
from support.tiny_models import VOCAB


def shared_rows(count=5, shared=14, own=3, completion=2, seed=0, start=0):
    """Rows whose prompts begin with the same `shared` tokens and go on with about `own` of their own."""
    rng = random.Random(seed)
    common = [rng.randrange(3, VOCAB) for _ in range(shared)]
    rows = []
    for index in range(start, start + count):
        prompt = common + [rng.randrange(3, VOCAB) for _ in range(own + index % 3)]
        rows.append(
            Row(index, "", "", tuple(prompt), tuple(rng.randrange(3, VOCAB) for _ in range(completion + index % 2)))
        )
    return rows


def is_packed(batches):
    return [batch.segments is not None for batch in batches]


def failures_of(model, rows):
    """(slot, row, position, expected) of each token that the model says wrong, by a forward of each row alone."""
    found = []
    for row, offset in zip(rows, completion_offsets(rows)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        for number, (position, token) in enumerate(zip(row.medium_positions, row.completion_ids)):
            if logits[position].argmax() != token:
                found.append((offset + number, row, position, token))
    return found


def dense_plausibility(model, row, position, token):
    """p(token) at each position before the failure, over their sum, from all logits of the row alone."""
    with torch.no_grad():
        p = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().softmax(-1)[:, token]
    before = torch.arange(len(p)) < max(position, 1)
    return (p * before) / p[before].sum()


def contexts_by_hand(model, rows, neurons):
    """U (n, k) per FFN: each failure's row alone, v weighted by the dense plausibility."""
    ffns = structure.find_second_matrices(model)
    kept, handles = {}, []
    for key, module in ffns.items():
        handles.append(module.register_forward_pre_hook(lambda m, args, key=key: kept.update({key: args[0]})))
    wanted = {key: [] for key in ffns}
    for _, row, position, token in failures_of(model, rows):
        weight = dense_plausibility(model, row, position, token)
        for key in ffns:
            v = kept[key].detach().reshape(len(row.input_ids), -1)
            wanted[key].append(weight.float() @ v[:, neurons])
    for handle in handles:
        handle.remove()
    return {key: torch.stack(values) for key, values in wanted.items()}
