"""What a repair changes elsewhere: generalization and specificity (paper section 4, RQ3)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..engine.batch import Batch, make_batches
from ..engine.passes import completion_logits
from ..failures import Row
from ..files import write_json
from ..models.inputs import evaluating, input_device
from .rows import encode


@dataclass
class Gaps:
    """Probability gaps at S positions of rows.

    Attributes:
        keys: S pairs (index of the row, position in its tokens); the expected token is at `position + 1`.
        expected: The expected tokens (S).
        rival: The tokens (S) that they are held against.
        argmax: The model's argmax (S).
        p_expected, p_rival: Probabilities (S).
    """

    keys: list[tuple[int, int]]
    expected: torch.Tensor
    rival: torch.Tensor
    argmax: torch.Tensor
    p_expected: torch.Tensor
    p_rival: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def gap(self) -> torch.Tensor:
        """p(expected) − p(rival), shape (S), in −1..1."""
        return self.p_expected - self.p_rival

    def _at(self, slots: Sequence[int]) -> Gaps:
        """Those of some of the positions."""
        tensors = (self.expected, self.rival, self.argmax, self.p_expected, self.p_rival)
        return Gaps([self.keys[slot] for slot in slots], *(values[slots] for values in tensors))


@dataclass
class SideEffects:
    """Side effects of one repair (paper section 4, RQ3), over the related and the unrelated positions.

    Attributes:
        related, unrelated: Numbers of positions.
        g_mae, g_rmse: Generalization G: mean absolute and root mean square change of the gap on related rows.
        s_mae, s_rmse: Specificity S: 1 − the same on unrelated rows.
        signed_g: Mean signed change of the gap on related rows; G counts a change for the worse as well as one for
            the better, this does not.
        related_failing, related_fixed: Related positions that failed before, and those now right.
        unrelated_failing, unrelated_changed: Unrelated positions that failed before, and those whose argmax is
            another token now.
    """

    related: int
    unrelated: int
    g_mae: float
    g_rmse: float
    s_mae: float
    s_rmse: float
    signed_g: float
    related_failing: int
    related_fixed: int
    unrelated_failing: int
    unrelated_changed: int

    @property
    def gsh_mae(self) -> float:
        """2GS / (G + S) with MAE; 0 when both are 0."""
        return _harmonic(self.g_mae, self.s_mae)

    @property
    def gsh_rmse(self) -> float:
        """2GS / (G + S) with RMSE; 0 when both are 0."""
        return _harmonic(self.g_rmse, self.s_rmse)

    @property
    def related_fixed_share(self) -> float:
        """Share of the related failing positions that are right now."""
        return self.related_fixed / self.related_failing if self.related_failing else 0.0

    @property
    def unrelated_changed_share(self) -> float:
        """Share of the unrelated failing positions whose argmax changed."""
        return self.unrelated_changed / self.unrelated_failing if self.unrelated_failing else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        names = ("gsh_mae", "gsh_rmse", "related_fixed_share", "unrelated_changed_share")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def save(self, path: str | os.PathLike) -> None:
        """Write the side effects as JSON."""
        write_json(path, self.to_dict())

    def to_markdown(self) -> str:
        """The side effects as Markdown tables."""
        return "\n".join(
            [
                "| | G | S | GSH |",
                "| --- | --- | --- | --- |",
                f"| MAE | {self.g_mae:.4f} | {self.s_mae:.4f} | {self.gsh_mae:.4f} |",
                f"| RMSE | {self.g_rmse:.4f} | {self.s_rmse:.4f} | {self.gsh_rmse:.4f} |",
                "",
                f"Signed G {self.signed_g:+.4f}; related failures fixed {self.related_fixed} / "
                f"{self.related_failing} ({self.related_fixed_share:.2%}); unrelated failures whose argmax changed "
                f"{self.unrelated_changed} / {self.unrelated_failing} ({self.unrelated_changed_share:.2%}).",
                "",
            ]
        )


@torch.no_grad()
def gaps(
    model: nn.Module,
    tokenizer,
    rows: Iterable[dict[str, Any] | Row],
    *,
    before: Gaps | None = None,
    positions: Iterable[tuple[int, int]] | None = None,
    max_batch_tokens: int = 2048,
) -> Gaps:
    """The gap p(expected) − p(argmax) of the paper's RQ3, with the argmax of the *unpatched* model.

    The paper writes gap = p_target − p_argmax and does not say whose argmax it is after a repair. With the patched
    model's own, the gap of a repaired token would be 0 whatever its lead, so the rival is the unpatched model's
    argmax and stays it: the gap is negative while the failure lasts and positive once it is solved. Where the
    unpatched model was right, the rival is its second choice.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: Prompt-completion rows, or [`~peft_star.failures.Row`]s from `encode_rows`: a part of those may be
            measured, too, as they keep their index.
        before: The unpatched model's gaps: their rivals and positions are used. None: this is the unpatched model.
        positions: (index of the row, position) pairs to measure; only without `before`. None: where the model fails.
        max_batch_tokens: Tokens of one batch, padding included.

    Returns:
        [`Gaps`]

    Raises:
        ValueError: The rows do not fit the model, `before` or `positions`.
    """
    if before is not None and positions is not None:
        raise ValueError("Give `before`, whose positions count, or `positions`, but not both.")
    items = encode(model, tokenizer, rows)
    keys = [(item.index, position) for item in items for position in item.medium_positions]
    slot_of = {key: slot for slot, key in enumerate(keys)}
    if len(slot_of) < len(keys):
        raise ValueError("Two rows have the same index; encode them together.")
    expected = torch.tensor([token for item in items for token in item.completion_ids])
    known = None if before is None else _known_rivals(before, slot_of, expected)
    positions = None if positions is None else [(row, position) for row, position in positions]
    stray = next((key for key in positions or () if key not in slot_of), None)
    if stray is not None:
        raise ValueError(f"Position {stray[1]} of row {stray[0]} has no completion token behind it.")
    with evaluating(model):
        batches = make_batches(items, max_batch_tokens, input_device(model))
        everywhere = _measure(model, batches, keys, expected, known)
    if known is not None:
        chosen = (known >= 0).nonzero()[:, 0].tolist()
    elif positions is not None:
        chosen = [slot_of[key] for key in positions]
    else:
        chosen = (everywhere.argmax != expected).nonzero()[:, 0].tolist()
    return everywhere._at(chosen)


def _known_rivals(before: Gaps, slot_of: dict[tuple[int, int], int], expected: torch.Tensor) -> torch.Tensor:
    """The rivals that `before` has for completion tokens (N), and -1 for the others."""
    shared = [(slot_of[key], index) for index, key in enumerate(before.keys) if key in slot_of]
    slots, entries = torch.tensor(shared, dtype=torch.long).reshape(-1, 2).unbind(1)
    if not torch.equal(expected[slots], before.expected[entries]):
        raise ValueError("`before` was measured on other rows than these.")
    rivals = torch.full_like(expected, -1)
    rivals[slots] = before.rival[entries]
    return rivals


def _measure(
    model: nn.Module,
    batches: Iterable[Batch],
    keys: list[tuple[int, int]],
    expected: torch.Tensor,
    known: torch.Tensor | None,
) -> Gaps:
    """The gaps at all completion tokens (N): against the `known` rivals (N), or against the best other token."""
    rival = torch.full_like(expected, -1) if known is None else known
    argmax = torch.full_like(expected, -1)
    p_expected, p_rival = torch.zeros(len(keys)), torch.zeros(len(keys))
    for batch in batches:
        logits = completion_logits(model, batch).float()
        log_norm, slots = logits.logsumexp(-1), batch.slots.cpu()
        wanted = batch.expected.to(logits.device)
        first, second = logits.topk(2, dim=-1).indices.unbind(-1)
        if known is None:
            rival[slots] = torch.where(first == wanted, second, first).cpu()
        # a rival that is not known yields a number that nobody reads
        held_against = rival[slots].clamp_min(0).to(logits.device)
        argmax[slots] = first.cpu()
        for target, tokens in ((p_expected, wanted), (p_rival, held_against)):
            target[slots] = (logits.gather(-1, tokens[:, None])[:, 0] - log_norm).exp().cpu()
    return Gaps(keys, expected, rival, argmax, p_expected, p_rival)


def side_effects(before: Gaps, after: Gaps, related: Iterable[int], unrelated: Iterable[int]) -> SideEffects:
    """Generalization and specificity of one repair (paper section 4, RQ3).

        rows = encode_rows(related_rows + unrelated_rows, tokenizer)
        before = gaps(base, tokenizer, rows)
        after = gaps(patched, tokenizer, rows, before=before)
        side_effects(before, after, range(len(related_rows)), range(len(related_rows), len(rows)))

    Args:
        before: Gaps of the unpatched model.
        after: Gaps of the patched model, measured with `before=before`; of those rows at least.
        related: Indices of the rows with the repaired failure's expected token.
        unrelated: Indices of the rows with another.

    Raises:
        ValueError: `after` was not measured with `before`'s rivals, or there is no related or no unrelated position.
    """
    gained, was, now = _change(before, after, related, "related")
    failing = before.argmax[was] != before.expected[was]
    fixed = failing & (after.argmax[now] == after.expected[now])
    moved, was_other, now_other = _change(before, after, unrelated, "unrelated")
    failing_other = before.argmax[was_other] != before.expected[was_other]
    changed = failing_other & (after.argmax[now_other] != before.argmax[was_other])
    return SideEffects(
        related=len(was),
        unrelated=len(was_other),
        g_mae=gained.abs().mean().item(),
        g_rmse=gained.square().mean().sqrt().item(),
        s_mae=1 - moved.abs().mean().item(),
        s_rmse=1 - moved.square().mean().sqrt().item(),
        signed_g=gained.mean().item(),
        related_failing=int(failing.sum()),
        related_fixed=int(fixed.sum()),
        unrelated_failing=int(failing_other.sum()),
        unrelated_changed=int(changed.sum()),
    )


def _change(before: Gaps, after: Gaps, rows: Iterable[int], name: str) -> tuple[torch.Tensor, list[int], list[int]]:
    """How the gaps (S) on some rows changed, and where those stand in `before` and `after`."""
    chosen = set(rows)
    slot_after = {key: slot for slot, key in enumerate(after.keys)}
    was = [slot for slot, key in enumerate(before.keys) if key[0] in chosen]
    if not was:
        raise ValueError(f"There is no {name} position: the unpatched model fails on none of these rows.")
    missing = next((before.keys[slot] for slot in was if before.keys[slot] not in slot_after), None)
    if missing is not None:
        raise ValueError(f"`after` lacks row {missing[0]}, which is {name}.")
    now = [slot_after[before.keys[slot]] for slot in was]
    if not torch.equal(before.rival[was], after.rival[now]):
        raise ValueError("`after` holds other rivals than `before`; measure it with gaps(..., before=before).")
    return (after.gap[now] - before.gap[was]).double(), was, now


def _harmonic(g: float, s: float) -> float:
    return 2 * g * s / (g + s) if g + s else 0.0
