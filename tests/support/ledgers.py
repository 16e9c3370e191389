"""Patches with a ledger: tiny models that were repaired several times, and entries without a repair."""

from __future__ import annotations

from dataclasses import replace

import torch

from peft_star import RepairArguments, repair
from peft_star.sharing.entries import Entry, LedgerRow, size_of
from peft_star.sharing.ledger import Ledger
from support.tiny_models import VOCAB
from support.words import QUIET, star

MODULE = "model.layers.2.mlp.down_proj"


def some_rows(number, seed=1):
    """Rows of one token each, all with prompts of their own."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(number):
        ids = torch.randint(3, VOCAB, (5,), generator=generator).tolist()
        rows.append({"prompt": " ".join(f"w{token}" for token in ids[:4]), "completion": f" w{ids[4]}"})
    return rows


def repaired(tokenizer, rows, **arguments):
    """A model that was repaired once for each of the rows, in this order."""
    model = star(num_layers=0.67, num_neurons=12)
    for row in rows:
        repair(model, tokenizer, [row], RepairArguments(**{**QUIET, **arguments}))
    return model


def ledger(model) -> Ledger:
    return model.peft_config["default"].ledger


def an_entry(number=0, seed=0, neurons=4, outputs=6, **values):
    """An entry that changes neurons of one module, from `number` on, at random."""
    generator = torch.Generator().manual_seed(seed + 100 * number)
    change = {MODULE: (torch.arange(number, number + neurons), torch.randn(neurons, outputs, generator=generator))}
    row = LedgerRow("failures", {"prompt": f"p{number}", "completion": " c"}, 1, [0], [])
    given = {"rows": [row], "summary": {"failures": 1, "solved": 1}, "patch": size_of(change, change), **values}
    return Entry.of(change, **given)


def grown(measure, sizes, tokens=1):
    """A ledger whose entries end with these values of a measure."""
    entries = []
    for number, size in enumerate(sizes):
        entry = an_entry(number, summary={"failures": tokens})
        harm = {} if measure == "norm" else {measure: size}
        patch = {**entry.patch, "norm": size if measure == "norm" else 1.0}
        entries.append(replace(entry, harm=harm, patch=patch))
    return Ledger(tuple(entries))
