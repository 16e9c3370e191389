"""Rows behind a shared prefix, as one sequence: its tokens, positions and mask."""

import torch

from peft_star.engine.packs import Pack, pad, prefix_mask
from peft_star.failures import Row
from support.rows import shared_rows

ROWS = Row(0, "", "", (3, 4, 5), (6, 7)), Row(1, "", "", (3, 4, 8, 9), (6,))


def test_rows_stand_one_after_another_behind_what_they_share():
    pack = Pack(ROWS, 2)
    assert pack.input_ids() == [3, 4, 5, 6, 7, 8, 9, 6] and len(pack) == 8
    assert pack.position_ids() == [0, 1, 2, 3, 4, 2, 3, 4]
    assert pack.segments() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert pack.starts() == [2, 5]
    # the tokens 5 and 6 of the first row predict 6 and 7, the 9 of the second its 6
    assert pack.medium_positions() == [2, 3, 6]


def test_shorter_sequences_are_padded_on_the_right():
    tensors = pad([Pack(ROWS, 2), Pack(ROWS[:1])], "cpu")
    assert all(tensor.shape == (2, 8) for tensor in tensors.values())
    assert tensors["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert tensors["segments"][1].tolist() == [1] * 5 + [-1] * 3
    assert tensors["input_ids"][1].tolist() == [3, 4, 5, 6, 7, 7, 7, 7]
    assert tensors["position_ids"][1, :5].tolist() == [0, 1, 2, 3, 4]


def test_a_suffix_sees_its_prefix_and_itself_up_to_each_token():
    mask = prefix_mask(torch.tensor([[0, 0, 1, 1, 2]]), torch.float16)
    assert mask.shape == (1, 1, 5, 5) and mask.dtype == torch.float16
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert (mask[0, 0] == 0).int().tolist() == seen
    assert mask.min() == torch.finfo(torch.float16).min


def test_padding_sees_something():
    """A row of the mask that is all closed would put NaN into some attentions."""
    mask = prefix_mask(torch.tensor([[0, 0, 1, 2, -1, -1]]), torch.float32)
    assert (mask == 0).any(dim=-1).all()


def test_a_pack_of_one_row_is_the_row():
    (row,) = shared_rows(1)
    pack = Pack((row,))
    assert tuple(pack.input_ids()) == row.input_ids and len(pack) == len(row)
    assert pack.medium_positions() == list(row.medium_positions)
