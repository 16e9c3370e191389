"""What one repair patches, and how it runs: the things that every stage is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..engine.engine import Engine
from ..engine.own_texts import OwnTexts, own_texts
from ..failures import Row, encode_rows
from ..models import structure
from ..models.fingerprint import check_base, fingerprint
from ..models.inputs import context_length
from ..models.names import plain_name
from ..tuner.config import StarConfig
from ..tuner.layer import StarLayer, count_of, star_layers
from ..tuner.model import StarModel
from .arguments import RepairArguments
from .callbacks import Journal
from .semantics import SemanticBases, semantic_bases
from .serving import Serving
from .trace import Probe


@dataclass(frozen=True)
class HeldLayer:
    """A layer whose located neurons the adapter holds: its delta (k, d), and its neurons (k), ascending."""

    name: str
    delta: nn.Parameter
    neurons: torch.Tensor


@dataclass(frozen=True)
class Subject:
    """The adapter that a repair patches, and the model around it.

    Attributes:
        model: The `PeftModel`.
        tokenizer: Its tokenizer.
        adapter: The adapter's name.
        num_neurons: Neurons of each layer, as asked for; what is found for one failure is recorded in the config.
        decoder_of: Per module that the adapter may patch its decoder layer: those that carry it at the start, and
            those that carried it before its first repair (the configuration's `scope`).
        decoder_layers: The decoder layers that may be patched, in order of depth; nothing below them needs a gradient.
    """

    model: Any
    tokenizer: Any
    adapter: str
    num_neurons: int | float | str
    decoder_of: dict[str, str]
    decoder_layers: dict[str, nn.Module]

    @classmethod
    def of(cls, model: Any, tokenizer, args: RepairArguments) -> Subject:
        """What a repair of this model would patch; nothing is changed yet.

        Raises:
            TypeError: `model` is not a PEFT model with a STAR adapter, or there is no tokenizer.
            ValueError: The configuration or the model does not fit.
        """
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, StarModel):
            raise TypeError(
                f"repair() got a {type(model).__name__} without a STAR adapter; "
                "make one with get_peft_model(model, StarConfig(...)) or PeftModel.from_pretrained."
            )
        if tokenizer is None or not callable(tokenizer):
            raise TypeError("repair() needs the model's tokenizer as its second argument.")
        active: list[str] = model.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"repair() patches one adapter, but {len(active)} are active ({', '.join(active) or 'none'}); "
                "call model.set_adapter(name) first."
            )
        base: Any = tuner.model
        adapter = active[0]
        config = tuner.peft_config[adapter]
        if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
            raise ValueError(f"{type(base).__name__} has no LM head; repair() needs a causal language model.")
        layers, patched = dict(structure.find_decoder_layers(base)), star_layers(base, adapter)
        known = set((config.scope or {}).get("modules", ()))
        decoder_of = {
            name: next((layer for layer in layers if name.startswith(f"{layer}.")), "")
            for name, _ in base.named_modules()
            if name in patched or plain_name(name) in known
        }
        orphan = next((name for name, layer in decoder_of.items() if not layer), None)
        if orphan is not None:
            raise ValueError(f"The target module {orphan} lies in no decoder layer; leave it out of `target_modules`.")
        num_neurons = (config.scope or {}).get("num_neurons", config.num_neurons)
        for name, layer in patched.items():
            _check_layer(name, layer, adapter, base.get_output_embeddings().weight)
            count_of(num_neurons, layer.in_features, f"neurons of {name}")
        within = [name for name in layers if name in set(decoder_of.values())]
        within = candidate_layers(within, config.layer_selection, config.num_layers)
        check_base(base, config.to_dict(), allow_mismatch=args.allow_other_base)
        # retargeting overwrites the config's `num_neurons`
        return cls(model, tokenizer, adapter, num_neurons, decoder_of, {name: layers[name] for name in within})

    @property
    def base(self) -> PreTrainedModel:
        return self.model.base_model.model

    @property
    def config(self) -> StarConfig:
        return self.model.base_model.peft_config[self.adapter]

    @property
    def lowest(self) -> tuple[str, tuple[str, ...]]:
        """The lowest decoder layer that may be patched, and the modules in it that may be."""
        lowest = next(iter(self.decoder_layers))
        return lowest, tuple(name for name, layer in self.decoder_of.items() if layer == lowest)

    @cached_property
    def bases(self) -> SemanticBases:
        """The LM head's semantic bases, factored when they are first asked for."""
        return semantic_bases(self.base)

    @cached_property
    def fingerprint(self) -> str:
        """The base's, read when it is first asked for: a repair does not touch the base."""
        return fingerprint(self.base)

    def layers(self) -> dict[str, StarLayer]:
        """The layers that hold the adapter now, in order of depth."""
        return star_layers(self.base, self.adapter)

    def encode(self, rows: Iterable[dict[str, Any]], name: str) -> list[Row]:
        """The rows as tokens; `name` is what messages call one."""
        if rows is None or isinstance(rows, (str, bytes, dict)):
            raise TypeError(
                "failures, retain and related must be lists (or datasets) of rows with 'prompt' and 'completion'."
            )
        return encode_rows(rows, self.tokenizer, context_length(self.base), name=name)

    def ffns(self, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
        """The second matrices that may be patched, or those of these names, whose inputs are the neurons' activations.

        Layers that lose the adapter stay among them for the next failure of this repair.
        """
        if names is None:
            names = [name for name, layer in self.decoder_of.items() if layer in self.decoder_layers]
        modules = {name: self.base.get_submodule(name) for name in names}
        # a mixture's experts show their activations through a module of their own, which only the adapter has
        return {
            name: getattr(module, "second", module)
            for name, module in modules.items()
            if hasattr(module, "second") or structure.routed_shape(module) is None
        }

    def hold(self, located: dict[str, torch.Tensor]) -> list[HeldLayer]:
        """Give the adapter the located neurons, besides those that hold a delta already, which is kept."""
        if self.config.scope is None:
            modules = sorted(map(plain_name, self.decoder_of))
            self.config.scope = {"modules": modules, "num_neurons": self.num_neurons}
        self.model.base_model.retarget(self.adapter, located, keep_deltas=True)
        layers = self.layers()
        return [
            HeldLayer(name, layers[name].star_delta[self.adapter], layers[name].star_neurons[self.adapter].long())
            for name in located
        ]

    def held(self) -> dict[str, HeldLayer]:
        """All that the adapter holds now, by module."""
        return {
            name: HeldLayer(name, layer.star_delta[self.adapter], layer.star_neurons[self.adapter].long())
            for name, layer in self.layers().items()
        }

    @torch.no_grad()
    def put_back(self, kept: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Give the adapter back what it held: by module the neurons (k) and their deltas (k, d)."""
        self.model.base_model.retarget(self.adapter, {name: neurons for name, (neurons, _) in kept.items()})
        for name, layer in self.held().items():
            layer.delta.copy_(kept[name][1])

    @contextmanager
    def unpatched(self) -> Iterator[None]:
        """The base model's own voice: the patch is off, and what is trainable stays as it is."""
        layers = list(self.layers().values())
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
                layer.star_delta[self.adapter].requires_grad_(False)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode, and nothing trainable; everything back as it was afterwards."""
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            self.model.train(training[self.model])
            for module, mode in training.items():
                module.training = mode
            for layer in self.layers().values():
                layer.star_delta[self.adapter].requires_grad_(not self.config.inference_mode)
            for parameter in trainable:
                parameter.requires_grad_(True)


def _check_layer(name: str, layer: StarLayer, adapter: str, head: torch.Tensor) -> None:
    if adapter in layer.merged_adapters:
        raise ValueError(f"Adapter {adapter!r} is merged; call model.unmerge_adapter() before a repair.")
    if layer.disable_adapters:
        raise ValueError("The model's adapters are disabled; call enable_adapter_layers() before a repair.")
    if head.is_floating_point() and layer.out_features != head.shape[1]:
        raise ValueError(
            f"{name} writes {layer.out_features} features but the LM head reads {head.shape[1]}; "
            "STAR needs FFNs that write to the representation that the head reads."
        )


def candidate_layers(
    names: Sequence[str], selection: str | Sequence[int], num_layers: int | float | None
) -> list[str]:
    """The decoder layers among which a repair may choose; nothing below the lowest of them needs a gradient.

    Args:
        names: The decoder layers that carry the adapter, in order of depth.
        selection: `"last"`: the last `num_layers` of them; `"occlusion"`, `"all"`: every one; or the layers' indices.
        num_layers: Count or share; None: all.

    Raises:
        ValueError: There are fewer layers, or none of the given index.
    """
    if isinstance(selection, str):
        count = len(names) if num_layers is None or selection == "all" else count_of(num_layers, len(names), "layers")
        return list(names[-count:] if selection == "last" else names)
    by_index = {int(name.rpartition(".")[2]): name for name in names}
    wrong = [index for index in selection if index not in by_index]
    if wrong:
        have = ", ".join(map(str, by_index))
        raise ValueError(f"layer_selection names layer {wrong[0]}, but the adapter can patch layers {have}.")
    return [name for index, name in by_index.items() if index in set(selection)]


@dataclass(frozen=True)
class Run:
    """What every stage of a repair is given: how passes run, what is patched, the settings, and who hears of it.

    `resumed`: the adapter holds already what an earlier run of this repair has finished. `serving`: the arithmetics
    that the repair is to hold in, too.
    """

    engine: Engine
    subject: Subject
    args: RepairArguments
    journal: Journal
    resumed: bool = False
    serving: Serving = field(default_factory=lambda: Serving({}))

    def forget(self) -> None:
        """Drop what was recorded of the lower layers, because they have changed."""
        self.engine.forget()
        self.serving.forget()

    def own_texts(self) -> OwnTexts:
        """What the base model says by itself; generated when it is first asked for."""
        with self.subject.unpatched():
            return own_texts(self.engine, self.subject.tokenizer, self.journal.advance)

    def probe(self, names: Iterable[str] | None = None) -> Probe:
        """What a trace has to read for the algorithm in use, of these FFNs or of all that may be patched."""
        ffns = self.subject.ffns()
        protected = self.args.algorithm == "protected"
        return Probe(
            ffns if names is None else {name: ffns[name] for name in names},
            self.subject.decoder_layers,
            sequences=not protected,
            contexts=protected and self.args.generalization > 0,
        )
