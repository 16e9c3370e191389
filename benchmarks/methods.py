"""The repair methods that the benchmarks compare, by name.

    with make_method("star").patched(base, tokenizer, rows) as outcome:
        outcome.model.generate(...)

`star` is the package with its defaults, `star-general` the same with priors averaged over plausible contexts. The
paper's variants run Algorithm 1 to the letter: `star-paper` on all neurons of all layers, `star-model-wise` on as many
as 64 a layer, ranked over all layers together; `star-layer` and `star-neuron` are STAR[layer] and STAR[neuron] of its
Table 5. The paper does not spell these out, but says that one patches hundreds of times as many neurons as the other.
With 11,008 neurons in a layer, and 64 in section 5.2 ("specifying the layer that is most critical to the loss"), these
are all neurons of the one most critical layer, and 64 of them. `sgd` has the paper's rate; `lora-10` has as many steps
as STAR, `lora`, `lora-practice` and `shira` have 50. `rome`, `memit` and `alphaedit` are for facts: they need the
`focus` of each row, its subject. Their searches have EasyEdit's settings; layers and weights were chosen on
SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from baselines import Adapter, FullSGD, LogitBias, Mint
from editors import AlphaEdit, Memit, Rome
from interface import Applied, Method, Outcome, Problem
from peft_star import RepairArguments, RepairCallback, RepairReport, StarConfig, repair

__all__ = ["METHODS", "Method", "Outcome", "Star", "make_method"]

# of a patch's configuration and of a repair's arguments what results say of a STAR run, and what they do not
CONFIG = ("num_neurons", "num_layers", "layer_selection", "neuron_pattern")
UNSAID = {"mode", "margin", "max_batch_tokens", "verify_generation", "allow_other_base", "disable_tqdm"}


class Star(Method):
    """`get_peft_model` and `repair`; settings are fields of `StarConfig` and `RepairArguments`."""

    def __init__(self, name: str, **settings: Any):
        known = {item.name for item in fields(RepairArguments)}
        # what is measured here is measured in the model's own arithmetic
        self._arguments = {"serve": (), **{key: value for key, value in settings.items() if key in known}}
        self._config = {key: value for key, value in settings.items() if key not in known}
        arguments = RepairArguments(**self._arguments).to_dict()
        config = StarConfig(**self._config).to_dict()
        shown = {key: config[key] for key in (*CONFIG, *self._config)}
        super().__init__(name, **shown, **{key: arguments[key] for key in arguments if key not in UNSAID})

    @contextmanager
    def install(self, base: nn.Module) -> Iterator[PeftModel]:
        """The adapter on a plain model; taken off on leaving."""
        model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", **self._config))
        try:
            yield model
        finally:
            model.unload()

    def repair(
        self,
        model: PeftModel,
        tokenizer,
        rows: Sequence[dict[str, Any]],
        *,
        callbacks: Sequence[RepairCallback] | None = None,
        **arguments: Any,
    ) -> RepairReport:
        """Repair what `install` gives; `arguments` are those of `RepairArguments` that the settings do not hold."""
        settings = {"verify_generation": False, "disable_tqdm": True, **self._arguments}
        return repair(model, tokenizer, rows, RepairArguments(**settings, **arguments), callbacks=callbacks)

    @contextmanager
    def apply(self, problem: Problem, callbacks: Sequence[RepairCallback] | None = None) -> Iterator[Applied]:
        with self.install(problem.base) as model:
            report = self.repair(
                model,
                problem.tokenizer,
                problem.rows,
                callbacks=callbacks,
                mode=problem.mode,
                margin=problem.margin,
            )
            details = {
                "phases": report.seconds,
                "layers": len(report.layers),
                "neurons": sum(len(layer.neurons) for layer in report.layers),
            }
            yield Applied(model, report.steps, details)


def _method(kind: type[Method], name: str, **settings: Any) -> Callable[..., Method]:
    return partial(kind, name, **settings)


# these settings, MINT's factor and the rate of `sgd-tuned` come from tuning.py on SmolLM2-135M
ADAPTER = {"optimizer": "adamw", "rank": 8, "target_modules": "ffn-second", "learning_rate": 1e-2, "seed": 0}

# practice, as tutorials have it, instead of the quickest setting that solves everything
PRACTICE = {**ADAPTER, "rank": 16, "target_modules": "all-linear", "learning_rate": 2e-4}
# Algorithm 1 to the letter
PAPER = {"algorithm": "prior-guided", "damping": 1.0, "growth": 1.0}
SEARCH = {"steps": 25, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 0.75, "kl_weight": 0.0625}
EDITOR = {"layers": None, **SEARCH, "tokens": 60_000, "text": None}

METHODS: dict[str, Callable[..., Method]] = {
    factory.args[0]: factory
    for factory in (
        _method(Star, "star"),
        _method(Star, "star-general", generalization=5.0),
        _method(Star, "star-paper", **PAPER, layer_selection="all", num_neurons=1.0),
        _method(Star, "star-model-wise", **PAPER, layer_selection="all", neuron_pattern="model-wise"),
        _method(Star, "star-layer", **PAPER, layer_selection="occlusion", num_layers=1, num_neurons=1.0),
        _method(Star, "star-neuron", **PAPER, layer_selection="occlusion", num_layers=1, num_neurons=64),
        _method(Mint, "mint", factor=10.0, candidates=5, max_patches=10),
        _method(FullSGD, "sgd", optimizer="sgd", learning_rate=1e-2, max_steps=10),
        _method(FullSGD, "sgd-tuned", optimizer="sgd", learning_rate=3e-3, max_steps=10),
        _method(Adapter, "lora", adapter="lora", **ADAPTER, max_steps=50),
        _method(Adapter, "lora-practice", adapter="lora", **PRACTICE, max_steps=50),
        _method(Adapter, "lora-10", adapter="lora", **ADAPTER, max_steps=10),
        _method(Adapter, "shira", adapter="shira", **ADAPTER, max_steps=50),
        _method(LogitBias, "logit-bias", max_sweeps=100),
        _method(Rome, "rome", **{**EDITOR, "clamp": 4.0}, averaged=False),
        _method(Memit, "memit", **EDITOR, moment_weight=100.0, batch=0),
        _method(AlphaEdit, "alphaedit", **EDITOR, threshold=0.02, ridge=10.0, batch=0),
    )
}


def make_method(name: str, **overrides: Any) -> Method:
    """The method of this name, with some settings changed.

    Raises:
        ValueError: There is no such method, or no such setting.
    """
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}; choose from {', '.join(METHODS)}.")
    factory = METHODS[name]
    unknown = [] if factory.func is Star else [key for key in overrides if key not in factory.keywords]
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(factory.keywords)}.")
    return factory(**overrides)
