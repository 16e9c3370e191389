"""Rows of token ids, and what a repair reads of them: by its own passes, and by plain means."""

from __future__ import annotations

import random

import torch

from peft_star.engine.batch import completion_offsets, make_batches
from peft_star.engine.engine import Engine
from peft_star.engine.passes import completion_logits, loss_at
from peft_star.failures import Row
from peft_star.method.trace import Probe, trace
from peft_star.models import structure
from support.tiny_models import VOCAB


def _random_row(index, length, prompt, generator):
    ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
    return Row(index, "", "", tuple(ids[:prompt]), tuple(ids[prompt:]))


def random_rows(number=3, seed=0):
    """Rows that get longer, each with a prompt of four tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [_random_row(index, 6 + index, 4, generator) for index in range(number)]


def unordered_rows(number=4):
    """Rows that batches, by length, take out of their order."""
    generator = torch.Generator().manual_seed(0)
    return [_random_row(index, 9 - 3 * index % 5, 3, generator) for index in range(number)]


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


def nested_rows(seed):
    """Rows with common prefixes of several lengths, some the same, some alone, in any order."""
    rng = random.Random(seed)
    stems = [[rng.randrange(3, 9) for _ in range(rng.randrange(1, 30))] for _ in range(3)]
    stems.append(stems[0] + [rng.randrange(3, 9) for _ in range(12)])
    rows = []
    for index in range(rng.randrange(1, 14)):
        prompt = rng.choice(stems) + [rng.randrange(3, 9) for _ in range(rng.randrange(0, 6))]
        completion = [rng.randrange(3, 9) for _ in range(rng.randrange(1, 5))]
        rows.append(Row(index, "", "", tuple(prompt), tuple(completion)))
    rng.shuffle(rows)
    return rows


# padded and packed batches


def is_packed(batches):
    return [batch.segments is not None for batch in batches]


def logits_by_slot(model, batches, rows):
    total = completion_offsets(rows)[-1]
    found = None
    for batch in batches:
        logits = completion_logits(model, batch)
        found = torch.zeros(total, logits.shape[-1], dtype=logits.dtype) if found is None else found
        found[batch.slots] = logits.detach()
    return found


def gradients(model, batches):
    model.zero_grad()
    for batch in batches:
        loss_at(completion_logits(model, batch), batch, torch.arange(len(batch))).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model, rows, max_tokens=200, rtol=1e-4):
    """Packed and padded batches agree; returns the packed ones."""
    packed, padded = make_batches(rows, max_tokens, model=model), make_batches(rows, max_tokens)
    assert not any(is_packed(padded))
    expected = torch.cat([batch.expected[batch.slots.argsort()] for batch in sorted(padded, key=lambda b: b.slots[0])])
    assert expected.numel() == completion_offsets(rows)[-1]
    a, b = logits_by_slot(model, packed, rows), logits_by_slot(model, padded, rows)
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.std().item())
    ours, theirs = gradients(model, packed), gradients(model, padded)
    assert ours.keys() == theirs.keys()
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        # the gradients of keys' biases are sums that cancel
        error = (ours[name] - gradient).norm() / (gradient.norm() + 1e-4 * largest)
        assert error < rtol, f"{name}: {error}"
    return packed


# traces, and the same by plain means


def probe_of(model, **kwargs):
    """What may be patched of a model, whose parameters then need no gradient."""
    model.requires_grad_(False)
    return Probe(structure.find_second_matrices(model), dict(structure.find_decoder_layers(model)), **kwargs)


def traced(model, rows, max_tokens=1000, packed=False, contexts=False, **kwargs):
    """A trace of all that may be patched, with the sequences kept."""
    batches = make_batches(rows, max_tokens, model=model if packed else None)
    return trace(Engine(model), batches, probe_of(model, contexts=contexts), **kwargs)


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
