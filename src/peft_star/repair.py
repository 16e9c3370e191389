"""Repair: failures → trace → locate → solve → patch → verify → report (paper section 3 and figure 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from . import structure
from .arguments import RepairArguments
from .batch import Batch, completion_offsets, make_batches
from .callbacks import Journal, RepairCallback
from .failures import Row, encode_rows
from .fingerprint import check_base, fingerprint
from .hub import remember_report
from .locate import (
    count_of,
    exact_occlusion,
    input_x_gradient,
    rank_agreement,
    select_layers,
    select_neurons,
)
from .model import StarModel
from .patch import patch_neurons
from .records import Records
from .report import PatchedLayer, RepairReport
from .semantics import semantic_bases, semantic_delta
from .solve import solve_prior
from .trace import Predictions, Trace, trace
from .verify import generate, teacher_forced


class RepairInterrupted(KeyboardInterrupt):
    """Ctrl-C during a repair. The model holds the last finished state, and `report` says what that is."""

    def __init__(self, report: RepairReport):
        super().__init__("The repair was interrupted.")
        self.report = report


def repair(
    model,
    tokenizer,
    failures: Iterable[dict[str, Any]],
    args: RepairArguments | None = None,
    *,
    retain: Iterable[dict[str, Any]] | None = None,
    callbacks: Sequence[RepairCallback] | None = None,
) -> RepairReport:
    """Find the failing tokens of `failures`, patch the neurons that cause them, and verify the patch.

    The model's active STAR adapter holds the patch afterwards; base weights are not touched. Deltas that the adapter
    had before are kept and built upon.

    Args:
        model: A `PeftModel` from `get_peft_model(base, StarConfig(...))` or `PeftModel.from_pretrained`.
        tokenizer: Its tokenizer.
        failures: Rows `{"prompt", "completion"}`, strings or lists of chat messages; a list or a `datasets.Dataset`.
        args: How to run; defaults to `RepairArguments()`.
        retain: Rows of the same form that must stay as they are; tokens of theirs that break join the loss.
        callbacks: [`RepairCallback`]s.

    Returns:
        [`RepairReport`]

    Raises:
        TypeError: `model` is not a PEFT model with a STAR adapter.
        ValueError: A row, the configuration or the model does not fit; nothing has been changed.
        RepairInterrupted: Ctrl-C; the model holds the last finished state.
    """
    args = args or RepairArguments()
    session = _Session(model, tokenizer, args, Journal(args, callbacks))
    rows = session.encode(failures, "failures row")
    retain = list(retain) if retain is not None and not isinstance(retain, (str, bytes, dict)) else retain
    retained = session.encode(retain, "retain row") if retain else []
    return session.run(rows, retained)


def prepare(
    model, tokenizer, failures: Iterable[dict[str, Any]], args: RepairArguments | None = None
) -> dict[str, torch.Tensor]:
    """Locate the buggy neurons and solve their priors, without patching: for hand-written loops and `Trainer`.

    The adapter's deltas are zero on the located neurons afterwards (what it held before is kept), and each delta's
    `star_prior` is what [`PriorGuidedSGD`] reads.

    Args:
        model, tokenizer, failures, args: As for [`repair`].

    Returns:
        `dict[str, torch.Tensor]`: Per patched module its prior W_Δ, shape (k, d).

    Raises:
        TypeError, ValueError: As for [`repair`], and when no token fails.
    """
    args = args or RepairArguments(disable_tqdm=True)
    session = _Session(model, tokenizer, args, Journal(args, ()))
    rows = session.encode(failures, "failures row")
    with session.frozen():
        traced = session.trace(make_batches(rows, args.max_batch_tokens, session.device))
        if not traced.medium.numel():
            raise ValueError("No token of these rows fails; there is nothing to solve.")
        session.solve(traced, session.locate(traced, None))
    return {name: session.layer(name).star_delta[session.adapter].star_prior for name in session.patched()}


@dataclass
class _Before:
    """What the model said before the first patch."""

    rows: Predictions
    retained: Predictions | None
    generated: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)


class _Session:
    """One repair of one adapter: the model's parts, and the operations with their bookkeeping."""

    def __init__(self, model, tokenizer, args: RepairArguments, journal: Journal):
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, StarModel):
            raise TypeError(
                f"repair() got a {type(model).__name__} without a STAR adapter; "
                "make one with get_peft_model(model, StarConfig(...)) or PeftModel.from_pretrained."
            )
        if tokenizer is None or not callable(tokenizer):
            raise TypeError("repair() needs the model's tokenizer as its second argument.")
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"repair() patches one adapter, but {len(active)} are active ({', '.join(active) or 'none'}); "
                "call model.set_adapter(name) first."
            )
        self.model, self.tuner, self.base, self.tokenizer = model, tuner, tuner.model, tokenizer
        self.args, self.journal = args, journal
        self.adapter = active[0]
        self.config = tuner.peft_config[self.adapter]
        # retargeting records the neurons found in the config; each failure of this repair gets what was asked for
        self.num_neurons = self.config.num_neurons
        self.bases = None
        if not hasattr(self.base, "get_output_embeddings") or self.base.get_output_embeddings() is None:
            raise ValueError(f"{type(self.base).__name__} has no LM head; repair() needs a causal language model.")
        self.device = self.base.get_input_embeddings().weight.device
        # layers that lose the adapter stay candidates for the next failure of this repair
        self.candidates = list(self.patched())
        layers = dict(structure.find_decoder_layers(self.base))
        self.decoder_of = {
            name: next((layer for layer in layers if name.startswith(f"{layer}.")), None) for name in self.candidates
        }
        orphan = next((name for name, layer in self.decoder_of.items() if layer is None), None)
        if orphan is not None:
            raise ValueError(f"The target module {orphan} lies in no decoder layer; leave it out of `target_modules`.")
        self.decoder_layers = {name: layers[name] for name in layers if name in set(self.decoder_of.values())}
        self._check_widths()
        check_base(self.base, self.config, allow_mismatch=args.allow_other_base)
        self.occlusion: dict[str, Any] = {}
        self.steps = 0

    def _check_widths(self) -> None:
        head = self.base.get_output_embeddings().weight
        for name in self.candidates:
            layer = self.layer(name)
            if self.adapter in layer.merged_adapters:
                raise ValueError(f"Adapter {self.adapter!r} is merged; call model.unmerge_adapter() before a repair.")
            if layer.disable_adapters:
                raise ValueError("The model's adapters are disabled; call enable_adapter_layers() before a repair.")
            count_of(self.num_neurons, layer.in_features, f"neurons of {name}")
            if head.is_floating_point() and layer.out_features != head.shape[1]:
                raise ValueError(
                    f"{name} writes {layer.out_features} features but the LM head reads {head.shape[1]}; "
                    "STAR needs FFNs that write to the representation that the head reads."
                )
        if self.config.layer_selection == "occlusion" and self.config.num_layers is not None:
            count_of(self.config.num_layers, len(self.decoder_layers), "layers")

    # the model's parts

    def layer(self, name: str) -> nn.Module:
        return self.base.get_submodule(name)

    def patched(self) -> list[str]:
        """Modules that carry the adapter, in order of depth."""
        return [
            name for name, module in self.base.named_modules() if self.adapter in getattr(module, "star_delta", {})
        ]

    def encode(self, rows: Iterable[dict[str, Any]] | None, name: str) -> list[Row]:
        config = self.base.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        limit = getattr(config, "max_position_embeddings", None)
        if rows is None or isinstance(rows, (str, bytes, dict)):
            raise TypeError("failures and retain must be lists (or datasets) of rows with 'prompt' and 'completion'.")
        return encode_rows(rows, self.tokenizer, limit, name=name)

    @contextmanager
    def frozen(self):
        """Evaluation mode, nothing but the adapter's deltas trainable; everything back as it was afterwards."""
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
            for name in self.patched():
                self.layer(name).star_delta[self.adapter].requires_grad_(not self.config.inference_mode)
            for parameter in trainable:
                parameter.requires_grad_(True)

    # the operations

    def trace(self, batches: Sequence[Batch], only: torch.Tensor | None = None) -> Trace:
        # a mixture's experts show their activations through a module of their own, which only the adapter has
        modules = {name: self.layer(name) for name in self.candidates}
        ffns = {
            name: getattr(module, "second", module)
            for name, module in modules.items()
            if hasattr(module, "second") or structure.routed_shape(module) is None
        }
        with self.journal.phase("trace", sum(len(batch.items) for batch in batches)):
            return trace(
                self.base,
                batches,
                ffns,
                self.decoder_layers,
                only_slots=only,
                progress=self.journal.advance,
            )

    def locate(self, traced: Trace, batches: Sequence[Batch] | None) -> dict[str, torch.Tensor]:
        """The buggy neurons by module."""
        exact = self.args.occlusion == "exact" and batches is not None and self.config.layer_selection == "occlusion"
        with self.journal.phase("locate", len(self.decoder_layers) if exact else 0):
            importance = dict(traced.occlusion)
            self.occlusion = {"first-order": importance}
            if exact:
                measured = exact_occlusion(
                    self.base, batches, self.decoder_layers, traced.medium, traced.loss, self.journal.advance
                )
                count = count_of(self.config.num_layers or 1.0, len(importance), "layers")
                self.occlusion |= {"exact": measured, "agreement": rank_agreement(importance, measured, count)}
                importance = measured
            scores = input_x_gradient(traced)
            if self.config.neuron_pattern == "model-wise":
                return select_neurons(scores, self.num_neurons, "model-wise")
            chosen = set(select_layers(importance, self.config.layer_selection, self.config.num_layers))
            inside = {name: values for name, values in scores.items() if self.decoder_of[name] in chosen}
            return select_neurons(inside, self.num_neurons, "layer-wise")

    def solve(self, traced: Trace, located: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
        """Put the located neurons into the adapter, solve their priors, and return the first step's gradients."""
        with self.journal.phase("solve", len(located)):
            self.bases = self.bases or semantic_bases(self.base)
            predictions, medium = traced.predictions, traced.medium
            semantics = partial(
                semantic_delta, self.bases, predictions.argmax[medium], predictions.expected[medium], self.args.norm
            )
            shared = None if self.args.norm == "rms" else semantics()
            self._extend(located)
            gradients = []
            for name in self.patched():
                layer, layer_trace = self.layer(name), traced.layers[name]
                delta = layer.star_delta[self.adapter]
                prior = torch.zeros_like(delta)
                neurons = layer.star_neurons[self.adapter].long()
                if name in located:
                    wanted = located[name].to(neurons.device)
                    activations = torch.cat(layer_trace.activations).index_select(1, wanted)
                    steer = shared if shared is not None else semantics(traced.hidden_rms[self.decoder_of[name]])
                    solved = solve_prior(activations, steer, self.args.ridge).to(prior)
                    # rows of the adapter are ascending, as `wanted` is
                    prior[torch.isin(neurons, wanted)] = solved
                delta.star_prior = prior
                gradients.append(layer_trace.gradient(neurons))
                self.journal.advance()
        return None if any(gradient is None for gradient in gradients) else gradients

    def _extend(self, located: dict[str, torch.Tensor]) -> None:
        """Give the adapter the located neurons besides those that already hold a delta, which is kept."""
        union, kept = {}, {}
        for name in self.candidates:
            module = self.layer(name)
            neurons = located[name].cpu().long() if name in located else torch.empty(0, dtype=torch.long)
            if self.adapter in getattr(module, "star_delta", {}):
                delta = module.star_delta[self.adapter].detach()
                used = delta.abs().amax(dim=1) > 0
                if used.any():
                    kept[name] = module.star_neurons[self.adapter][used].cpu().long(), delta[used].clone()
                    neurons = torch.cat([neurons, kept[name][0]]).unique()
            if neurons.numel():
                union[name] = neurons
        self.tuner.retarget(self.adapter, union)
        with torch.no_grad():
            for name, (neurons, delta) in kept.items():
                layer = self.layer(name)
                rows = torch.searchsorted(union[name], neurons).to(delta.device)
                layer.star_delta[self.adapter][rows] = delta

    def patch(
        self,
        batches: Sequence[Batch],
        gradients: list[torch.Tensor] | None,
        medium: torch.Tensor,
        right_before: torch.Tensor,
        retain,
    ) -> None:
        state = self.journal.state
        solved_before = state.num_solved

        def on_step(step: int, solved: int, loss: float) -> None:
            state.step, state.num_solved, state.loss = step, solved_before + solved, loss
            self.steps += 1
            self.journal.advance()
            self.journal.call("on_step_end")

        deltas = [self.layer(name).star_delta[self.adapter] for name in self.patched()]
        for delta in deltas:
            delta.requires_grad_(True)
        try:
            with self.journal.phase("patch", self.args.max_steps):
                predictions = patch_neurons(
                    self.base,
                    batches,
                    deltas,
                    gradients,
                    medium,
                    right_before,
                    learning_rate=self.args.learning_rate,
                    damping=self.args.damping,
                    growth=self.args.growth,
                    max_steps=self.args.max_steps,
                    margin=self.args.margin,
                    retain=retain,
                    on_step=on_step,
                )
        finally:
            for delta in deltas:
                delta.requires_grad_(False)
        state.num_solved = solved_before + int(predictions.right[medium].sum())

    # the modes

    def _multiple(self, batches, retain) -> None:
        traced = self.trace(batches)
        gradients = self.solve(traced, self.locate(traced, batches))
        self.patch(batches, gradients, traced.medium, traced.predictions.right, retain)

    def _single(self, rows: Sequence[Row], before: Predictions, retain) -> None:
        """One failure after the other, each with a prior of its own; failures that broke again come up again."""
        state = self.journal.state
        for _ in range(self.args.max_rounds):
            solved_at_start = state.num_solved
            for row, start in zip(rows, completion_offsets(rows)):
                batches = make_batches([row], self.args.max_batch_tokens, self.device)
                slots = torch.arange(start, start + len(row.completion_ids))
                right = before.right[slots]
                for position in range(len(row.completion_ids)):
                    if right[position]:
                        continue
                    only = torch.tensor([position])
                    traced = self.trace(batches, only)
                    if not traced.medium.numel():
                        continue
                    keep = traced.predictions.right.clone()
                    keep[position] = False
                    gradients = self.solve(traced, self.locate(traced, batches))
                    self.patch(batches, gradients, only, keep, retain)
            now = teacher_forced(self.base, make_batches(rows, self.args.max_batch_tokens, self.device))
            state.num_solved = int(now.right[~before.right].sum())
            if now.right.all() or state.num_solved <= solved_at_start:
                break

    def run(self, rows: list[Row], retained: list[Row]) -> RepairReport:
        args, state = self.args, self.journal.state
        row_batches = make_batches(rows, args.max_batch_tokens, self.device)
        retain_batches = make_batches(retained, args.max_batch_tokens, self.device)
        before = interrupted = None
        self.journal.call("on_repair_begin")
        with self.frozen():
            before = self._before(rows, retained, row_batches, retain_batches)
            state.num_failures = int((~before.rows.right).sum())
            retain = partial(self._harmed, retain_batches, before.retained) if retained else None
            try:
                if state.num_failures and args.mode == "multiple":
                    self._multiple(row_batches, retain)
                elif state.num_failures:
                    self._single(rows, before.rows, retain)
            except KeyboardInterrupt as error:
                interrupted = error
            self.config.base_fingerprint = fingerprint(self.base)
            report = self._report(rows, retained, row_batches, retain_batches, before, interrupted is not None)
        remember_report(self.model, self.adapter, report)
        self.journal.call("on_repair_end")
        if interrupted is not None:
            raise RepairInterrupted(report) from interrupted
        return report

    def _before(self, rows, retained, row_batches, retain_batches) -> _Before:
        with self.journal.phase("failures", len(rows) + len(retained)):
            before = _Before(teacher_forced(self.base, row_batches, self.journal.advance), None)
            if retained:
                before.retained = teacher_forced(self.base, retain_batches, self.journal.advance)
        if self.args.verify_generation:
            with self.journal.phase("verify", len(rows) + len(retained)):
                before.generated = self._generate(rows, retained)
        return before

    def _generate(self, rows, retained) -> dict[str, list[tuple[int, ...]]]:
        run = partial(
            generate, self.base, self.tokenizer, max_tokens=self.args.max_batch_tokens, progress=self.journal.advance
        )
        return {"failures": run(rows), "retain": run(retained) if retained else []}

    def _harmed(self, batches: Sequence[Batch], before: Predictions) -> list[tuple[Batch, torch.Tensor]]:
        """Retained batches with the mask (N) of tokens that were right and are wrong now."""
        now = teacher_forced(self.base, batches)
        return [(batch, (before.right & ~now.right)[batch.slots.cpu()]) for batch in batches]

    # the report

    def _report(self, rows, retained, row_batches, retain_batches, before: _Before, interrupted: bool) -> RepairReport:
        with self.journal.phase("verify", len(rows) + len(retained)):
            after = teacher_forced(self.base, row_batches)
            after_retained = teacher_forced(self.base, retain_batches) if retained else None
            generated = self._generate(rows, retained) if self.args.verify_generation and not interrupted else {}
        report = RepairReport(
            failures=[],
            rows=[],
            broken=[],
            layers=self._patched_layers(),
            steps=self.steps,
            seconds=dict(self.journal.state.seconds),
            occlusion=self.occlusion,
            arguments=self.args.to_dict(),
            config=_plain(self.config.to_dict()),
            versions={name: version(name) for name in ("torch", "transformers", "peft")},
            interrupted=interrupted,
        )
        for source, items, was, now in (
            ("failures", rows, before.rows, after),
            ("retain", retained, before.retained, after_retained),
        ):
            if items:
                records = Records(source, items, was, now, self.tokenizer)
                report.rows += records.of_rows(before.generated.get(source), generated.get(source))
                report.broken += records.broken()
                if source == "failures":
                    report.failures = records.failures()
        return report

    def _patched_layers(self) -> list[PatchedLayer]:
        layers = []
        for name in self.patched():
            layer = self.layer(name)
            delta, neurons = layer.star_delta[self.adapter].detach(), layer.star_neurons[self.adapter]
            if delta.any():
                layers.append(PatchedLayer(name, sorted(neurons.tolist()), float(delta.float().norm())))
        return layers


def _plain(value: Any) -> Any:
    """A config's dict in JSON types: sets become sorted lists, enums their value."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
