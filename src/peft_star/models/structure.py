"""Finds the feed-forward networks (FFN) of a model by its structure, never by a list of model names.

The paper patches "the second FFN weight matrix" of decoder layers: the linear map (d x m) that takes the FFN's
intermediate activation (m) back to the hidden width d (section 3.2). Such a matrix is recognised by its partner: in
the same layer, outside of attention, there is a linear map from d to m (or to 2m, when the gate and the up projection
are fused into one matrix).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

# attributes by which modules that mix positions are known: attention keeps the geometry of its heads
_ATTENTION_ATTRIBUTES = (
    "num_key_value_groups",
    "num_key_value_heads",
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "n_head",
    "head_dim",
)
_ADVICE = "Please specify `target_modules` in `peft_config`."


def _no_tensor_subclass(*args, **kwargs):
    raise NotImplementedError


def _is_quantized_linear(module: nn.Module) -> bool:
    # torchao asks for the function that quantizes again after merging; to recognise a layer it is not needed
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=_no_tensor_subclass)
    return backend is not None and backend.layer_type == "linear"


def is_linear(module: nn.Module) -> bool:
    """Whether STAR can adapt `module`: `nn.Linear`, transformers' `Conv1D` or a quantized linear layer."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return isinstance(module, (nn.Linear, Conv1D)) or _is_quantized_linear(module)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear module, also of one that an adapter wraps, or None."""
    if not is_linear(module):
        return None
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_features, out_features = _get_in_out_features(module)
    if in_features is None or out_features is None:
        return None
    return int(in_features), int(out_features)


def routed_shape(module: nn.Module) -> tuple[int, int, int] | None:
    """Return (experts, neurons of each, out_features) of routed experts that STAR can adapt, or None.

    These are modules as transformers 5 stores experts: a `down_proj` of shape (experts, d, m), or (experts, m, d), and
    the attributes by which its expert implementations know the layout. Experts whose output is normalised before
    they are mixed are left out, since a delta would have to pass through the norm.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    down = getattr(module, "down_proj", None)
    up = getattr(module, "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", None)
    layout = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "_apply_gate")
    if not all(hasattr(module, attribute) for attribute in layout) or getattr(module, "has_post_expert_norm", False):
        return None
    if getattr(module, "_is_expert_parallel", False):
        return None
    for parameter in (down, up):
        if not isinstance(parameter, nn.Parameter) or parameter.dim() != 3 or not parameter.dtype.is_floating_point:
            return None
        if parameter.element_size() < 2:  # 8-bit floats need scales that only the experts' own code knows
            return None
    assert down is not None  # as the loop found it
    experts, *size = down.shape
    width, out_features = size if module.is_transposed else reversed(size)
    return int(experts), int(width), int(out_features)


def neuron_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (neurons, out_features) of a module that STAR can adapt, or None; of experts, the neurons of all."""
    routed = routed_shape(module)
    return linear_shape(module) if routed is None else (routed[0] * routed[1], routed[2])


def _mixes_positions(module: nn.Module) -> bool:
    """Whether `module` is attention, or a mixer that stands in its place, and so holds no FFN."""
    class_name = type(module).__name__.lower()
    if "attention" in class_name or "attn" in class_name:
        return True
    if any(hasattr(module, attribute) for attribute in _ATTENTION_ATTRIBUTES):
        return True
    # state space and linear attention mixers run a short convolution over the positions
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below `module` that may belong to an FFN, each before those it contains."""
    for child_name, child in module.named_children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            continue
        full_name = f"{name}.{child_name}" if name else child_name
        if is_linear(child):
            # what lies inside of a linear layer is an adapter's business
            yield full_name, child
        elif not _mixes_positions(child):
            yield full_name, child
            yield from _walk(child, full_name)


@dataclass
class _Layer:
    """What was found in one layer."""

    name: str
    module: nn.Module
    second: str = ""  # the name of the second matrix, relative to the layer
    size: int = 0  # number of entries of the second matrix
    experts: str | None = None  # what kind of mixture of experts was found instead
    hint: str = ""  # how such experts can be named


def _find_experts(modules: dict[str, nn.Module], pairs: list[str]) -> str | None:
    for name, module in modules.items():
        # transformers 5 fuses experts into parameters of shape (experts, d, m)
        fused = [p for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
        if len(fused) >= 2:
            return f"fused expert parameters ({name}, {type(module).__name__})"
        if isinstance(module, nn.ModuleList):
            prefix = f"{name}."
            holders = {pair.removeprefix(prefix).split(".")[0] for pair in pairs if pair.startswith(prefix)}
            if len(holders) > 1:
                return f"a list of experts ({name}, {type(module[0]).__name__})"
    return None


def _inspect_layer(name: str, layer: nn.Module) -> _Layer:
    found = _Layer(name, layer)
    modules = dict(_walk(layer))
    shapes = {key: shape for key, module in modules.items() if (shape := linear_shape(module)) is not None}

    # Several pairs may look like an FFN, such as low-rank gates. Partners with the same parent go before those that
    # are spread over two modules (as in BERT), a module of their own before pairs that hang in the layer itself (as in
    # OPT), then the largest wins, and of equal ones (in a square FFN) the last.
    candidates: list[tuple[bool, bool, int, int, str]] = []
    names = list(shapes)
    for position, second in enumerate(names):
        width, hidden = shapes[second]
        parent = second.rpartition(".")[0]
        for first in names[:position]:
            if shapes[first] in ((hidden, width), (hidden, 2 * width)):
                same_parent = first.rpartition(".")[0] == parent
                candidates.append((same_parent, parent != "", width * hidden, position, second))
    candidates = [candidate for candidate in candidates if candidate[0]] or candidates

    found.experts = _find_experts(modules, [candidate[-1] for candidate in candidates])
    if routed := next((key for key, module in modules.items() if routed_shape(module)), None):
        found.hint = f" Routed experts such as these can be named: target_modules=[{routed.rpartition('.')[-1]!r}]."
    if candidates:
        _, _, found.size, _, found.second = max(candidates)
    return found


def _find_stacks(model: nn.Module) -> list[list[_Layer]]:
    """Return the stacks of layers that hold FFNs: for each outermost `nn.ModuleList` those of its elements that do."""
    stacks: list[list[_Layer]] = []
    taken: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(prefix) for prefix in taken):
            continue
        layers = [_inspect_layer(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
        layers = [layer for layer in layers if layer.second or layer.experts]
        if layers:
            stacks.append(layers)
            taken.append(f"{name}." if name else "")
    return stacks


def _find_layers(model: nn.Module) -> list[_Layer]:
    stacks = _find_stacks(model)
    if not stacks:
        raise ValueError(
            f"No feed-forward network was found in {type(model).__name__}: no list of layers holds a linear module "
            f"that maps the output of another one back to its input's width. {_ADVICE}"
        )
    if len(stacks) > 1 and callable(get_decoder := getattr(model, "get_decoder", None)):
        # an encoder-decoder or a model with several modalities: the text decoder is what predicts tokens
        try:
            decoder = get_decoder()
        except Exception:  # models may raise what they like to say that they have none
            decoder = None
        if isinstance(decoder, nn.Module):
            inside = {id(module) for module in decoder.modules()}
            stacks = [stack for stack in stacks if id(stack[0].module) in inside] or stacks
    return max(stacks, key=lambda stack: sum(layer.size for layer in stack))


def find_decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find the layers of a model that hold an FFN.

    Args:
        model: A model, with or without adapters around it (`PeftModel`, `StarModel`).

    Returns:
        Names, as `model.named_modules()` gives them, and modules, ordered by depth.

    Raises:
        ValueError: No FFN can be found.
    """
    return [(layer.name, layer.module) for layer in _find_layers(model)]


def find_second_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Find the second matrix of the FFN of each decoder layer.

    Args:
        model: A model, with or without adapters around it (`PeftModel`, `StarModel`).

    Returns:
        A dict from names, as `model.named_modules()` gives them, to the modules: a linear layer with d outputs and m
        inputs, or the tuner layer that wraps it. It is ordered by depth.

    Raises:
        ValueError: No FFN can be found, or the FFNs are mixtures of experts.
    """
    layers = _find_layers(model)
    for layer in layers:
        if layer.experts is not None:
            raise ValueError(
                f"The FFN of {layer.name} is a mixture of experts stored as {layer.experts}, which STAR cannot choose "
                f"a second matrix from. {_ADVICE}{layer.hint}"
            )
    return {f"{layer.name}.{layer.second}": layer.module.get_submodule(layer.second) for layer in layers}
