"""The arithmetic and the bookkeeping of one layer, against a dense reference."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_star import StarConfig
from peft_star.tuner.layer import Linear, StarLayer

WIDTH, HEIGHT = 12, 7


def make_base(kind: str = "linear", width: int = WIDTH, height: int = HEIGHT, bias: bool = True) -> nn.Module:
    if kind == "conv1d":
        base = Conv1D(height, width)
        nn.init.normal_(base.bias)
        return base
    return nn.Linear(width, height, bias=bias)


def make_layer(base: nn.Module | None = None, num_neurons: int = 4, name: str = "default", init_weights=False):
    base = make_base() if base is None else base
    return Linear(base, name, StarConfig(init_weights=init_weights), num_neurons)


def add(layer: Linear, name: str, num_neurons: int, init_weights: bool = False) -> None:
    layer.update_layer(name, num_neurons, StarConfig(init_weights=init_weights))


def dense(layer: Linear, *names: str) -> torch.Tensor:
    """The weight (out, in) with the deltas of the adapters added, made entry by entry."""
    weight = layer.weight.detach().clone().double()
    weight = weight.T if layer.fan_in_fan_out else weight
    for name in names:
        for row, neuron in enumerate(layer.star_neurons[name].tolist()):
            weight[:, neuron] += layer.star_delta[name][row].detach().double()
    return weight


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).clone()


KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


###########
# Forward #
###########


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 24),
    height=st.integers(1, 9),
    lead=st.lists(st.integers(0, 4), max_size=3),
    kind=st.sampled_from(["linear", "conv1d"]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_forward_and_delta_weight_equal_the_dense_reference(width, height, lead, kind, seed, data):
    torch.manual_seed(seed)
    base = make_base(kind, width, height)
    neurons = data.draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=width, unique=True))
    layer = make_layer(base, num_neurons=1)
    layer.set_neurons("default", torch.tensor(neurons), torch.randn(len(neurons), height))
    x = torch.randn(*lead, width)
    expected = nn.functional.linear(x.double(), dense(layer, "default"), base.bias.double())
    actual = layer(x)
    assert actual.shape == (*lead, height)
    torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)

    delta = layer.get_delta_weight("default")
    assert delta.shape == layer.weight.shape
    delta = delta.T if layer.fan_in_fan_out else delta
    weight = layer.weight.T if layer.fan_in_fan_out else layer.weight
    torch.testing.assert_close((weight + delta).double(), dense(layer, "default"))


@KINDS
def test_new_adapter_is_the_identity(kind):
    base = make_base(kind)
    x = torch.randn(3, WIDTH)
    assert torch.equal(make_layer(base, init_weights=True)(x), base(x))


def test_forward_never_builds_a_full_size_delta_nor_reads_the_base_weight(monkeypatch):
    class Opaque(nn.Linear):
        """Computes, but does not show its weight, as quantized layers do."""

        def forward(self, x):
            return x.new_ones(*x.shape[:-1], self.out_features)

    layer = make_layer(Opaque(WIDTH, HEIGHT))
    monkeypatch.setattr(Linear, "get_delta_weight", None)
    monkeypatch.setattr(Linear, "get_base_weight", None)
    del layer.base_layer.weight
    x = torch.randn(2, WIDTH)
    expected = 1 + x[:, layer.star_neurons["default"].long()] @ layer.star_delta["default"]
    torch.testing.assert_close(layer(x), expected)


def test_gradients_reach_the_delta_and_the_input_only():
    layer = make_layer()
    layer.base_layer.requires_grad_(False)
    x = torch.randn(5, WIDTH, requires_grad=True)
    grad_output = torch.randn(5, HEIGHT)
    layer(x).backward(grad_output)
    torch.testing.assert_close(
        layer.star_delta["default"].grad, x.detach()[:, layer.star_neurons["default"].long()].T @ grad_output
    )
    torch.testing.assert_close(x.grad.double(), grad_output.double() @ dense(layer, "default"), atol=1e-5, rtol=1e-5)
    assert layer.base_layer.weight.grad is None


@KINDS
def test_several_active_adapters_are_summed(kind):
    layer = make_layer(make_base(kind), 4, "a")
    add(layer, "b", 6)
    x = torch.randn(3, WIDTH)
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        layer.set_adapter(names)
        expected = nn.functional.linear(x.double(), dense(layer, *names), layer.bias.double())
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    layer.set_adapter("a")
    expected = layer(x)
    layer.set_adapter(["a", "elsewhere"])
    assert torch.equal(layer(x), expected)
    layer.set_adapter([])
    assert torch.equal(layer(x), layer.base_layer(x))


@KINDS
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["fp32-adapter", "same-dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_keeps_the_output_dtype(kind, dtype, adapter_dtype):
    layer = make_layer(make_base(kind).to(dtype))
    assert layer.star_delta["default"].dtype == dtype
    assert layer.star_neurons["default"].dtype == torch.int32
    if adapter_dtype is not None:
        layer.star_delta["default"] = layer.star_delta["default"].to(adapter_dtype)
    x = torch.randn(3, WIDTH, dtype=dtype)
    expected = nn.functional.linear(x.double(), dense(layer, "default"), layer.bias.double())
    actual = layer(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=["fp32-base", "bf16-base"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["fp32-adapter", "bf16-adapter"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32-x", "bf16-x"])
def test_autocast(base_dtype, adapter_dtype, x_dtype):
    layer = make_layer(make_base().to(base_dtype))
    layer.star_delta["default"] = layer.star_delta["default"].to(adapter_dtype)
    x = torch.randn(3, WIDTH, dtype=x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer(x)
        plain = layer.base_layer(x)
    assert actual.dtype == plain.dtype == torch.bfloat16
    expected = nn.functional.linear(x.double(), dense(layer, "default"), layer.bias.double())
    torch.testing.assert_close(actual.double(), expected, atol=0.1, rtol=0.1)
    actual.sum().backward()
    assert layer.star_delta["default"].grad.dtype == adapter_dtype


def test_input_dtype_casting_can_be_disabled():
    layer = make_layer()
    layer.star_delta["default"] = layer.star_delta["default"].to(torch.float64)
    x = torch.randn(3, WIDTH)
    assert layer(x).dtype == torch.float32
    with disable_input_dtype_casting(nn.ModuleList([layer])), pytest.raises(RuntimeError, match="dtype"):
        layer(x)


def test_mixed_batches_have_a_clear_error():
    with pytest.raises(ValueError, match="mixed batches"):
        make_layer()(torch.randn(2, WIDTH), adapter_names=["default", "__base__"])


def test_compile_has_no_graph_breaks():
    layer = make_layer()
    layer.requires_grad_(False)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, WIDTH)
    assert torch.equal(compiled(x), layer(x))


#####################
# Merge and unmerge #
#####################


@KINDS
@DTYPES
def test_merge_equals_forward_and_unmerge_is_exact(kind, dtype):
    layer = make_layer(make_base(kind).to(dtype), 5, "a")
    add(layer, "b", 7)  # overlaps a
    for name in ("a", "b"):
        layer.star_delta[name] = layer.star_delta[name].float()
    before = bits(layer.weight)
    x = torch.randn(3, WIDTH, dtype=dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        layer.set_adapter(names)
        expected = layer(x)
        layer.merge()
        assert layer.merged and layer.merged_adapters == names
        assert layer.weight.dtype == dtype
        torch.testing.assert_close(layer(x), expected, **tolerance)
        torch.testing.assert_close(layer(x), layer.base_layer(x), atol=0, rtol=0)
        layer.unmerge()
        assert not layer.merged
        assert torch.equal(bits(layer.weight), before)
        assert torch.equal(layer(x), expected)


@KINDS
def test_merge_touches_the_patched_columns_only_and_rounds_once(kind):
    layer = make_layer(make_base(kind).to(torch.bfloat16), 3)
    layer.star_delta["default"] = torch.randn(3, HEIGHT) * 1e-2
    expected = dense(layer, "default").to(torch.bfloat16)
    neurons = layer.star_neurons["default"].tolist()
    before = layer.weight.detach().clone()
    storage = layer.weight.data_ptr()
    layer.merge()
    assert layer.weight.data_ptr() == storage
    weight, before = (w.T if layer.fan_in_fan_out else w for w in (layer.weight.detach(), before))
    assert torch.equal(weight, expected)
    others = [index for index in range(WIDTH) if index not in neurons]
    assert torch.equal(weight[:, others], before[:, others])


def test_what_is_kept_for_unmerging_is_as_small_as_the_patch():
    layer = make_layer(nn.Linear(1000, 8), 3)
    layer.merge()
    kept = [tensor for pair in layer._merged_columns.values() for tensor in pair]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 3 * 8 * 4 + 3 * 8
    layer.unmerge()
    assert not layer._merged_columns


def test_merging_one_after_the_other_and_unmerging_at_once():
    layer = make_layer(num_neurons=5, name="a")
    add(layer, "b", 7)
    before = bits(layer.weight)
    layer.merge(adapter_names=["b"])
    with pytest.warns(UserWarning, match="Already following adapters were merged b. You are now additionally"):
        layer.merge(adapter_names=["a", "b"])
    assert layer.merged_adapters == ["b", "a"]
    torch.testing.assert_close(layer.get_base_weight().double(), layer.weight.detach().double())
    layer.unmerge()
    assert torch.equal(bits(layer.weight), before)


def test_repeating_warns_as_other_tuners_do():
    layer = make_layer()
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
        layer.unmerge()
    layer.merge()
    merged = bits(layer.weight)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do."):
        layer.merge()
    assert torch.equal(bits(layer.weight), merged)


def test_merging_an_adapter_of_other_layers_does_nothing():
    layer = make_layer()
    before = bits(layer.weight)
    layer.merge(adapter_names=["elsewhere"])
    assert not layer.merged and torch.equal(bits(layer.weight), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_non_finite_values_and_changes_nothing(value):
    layer = make_layer()
    before = bits(layer.weight)
    layer.star_delta["default"].data[1, 2] = value
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems"):
        layer.merge(safe_merge=True)
    assert not layer.merged and not layer._merged_columns
    assert torch.equal(bits(layer.weight), before)
    layer.merge()  # as PEFT has it, without safe_merge nothing is checked; and even this can be undone
    layer.unmerge()
    assert torch.equal(bits(layer.weight), before)


def test_safe_merge_refuses_an_overflow_of_the_base_dtype():
    layer = make_layer(make_base().to(torch.float16))
    layer.star_delta["default"] = torch.full((4, HEIGHT), 1e6)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)


def test_disabled_layer_is_the_base_layer_and_unmerges():
    layer = make_layer()
    before = bits(layer.weight)
    x = torch.randn(2, WIDTH)
    expected, patched = layer.base_layer(x), layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert not layer.merged and torch.equal(bits(layer.weight), before)
    assert not layer.star_delta["default"].requires_grad
    layer.enable_adapters(True)
    assert torch.equal(layer(x), patched)
    assert layer.star_delta["default"].requires_grad


def test_quantized_bases_go_through_their_backend():
    class Backend:
        """Eight bits per weight with one scale, as a stand-in for the libraries, which need their own hardware."""

        backend_name, layer_type, supports_merge = "toy", "linear", True

        def get_base_weight(self, base_layer):
            return base_layer.codes.float() * base_layer.scale

        def set_base_weight(self, peft_layer, weight):
            base_layer = peft_layer.get_base_layer()
            base_layer.scale = weight.abs().max() / 127
            base_layer.codes = (weight / base_layer.scale).round().to(torch.int8)

        def maybe_clone_base_result(self, x):
            return x.clone()

    class Quantized(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.codes.float() * self.scale, self.bias)

    base = Quantized(WIDTH, HEIGHT)
    layer = make_layer(base)
    layer.quantization_backend = Backend()
    layer.quantization_backend.set_base_weight(layer, base.weight.detach())
    with torch.no_grad():
        layer.star_delta["default"].mul_(0.1)
    codes, x = base.codes.clone(), torch.randn(3, WIDTH)
    expected = layer(x)
    add(layer, "second", 2)
    with pytest.warns(UserWarning, match="Merging into a toy layer quantizes it anew"):
        layer.merge(safe_merge=True)
    assert not torch.equal(layer.base_layer.codes, codes)
    torch.testing.assert_close(layer(x), expected, atol=0.05, rtol=0.05)
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge(adapter_names=["second"])
    assert set(layer.state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        *(f"star_{kind}.{name}" for kind in ("delta", "neurons") for name in ("default", "second")),
    }
    # quantizing anew changed other columns too; unmerging is exact all the same
    layer.unmerge()
    assert layer.base_layer is base and torch.equal(base.codes, codes)
    assert torch.equal(layer(x), expected)

    layer.quantization_backend.supports_merge = False
    with pytest.raises(ValueError, match="Merging is not supported for toy layers"):
        layer.merge()
    assert not layer.merged


##########################
# Neurons and their form #
##########################


def test_selection_before_any_repair_is_even_deterministic_and_nameless():
    torch.manual_seed(0)
    first = make_layer(num_neurons=5, name="a").star_neurons["a"]
    torch.manual_seed(1)
    second = make_layer(num_neurons=5, name="another").star_neurons["another"]
    assert torch.equal(first, second)
    assert first.tolist() == [1, 3, 6, 8, 10]
    assert make_layer(num_neurons=1).star_neurons["default"].tolist() == [WIDTH // 2]


def test_init_weights_false_is_random_but_seeded_and_nameless():
    deltas = []
    for name in ("a", "another"):
        torch.manual_seed(3)
        base = make_base()
        torch.manual_seed(4)
        deltas.append(make_layer(base, name=name).star_delta[name])
    assert torch.equal(*deltas)
    assert deltas[0].abs().min() > 0


def test_more_neurons_than_the_module_has():
    with pytest.raises(ValueError, match="has only 12"):
        make_layer(num_neurons=13)


@pytest.mark.parametrize("number", [0, -1])
def test_no_neurons(number):
    with pytest.raises(ValueError, match="`num_neurons` should be a positive integer value"):
        make_layer(num_neurons=number)


def test_state_dict_holds_the_indices_and_nothing_that_is_derived():
    layer = make_layer()
    layer.merge()
    adapter = {key: value for key, value in layer.state_dict().items() if "base_layer" not in key}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in adapter.items()} == {
        "star_delta.default": (torch.float32, (4, HEIGHT)),
        "star_neurons.default": (torch.int32, (4,)),
    }


def test_layer_exposes_what_models_look_at():
    for kind in ("linear", "conv1d"):
        base = make_base(kind)
        layer = make_layer(base)
        assert layer.weight is base.weight and layer.bias is base.bias
        assert (layer.in_features, layer.out_features) == (WIDTH, HEIGHT)
    assert make_layer(make_base(bias=False)).bias is None
    assert repr(layer).startswith("star.Linear(")
    assert not layer.supports_lora_conversion()


def test_nested_adapters_are_refused():
    with pytest.raises(ValueError, match="does not support nested base layers"):
        make_layer(make_layer())


###############
# set_neurons #
###############


def test_set_neurons_keeps_device_dtype_and_requires_grad():
    layer = make_layer(make_base().to(torch.bfloat16))
    layer.star_delta["default"] = nn.Parameter(layer.star_delta["default"].detach().float(), requires_grad=False)
    layer.set_neurons("default", torch.tensor([11, 3, 5]), torch.ones(3, HEIGHT, dtype=torch.float64))
    delta, neurons = layer.star_delta["default"], layer.star_neurons["default"]
    assert isinstance(delta, nn.Parameter) and not delta.requires_grad
    assert delta.dtype == torch.float32 and torch.equal(delta, torch.ones(3, HEIGHT))
    assert neurons.dtype == torch.int32 and neurons.tolist() == [11, 3, 5]
    assert "star_neurons.default" in layer.state_dict()


def test_set_neurons_without_a_delta_gives_zeros():
    for neurons in ([1, 2], range(4), torch.tensor([7], dtype=torch.uint8)):
        layer = make_layer()
        layer.set_neurons("default", neurons)
        assert layer.star_delta["default"].shape == (len(neurons), HEIGHT)
        assert not layer.star_delta["default"].any()
        assert layer.star_delta["default"].requires_grad


def test_set_neurons_of_the_same_number_keeps_the_parameter_for_optimizers():
    layer = make_layer()
    parameter = layer.star_delta["default"]
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    layer.set_neurons("default", [8, 9, 10, 11])
    assert layer.star_delta["default"] is parameter
    layer(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.star_delta["default"], -torch.ones(4, HEIGHT))


def test_set_neurons_does_not_keep_the_callers_tensors():
    layer = make_layer()
    for count in (4, 2):
        neurons, delta = torch.arange(count, dtype=torch.int32), torch.ones(count, HEIGHT)
        layer.set_neurons("default", neurons, delta)
        neurons.fill_(0)
        delta.fill_(9)
        assert layer.star_neurons["default"].tolist() == list(range(count))
        assert torch.equal(layer.star_delta["default"], torch.ones(count, HEIGHT))


@pytest.mark.parametrize(
    "error, neurons, delta, message",
    [
        (ValueError, [0, 0], None, "unique"),
        (ValueError, [0, WIDTH], None, r"in \[0, 12\), got 12"),
        (ValueError, [-1], None, r"in \[0, 12\), got -1"),
        (ValueError, torch.empty(0, dtype=torch.int64), None, "empty"),
        (ValueError, [[0, 1]], None, "should be a vector"),
        (ValueError, torch.tensor(3), None, "should be a vector"),
        (TypeError, [0.0, 1.0], None, "integer indices"),
        (TypeError, torch.ones(WIDTH, dtype=torch.bool), None, "integer indices"),
        (ValueError, [0, 1], torch.zeros(3, HEIGHT), r"shape \(2, 7\)"),
        (ValueError, [0, 1], torch.zeros(2, HEIGHT + 1), r"shape \(2, 7\)"),
        (ValueError, [0, 1], torch.zeros(HEIGHT, 2), r"shape \(2, 7\)"),
        (ValueError, [0, 1], torch.full((2, HEIGHT), torch.nan), "NaN"),
        (ValueError, [0, 1], torch.full((2, HEIGHT), torch.inf), "NaN or infinite"),
        (TypeError, [0, 1], torch.zeros(2, HEIGHT, dtype=torch.int64), "floating point"),
    ],
)
def test_set_neurons_refuses_bad_values_and_changes_nothing(error, neurons, delta, message):
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer.set_neurons("default", neurons, delta)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_set_neurons_of_unknown_or_merged_adapters():
    layer = make_layer()
    with pytest.raises(ValueError, match="no adapter 'other'; it has \\['default'\\]"):
        layer.set_neurons("other", [0])
    layer.merge()
    with pytest.raises(ValueError, match="while it is merged"):
        layer.set_neurons("default", [0])


###################
# Delete and copy #
###################


def test_delete_leaves_nothing_behind():
    layer = make_layer(name="a")
    add(layer, "b", 3)
    layer.set_adapter("a")
    layer.merge()
    layer.unmerge()
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        layer.delete_adapter("a")
    assert layer.active_adapters == ["b"]
    for name in StarLayer.adapter_layer_names + StarLayer.other_param_names:
        assert "a" not in getattr(layer, name)
    assert not any(key.endswith(".a") for key in layer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.delete_adapter("b")
    assert layer.active_adapters == []


def test_a_copy_of_a_merged_layer_unmerges_by_itself():
    layer = make_layer()
    before = bits(layer.weight)
    layer.merge()
    merged = bits(layer.weight)
    clone = copy.deepcopy(layer)
    clone.unmerge()
    assert torch.equal(bits(clone.weight), before)
    assert torch.equal(bits(layer.weight), merged)
