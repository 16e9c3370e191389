"""What is read off a batch's logits; that the model's own are read right is seen in test_passes.py."""

import torch

from peft_star.engine.batch import make_batches
from peft_star.engine.predictions import Predictions
from peft_star.failures import Row
from support.tiny_models import VOCAB


def test_the_rival_of_a_token_that_is_right_is_the_second():
    batch = make_batches([Row(0, "", "", (3, 4), (5, 6))], 100)[0]
    now = Predictions.empty(2)
    logits = torch.zeros(2, VOCAB)
    logits[0, 5], logits[0, 9], logits[1, 7], logits[1, 6] = 3.0, 2.0, 5.0, 4.0
    now.read(batch, logits)
    assert now.argmax.tolist() == [5, 7] and now.rival.tolist() == [9, 7]
    assert now.gap.tolist() == [1.0, -1.0] and now.right.tolist() == [True, False]


def test_only_a_batchs_own_slots_are_read():
    row = Row(0, "", "", (3, 4), (5, 6))
    (batch,) = make_batches([row], 100)
    batch.slots = torch.tensor([3, 1])
    now = Predictions.empty(4)
    logits = torch.zeros(2, VOCAB)
    logits[0, 5], logits[1, 7] = 3.0, 5.0
    now.read(batch, logits)
    assert now.expected.tolist() == [-1, 6, -1, 5] and now.argmax.tolist() == [-1, 7, -1, 5]
    assert now.gap.tolist() == [0, -5, 0, 3]


def test_a_margin_has_to_be_exceeded():
    now = Predictions.empty(3)
    now.argmax[2], now.margin[:] = 7, torch.tensor([0.01, 0.02, 0.5])
    assert now.solved(0.01).tolist() == [False, True, False]
    assert now.solved(0.0).tolist() == [True, True, False]


def test_joined_predictions_are_tensors_of_their_own():
    a, b = Predictions.empty(2), Predictions.empty(3)
    a.gap[:], b.gap[:] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    both = Predictions.join(a, b)
    assert isinstance(both, Predictions) and both.gap.tolist() == [1, 2, 3, 4, 5]
    both.gap[0] = 9
    for copy in (Predictions.join(a), a.copy()):
        copy.argmax[0] = 7
    assert a.gap[0] == 1 and a.argmax[0] == -1
    first = both[:2]
    assert first.gap.tolist() == [9, 2] and len(first.right) == 2


def test_predictions_at_some_slots_are_the_same_tensors():
    whole = Predictions.empty(4)
    whole[1:3].gap[:] = 5
    assert whole.gap.tolist() == [0, 5, 5, 0]
