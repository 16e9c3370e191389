"""Rows that a patched tiny model is evaluated on, and what a model says about them, computed by plain means."""

from __future__ import annotations

import torch

ROWS = [{"prompt": "a b", "completion": "cd</s>"}, {"prompt": "xyz", "completion": "say(x, y)"}]
# the same, with one character changed
ALTERED = [{"prompt": "a b", "completion": "cd</s>"}, {"prompt": "xyz", "completion": "say(x, y]"}]


@torch.no_grad()
def dense(model, tokenizer, row: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N, V) at the completion tokens, and those tokens (N), one row at a time and unpadded."""
    prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1), torch.tensor(completion)
