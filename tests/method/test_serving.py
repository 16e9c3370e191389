"""How wide a margin the arithmetic that serves a repair needs."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_star import RepairArguments, StarConfig, repair
from peft_star.engine.arithmetic import BF16, FP32, Q8_0, Arithmetic
from peft_star.engine.engine import Engine
from peft_star.engine.predictions import Predictions
from peft_star.failures import encode_rows
from peft_star.loading import load_model
from peft_star.method import serving
from peft_star.method.gguf_products import products_of
from peft_star.method.serving import arithmetics, movements, needed_gaps
from peft_star.method.verify import Case
from support.byte_llama import build_model
from support.gguf_models import write_llama
from support.tiny_models import tiny_llama
from support.words import QUIET, ROWS, decided, star, word_tokenizer


def seen(*gaps):
    predictions = Predictions.empty(len(gaps))
    predictions.gap[:] = torch.tensor(gaps)
    return predictions


def test_movements_are_those_of_the_token_and_of_all():
    here = seen(1.0, 1.0, 1.0, 1.0)
    moved = movements((here, {"a": seen(1.0, 1.0, 1.0, 3.0)}))
    # squares 0, 0, 0, 4 with a mean of 1, which counts twice
    torch.testing.assert_close(moved, torch.tensor([2.0, 2.0, 2.0, 6.0]).div(3).sqrt())
    torch.testing.assert_close(needed_gaps((here, {"a": seen(1.0, 1.0, 1.0, 3.0)})), serving.AIMED * moved)
    # the arithmetic that moves most counts, token by token
    both = movements((here, {"a": seen(1.0, 1.0, 1.0, 3.0), "b": seen(3.0, 1.0, 1.0, 1.0)}))
    torch.testing.assert_close(both, torch.tensor([6.0, 2.0, 2.0, 6.0]).div(3).sqrt())
    # of several looks each is one draw
    twice = movements((here, {"a": seen(1.0, 1.0, 1.0, 3.0)}), (here, {"a": seen(1.0, 1.0, 3.0, 1.0)}))
    torch.testing.assert_close(twice, torch.tensor([2.0, 2.0, 6.0, 6.0]).div(4).sqrt())
    assert movements((here, {})) is None and needed_gaps((here, {})) is None


def test_failures_are_what_is_wrong_or_right_by_too_little():
    tokenizer, now = word_tokenizer(), seen(2.0, 0.5, -1.0, 0.5)
    now.expected[:] = torch.tensor([5, 6, 7, 8])
    now.argmax[:] = torch.tensor([5, 6, 9, 8])
    case = Case.of(Engine(tiny_llama()), encode_rows(ROWS, tokenizer), encode_rows(ROWS[1:], tokenizer))
    assert case.failing(now).tolist() == [2] and case.failing(now, torch.ones(4)).tolist() == [1, 2]
    assert replace(case, left_out=frozenset([0])).failing(now, torch.ones(4)).tolist() == [2]


def test_what_the_model_computes_in_anyway_is_left_out():
    assert arithmetics(tiny_llama(), ("base", "fp32", "bf16", "q8_0")) == {"bf16": BF16, "q8_0": Q8_0}
    assert list(arithmetics(tiny_llama(dtype=torch.bfloat16), ("fp32", "bf16"))) == ["fp32"]
    assert arithmetics(tiny_llama(), ()) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_type_is_held_against_float32(dtype):
    """Engines that compute in it round otherwise than each other, and a model beside itself moves nothing."""
    assert arithmetics(tiny_llama(dtype=dtype), ("base",)) == {"fp32": FP32}
    assert arithmetics(tiny_llama(dtype=dtype), ("base", "fp32")) == {"fp32": FP32}


@pytest.mark.parametrize("kind", ["packed", "offloaded", "flagged"])
def test_a_quantised_or_offloaded_base_is_not_computed_in_another_type(kind):
    model = tiny_llama(dtype=torch.bfloat16)
    if kind == "packed":
        packed = torch.zeros(16, 40, dtype=torch.uint8)
        model.model.layers[0].mlp.down_proj.weight = nn.Parameter(packed, requires_grad=False)
    elif kind == "offloaded":
        model.model.layers[0].mlp.down_proj.to("meta")
    else:
        model.is_quantized = True
    assert arithmetics(model, ("base",)) == {}
    # what is asked for by name is tried
    assert arithmetics(model, ("fp32",)) == {"fp32": FP32}


def test_a_repair_in_bfloat16_has_margins():
    """By default, and wide enough to hold in float32, too."""
    found = {}
    for served in ((), ("base",)):
        base = decided("llama").to(torch.bfloat16)
        model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=8, num_layers=1.0))
        found[served] = repair(model, word_tokenizer(), ROWS, RepairArguments(**QUIET, serve=served))
    assert found["base",].success and [row.served_after for row in found[()].rows] == [{}, {}]
    assert all(row.served_after == {"fp32": True} for row in found["base",].rows)


@pytest.mark.parametrize(
    ("kind", "size"), [("Q4_0", 32), ("Q4_1", 32), ("Q8_0", 32), ("F16", None), ("F32", None), ("BF16", None)]
)
def test_a_gguf_file_says_how_llama_cpp_rounds_what_it_multiplies(tmp_path, kind, size):
    base = build_model(tie_word_embeddings=True)
    path = write_llama(tmp_path / "tiny.gguf", base, kind)
    model, _ = load_model(path)
    features = {base.config.hidden_size, base.config.intermediate_size}
    expected = None if size is None else Arithmetic("base", blocks=tuple((n, size) for n in sorted(features)))
    assert products_of(model) == expected and products_of(base) is None
    assert list(arithmetics(model, ("base",))) == ([] if size is None else ["base"])


@pytest.mark.parametrize(
    ("value", "message"),
    [("int4", "`serve` is 'int4'; choose one of"), (("bf16", "x"), "`serve` is 'x'"), (None, "`serve` is None")],
)
def test_what_serves_must_be_known(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        RepairArguments(serve=value)


def test_one_name_or_several():
    assert RepairArguments(serve="bf16").serve == ("bf16",)
    assert RepairArguments(serve=["bf16", "bf16", "q8_0"]).serve == ("bf16", "q8_0")
    assert RepairArguments().serve == ("base",) and RepairArguments().to_dict()["serve"] == ["base"]


@pytest.mark.parametrize("mode", ["multiple", "single"])
@pytest.mark.parametrize("algorithm", ["protected", "prior-guided"])
def test_a_repair_has_the_margin_that_its_arithmetic_needs(mode, algorithm, monkeypatch):
    """Under coarse rounding every row is right, and the report says so."""
    rough = Arithmetic("rough", blocks=((None, 40), (16, 16)))
    monkeypatch.setitem(serving.ARITHMETICS, "q8_0", rough)
    tokenizer, reports = word_tokenizer(), {}
    arguments = {**QUIET, "reach": "prompt", "mode": mode, "algorithm": algorithm}
    for served in ((), ("q8_0",)):
        model = star()
        reports[served] = repair(model, tokenizer, ROWS, RepairArguments(**arguments, serve=served))
    plain, held = reports[()], reports["q8_0",]
    assert plain.success and held.success, held.to_markdown()
    assert [row.served_after for row in plain.rows] == [{}, {}] and "served" not in plain.summary()
    assert all(row.served_after == {"q8_0": True} for row in held.rows)
    assert held.summary()["served"] == {
        "q8_0": {"rows_exact_before": 0, "rows_exact_after": 2, "retained_rows_broken": 0}
    }
    text = held.to_markdown()
    assert "| q8_0 | 0 of 2 | 2 | 0 of 0 |" in text and "| 2 | ` w40` | ✓ | ✓ |" in text


def test_where_it_holds_at_once_each_arithmetic_is_looked_at_before_and_after(monkeypatch):
    looks, look = [], serving.Serving.look

    def counted(self, *args):
        looks.append(list(self.engines))
        return look(self, *args)

    monkeypatch.setattr(serving.Serving, "look", counted)
    report = repair(star(), word_tokenizer(), ROWS, RepairArguments(**QUIET, serve=("bf16", "q8_0")))
    assert report.success and all(row.served_after == {"bf16": True, "q8_0": True} for row in report.rows)
    assert looks == [["bf16", "q8_0"]] * 2


def test_nothing_else_changes_where_nothing_serves(monkeypatch):
    """A repair for the model's own arithmetic alone takes the steps that it took."""
    tokenizer, deltas = word_tokenizer(), []
    for served in ((), ("base",), ("fp32",)):
        model = star()
        repair(model, tokenizer, ROWS, RepairArguments(**QUIET, serve=served))
        deltas.append({name: p.detach() for name, p in model.named_parameters() if "star_delta" in name})
    assert all(torch.equal(p, deltas[0][name]) for other in deltas[1:] for name, p in other.items())
