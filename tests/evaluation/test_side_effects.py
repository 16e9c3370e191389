"""Gaps and side effects against dense and hand-computed references."""

from __future__ import annotations

import math

import pytest
import torch

from peft_star.evaluation import Gaps, gaps, side_effects
from peft_star.failures import encode_rows
from support.evaluated import ROWS, dense


def test_gaps_keep_the_rival_of_the_unpatched_model(patched, tokenizer):
    with patched.disable_adapter():
        before = gaps(patched, tokenizer, ROWS)
        references = [dense(patched, tokenizer, row) for row in ROWS]
    after = gaps(patched, tokenizer, ROWS, before=before)
    was, ids = (torch.cat(parts) for parts in zip(*references))
    now = torch.cat([dense(patched, tokenizer, row)[0] for row in ROWS])
    failing = was.argmax(-1) != ids
    assert failing.sum() == len(before) == len(after)
    ids, rival = ids[failing, None], was[failing].argmax(-1, keepdim=True)
    for result, values in ((before, was[failing]), (after, now[failing])):
        assert torch.equal(result.expected, ids[:, 0]) and torch.equal(result.rival, rival[:, 0])
        expected = (values.gather(-1, ids).exp() - values.gather(-1, rival).exp())[:, 0]
        torch.testing.assert_close(result.gap, expected, atol=1e-5, rtol=0)
    assert (before.gap < 0).all() and (after.gap > 0).all()
    assert torch.equal(after.argmax, after.expected)


def test_gaps_of_a_part_of_the_rows_and_of_given_positions(patched, tokenizer):
    rows = encode_rows(ROWS, tokenizer)
    with patched.disable_adapter():
        before = gaps(patched, tokenizer, rows)
    part = gaps(patched, tokenizer, rows[1:], before=before)
    assert part.keys == [key for key in before.keys if key[0] == 1]
    whole = gaps(patched, tokenizer, rows, before=before)
    torch.testing.assert_close(part.gap, whole.gap[-len(part) :], atol=1e-5, rtol=0)
    # where the model is right, the rival is its second choice
    chosen = gaps(patched, tokenizer, rows, positions=[(1, 3), (0, 2)])
    assert chosen.keys == [(1, 3), (0, 2)]
    for slot, (row, offset) in enumerate([(1, 1), (0, 0)]):
        values, ids = dense(patched, tokenizer, ROWS[row])
        top = values[offset].exp().topk(2)
        assert chosen.expected[slot] == ids[offset] == top.indices[0] and chosen.rival[slot] == top.indices[1]
        assert chosen.gap[slot].item() == pytest.approx((top.values[0] - top.values[1]).item(), abs=1e-5)
    assert len(gaps(patched, tokenizer, rows)) == 0  # nothing fails any more


def test_gaps_that_do_not_belong_together(patched, tokenizer):
    with patched.disable_adapter():
        before = gaps(patched, tokenizer, ROWS)
        with pytest.raises(ValueError, match="measured on other rows"):
            gaps(patched, tokenizer, [{"prompt": "a b", "completion": "XXXX"}], before=before)
    with pytest.raises(ValueError, match="not both"):
        gaps(patched, tokenizer, ROWS, before=before, positions=[(0, 2)])
    with pytest.raises(ValueError, match="Position 1 of row 0"):
        gaps(patched, tokenizer, ROWS, positions=[(0, 1)])
    rows = encode_rows(ROWS, tokenizer)
    with pytest.raises(ValueError, match="same index"):
        gaps(patched, tokenizer, [rows[0], rows[0]])


def gaps_by_hand(*entries: tuple[int, int, int, int, float, float]) -> Gaps:
    """Of (row, expected, rival, argmax, p(expected), p(rival)), each at position 4."""
    rows, *ids, p_expected, p_rival = zip(*entries)
    tensors = [torch.tensor(values) for values in (*ids, p_expected, p_rival)]
    return Gaps([(row, 4) for row in rows], *tensors)


BEFORE = gaps_by_hand((0, 7, 8, 8, 0.1, 0.6), (1, 7, 9, 9, 0.2, 0.4), (2, 5, 8, 8, 0.3, 0.4), (3, 6, 8, 8, 0.1, 0.9))
AFTER = gaps_by_hand((0, 7, 8, 7, 0.7, 0.2), (1, 7, 9, 3, 0.1, 0.4), (2, 5, 8, 9, 0.2, 0.4), (3, 6, 8, 8, 0.1, 0.6))


def test_side_effects_by_hand():
    # the gaps change by +1.0 and -0.1 on the related rows, by -0.1 and +0.3 on the unrelated ones
    result = side_effects(BEFORE, AFTER, related=[0, 1], unrelated=[2, 3])
    g_rmse, s_rmse = math.sqrt((1.0 + 0.01) / 2), 1 - math.sqrt((0.01 + 0.09) / 2)
    assert result.g_mae == pytest.approx(0.55) and result.s_mae == pytest.approx(0.8)
    assert result.g_rmse == pytest.approx(g_rmse) and result.s_rmse == pytest.approx(s_rmse)
    assert result.gsh_mae == pytest.approx(2 * 0.55 * 0.8 / 1.35)
    assert result.gsh_rmse == pytest.approx(2 * g_rmse * s_rmse / (g_rmse + s_rmse))
    assert result.signed_g == pytest.approx(0.45)
    assert (result.related, result.related_failing, result.related_fixed) == (2, 2, 1)
    assert (result.unrelated, result.unrelated_failing, result.unrelated_changed) == (2, 2, 1)
    assert result.related_fixed_share == result.unrelated_changed_share == 1 / 2
    assert result.to_dict()["gsh_mae"] == result.gsh_mae
    assert "| MAE | 0.5500 | 0.8000 |" in result.to_markdown()


def test_no_change_and_the_worst_one():
    nothing = side_effects(BEFORE, BEFORE, [0, 1], [2, 3])
    assert (nothing.g_mae, nothing.s_mae, nothing.gsh_mae) == (0, 1, 0)
    # nothing gained where it should, everything changed where it should not
    before = gaps_by_hand((0, 1, 2, 2, 0.0, 1.0), (1, 3, 4, 4, 0.0, 0.5))
    after = gaps_by_hand((0, 1, 2, 2, 0.0, 1.0), (1, 3, 4, 3, 0.5, 0.0))
    worst = side_effects(before, after, [0], [1])
    assert (worst.g_mae, worst.s_mae, worst.gsh_mae, worst.gsh_rmse) == (0, 0, 0, 0)


def test_side_effects_of_a_real_patch(patched, tokenizer):
    with patched.disable_adapter():
        before = gaps(patched, tokenizer, ROWS)
    after = gaps(patched, tokenizer, ROWS, before=before)
    result = side_effects(before, after, [0], [1])
    change = after.gap - before.gap
    count = sum(key[0] == 0 for key in before.keys)
    assert result.g_mae == result.signed_g == pytest.approx(change[:count].mean().item())
    assert result.s_mae == pytest.approx(1 - change[count:].mean().item())
    assert result.related_fixed == result.related_failing == count
    assert result.unrelated_changed == result.unrelated_failing == len(before) - count


@pytest.mark.parametrize(
    ("after", "related", "message"),
    [
        (AFTER, [9], "no related position"),
        (gaps_by_hand((2, 5, 8, 8, 0.3, 0.4), (3, 6, 8, 8, 0.1, 0.9)), [0], "lacks row 0"),
        (gaps_by_hand(*[(row, 1, 2, 3, 0.1, 0.2) for row in range(4)]), [0], "other rivals"),
    ],
)
def test_side_effects_that_cannot_be_told(after, related, message):
    with pytest.raises(ValueError, match=message):
        side_effects(BEFORE, after, related, [2, 3])
