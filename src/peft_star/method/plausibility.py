"""In which contexts a failure's expected token is plausible (for generalization; not in the paper)."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn import functional as F

from ..engine.batch import Batch
from ..models.inputs import head_of


@torch.no_grad()
def plausibility(
    model: nn.Module, representations: torch.Tensor, batch: Batch, chosen: torch.Tensor, chunk: int = 256
) -> torch.Tensor:
    """How the contexts before each failure share the plausibility of its expected token.

    Args:
        model: The causal LM.
        representations: What the LM head reads, shape (B, T, d).
        batch: The batch.
        chosen: Indices (n) of the failures among the batch's completion tokens.
        chunk: Positions whose V logits are held at once.

    Returns:
        `torch.Tensor`: Weights (n, T) of each failure's sequence: the model's probability of the expected token at the
        positions before the failure, scaled to the sum 1.
    """
    head = head_of(model)
    with align_module_device(head):
        weight, bias = head.weight, getattr(head, "bias", None)
        flat = representations.flatten(0, 1).to(weight.device)
        norms = torch.cat([F.linear(part, weight, bias).float().logsumexp(-1) for part in flat.split(chunk)])
        norms = norms.view(representations.shape[:2])
        index = chosen.to(batch.rows.device)
        rows, expected = batch.rows[index].to(weight.device), batch.expected[index].to(weight.device)
        logits = torch.einsum(
            "ntd,nd->nt", representations[rows.to(representations.device)].to(weight), weight[expected]
        )
        if bias is not None:
            logits = logits + bias[expected][:, None]
    logits = logits.float() - norms[rows]
    positions = batch.positions[index].to(logits.device)[:, None]
    before = torch.arange(logits.shape[1], device=logits.device)[None] < positions
    if batch.segments is not None:
        # behind a shared prefix, a row sees itself only
        segments = batch.segments.to(logits.device)[rows]
        before &= (segments == 0) | (segments == segments.gather(1, positions))
    # the first token has nothing before it
    before[:, 0] |= ~before.any(dim=1)
    return logits.masked_fill(~before, -torch.inf).softmax(dim=1)
