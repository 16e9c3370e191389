"""In which contexts a failure's token is plausible, against all logits of the row alone."""

import pytest
import torch

from peft_star.engine.batch import make_batches
from peft_star.failures import Row
from peft_star.method.plausibility import plausibility
from support.rows import dense_plausibility, shared_rows, unordered_rows
from support.tiny_models import MODELS


def weights_of(model, batch):
    """Plausibility at all tokens of a batch, from the head's own inputs."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch.model_inputs(), use_cache=False)
    handle.remove()
    return plausibility(model, seen[0], batch, torch.arange(len(batch)), chunk=5)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi", "opt", "falcon", "gemma3"])
def test_plausibility_is_the_dense_softmax_over_earlier_positions_of_the_same_row(name):
    model, rows = MODELS[name].build(), unordered_rows()
    with torch.no_grad():  # sure of something, and not equally sure everywhere
        model.get_output_embeddings().weight.mul_(20)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    rows[0] = Row(0, "", "", (5,), (9, 8))  # its first token has nothing before it but itself
    (batch,) = make_batches(rows, 1000)
    weights = weights_of(model, batch)
    assert weights.shape == (len(batch), batch.input_ids.shape[1])
    torch.testing.assert_close(weights.sum(1), torch.ones(len(batch)))
    by_index = {row.index: row for row in rows}
    sequences = [by_index[item.index] for item in batch.items]
    for weight, number, position, token in zip(weights, batch.rows, batch.positions, batch.expected):
        assert not weight[max(int(position), 1) :].any()
        wanted = dense_plausibility(model, sequences[number], int(position), int(token))
        torch.testing.assert_close(weight[: len(wanted)].double(), wanted, rtol=1e-3, atol=1e-5)
    assert weights.max() > 0.5


def test_a_packed_row_sees_its_prefix_and_itself_only():
    model, rows = MODELS["llama"].build(), shared_rows()
    (batch,) = make_batches(rows, 200, model=model)
    weights = weights_of(model, batch)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(batch)))
    for weight, number, position in zip(weights, batch.rows, batch.positions):
        segments = batch.segments[number]
        seen = (segments == 0) | (segments == segments[position])
        assert (weight[: int(position)][seen[: int(position)]] > 0).all()
        assert not weight[int(position) :].any() and not weight[~seen].any()
