"""Repair: failures → trace → locate → solve → patch → verify → report (paper section 3 and figure 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from ..engine.batch import Batch, completion_offsets, make_batches
from ..engine.distributed import Team
from ..engine.passes import completion_logits, generate, teacher_forced
from ..engine.predictions import Predictions
from ..engine.replay import Replay
from ..failures import Row, encode_rows
from ..models import structure
from ..models.fingerprint import check_base, fingerprint
from ..models.inputs import input_device
from ..report import PatchedLayer, RepairReport
from ..sharing.hub import remember_report
from ..tuner.model import StarModel
from .arguments import RepairArguments
from .background import WINDOW, background_activations
from .callbacks import Journal, RepairCallback
from .locate import (
    candidate_layers,
    count_of,
    exact_occlusion,
    input_x_gradient,
    rank_agreement,
    select_layers,
    select_neurons,
)
from .objective import Task
from .prior_guided import forward_backward, patch_neurons
from .protected import SteeredLayer, steer_neurons
from .records import Records
from .semantics import semantic_bases, semantic_delta
from .solve import solve_prior
from .trace import Trace, trace


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
    session.team.check_same((rows, retained))
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
        traced = session.trace(session.batches(rows))
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
        self.with_contexts = args.algorithm == "protected" and args.generalization > 0
        if not hasattr(self.base, "get_output_embeddings") or self.base.get_output_embeddings() is None:
            raise ValueError(f"{type(self.base).__name__} has no LM head; repair() needs a causal language model.")
        self.device = input_device(self.base)
        self.team = Team(self.base)
        layers = dict(structure.find_decoder_layers(self.base))
        self.decoder_of = {
            name: next((layer for layer in layers if name.startswith(f"{layer}.")), None) for name in self.patched()
        }
        orphan = next((name for name, layer in self.decoder_of.items() if layer is None), None)
        if orphan is not None:
            raise ValueError(f"The target module {orphan} lies in no decoder layer; leave it out of `target_modules`.")
        self._check_widths()
        # layers that lose the adapter stay candidates for the next failure of this repair
        within = [name for name in layers if name in set(self.decoder_of.values())]
        within = candidate_layers(within, self.config.layer_selection, self.config.num_layers)
        self.decoder_layers = {name: layers[name] for name in within}
        self.candidates = [name for name, layer in self.decoder_of.items() if layer in self.decoder_layers]
        check_base(self.base, self.config.to_dict(), allow_mismatch=args.allow_other_base)
        self.occlusion: dict[str, Any] = {}
        self.steps = 0

    def _check_widths(self) -> None:
        head = self.base.get_output_embeddings().weight
        for name in self.decoder_of:
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

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        return make_batches(rows, self.team.limit(self.args.max_batch_tokens, rows), self.device, self.base)

    def teacher_forced(self, batches: Sequence[Batch]) -> Predictions:
        return teacher_forced(self.base, batches, self.journal.advance, self.team)

    @contextmanager
    def frozen(self):
        """Evaluation mode, nothing but the adapter's deltas trainable; everything back as it was afterwards."""
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        self.replay = Replay(self.base, next(iter(self.decoder_layers)))
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

    def ffns(self) -> dict[str, nn.Module]:
        """The candidates' second matrices, whose inputs are the neurons' activations."""
        # a mixture's experts show their activations through a module of their own, which only the adapter has
        modules = {name: self.layer(name) for name in self.candidates}
        return {
            name: getattr(module, "second", module)
            for name, module in modules.items()
            if hasattr(module, "second") or structure.routed_shape(module) is None
        }

    def trace(self, batches: Sequence[Batch], only: torch.Tensor | None = None) -> Trace:
        with self.journal.phase("trace", self.team.rows(batches)):
            return trace(
                self.base,
                batches,
                self.ffns(),
                self.decoder_layers,
                only_slots=only,
                keep_sequences=self.args.algorithm == "prior-guided",
                with_contexts=self.with_contexts,
                replay=self.replay,
                team=self.team,
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
                    self.base,
                    batches,
                    self.decoder_layers,
                    traced.medium,
                    traced.loss,
                    self.journal.advance,
                    self.team,
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

    def semantics(self, traced: Trace, name: str) -> torch.Tensor:
        """Semantic deltas (n, d) of the traced tokens, for the FFN `name`."""
        predictions, medium = traced.predictions, traced.medium
        hidden_rms = traced.hidden_rms[self.decoder_of[name]]
        rival, expected = predictions.rival[medium], predictions.expected[medium]
        return semantic_delta(self.bases, rival, expected, self.args.norm, hidden_rms)

    def solve(self, traced: Trace, located: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
        """Put the located neurons into the adapter, solve their priors, and return the first step's gradients."""
        with self.journal.phase("solve", len(located)):
            self.bases = self.bases or semantic_bases(self.base)
            self._extend(located)
            gradients = []
            for name in self.patched():
                layer, layer_trace = self.layer(name), traced.layers.get(name)
                delta = layer.star_delta[self.adapter]
                prior = torch.zeros_like(delta)
                neurons = layer.star_neurons[self.adapter].long()
                if name in located:
                    wanted = located[name].to(neurons.device)
                    activations = traced.activations(name, wanted)
                    solved = solve_prior(activations, self.semantics(traced, name), self.args.ridge).to(prior)
                    # rows of the adapter are ascending, as `wanted` is
                    prior[torch.isin(neurons, wanted)] = solved
                delta.star_prior = prior
                gradients.append(torch.zeros_like(delta) if layer_trace is None else layer_trace.gradient(neurons))
                self.journal.advance()
        missing = any(gradient is None for gradient in gradients)
        return None if any(self.team.gather(missing)) else gradients

    def steered(self, located: dict[str, torch.Tensor]) -> list[SteeredLayer]:
        """Put the located neurons into the adapter, and read what they do on background text."""
        tokens, layers = self.args.background, []
        with self.journal.phase("solve", -(-tokens // WINDOW)):
            self.bases = self.bases or semantic_bases(self.base)
            self._extend(located)
            ffns = self.ffns()
            ffns = {name: ffns[name] for name in located}
            read = partial(background_activations, self.base, self.tokenizer, ffns, tokens, team=self.team)
            background = read(progress=self.journal.advance) if tokens else {}
            for name in located:
                layer = self.layer(name)
                neurons = layer.star_neurons[self.adapter].long()
                shown = None
                if name in background:
                    shown = background[name].index_select(1, neurons.to(background[name].device))
                elif tokens:  # other processes read the background
                    shown = torch.zeros(0, len(neurons), device=neurons.device)
                layers.append(SteeredLayer(name, layer.star_delta[self.adapter], neurons, shown))
        return layers

    def _extend(self, located: dict[str, torch.Tensor]) -> None:
        """Give the adapter the located neurons besides those that already hold a delta, which is kept."""
        union, kept = {}, {}
        for name in self.decoder_of:
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
        traced: Trace,
        retained: Sequence[Batch],
        before_retained: Predictions | None,
    ) -> Predictions:
        """Locate, solve and patch what was traced; returns what the model then says at the tokens of `batches`."""
        located = self.locate(traced, batches)
        state = self.journal.state
        solved_before = state.num_solved

        def on_step(step: int, solved: int, loss: float) -> None:
            state.step, state.num_solved, state.loss = step, solved_before + solved, loss
            self.steps += 1
            self.journal.advance()
            self.journal.call("on_step_end")

        if self.args.algorithm == "prior-guided":
            predictions = self._patch_prior_guided(batches, traced, located, retained, before_retained, on_step)
        else:
            predictions = self._patch_protected(batches, traced, located, retained, before_retained, on_step)
        state.num_solved = solved_before + int(predictions.right[traced.medium].sum())
        return predictions

    def _patch_protected(self, batches, traced: Trace, located, retained, before_retained, on_step) -> Predictions:
        layers = self.steered(located)
        size = len(traced.predictions.right)
        if retained:
            # retained tokens come behind those of the rows; they are watched in every forward once one has broken
            retained = [replace(batch, slots=batch.slots + size) for batch in retained]
            traced.predictions = Predictions.join(traced.predictions, before_retained)
        before = Predictions.join(traced.predictions)
        task = Task.of(traced.medium, before, self.args.margin)
        watched, unwatched = list(batches), list(retained)

        def look() -> tuple[Predictions, float]:
            return forward_backward(
                self.base, watched, task, self.replay, team=self.team, elsewhere=before, backward=False
            )

        def retrace(slots: torch.Tensor) -> Trace:
            return trace(
                self.base,
                watched,
                {name: ffn for name, ffn in self.ffns().items() if name in located},
                self.decoder_layers,
                only_slots=slots,
                also_slots=slots,
                elsewhere=before,
                keep_sequences=False,
                with_contexts=self.with_contexts,
                replay=self.replay,
                team=self.team,
            )

        def elsewhere(now: Predictions) -> None:
            for batch in self.team.share(unwatched):
                now.read(batch, completion_logits(self.base, batch))
            self.team.join(now, unwatched)
            for batch in list(unwatched):
                if task.broken(now)[batch.slots.cpu()].any():
                    unwatched.remove(batch)
                    watched.append(batch)

        with self.journal.phase("patch", self.args.max_steps):
            predictions = steer_neurons(
                layers,
                traced,
                task,
                look,
                retrace,
                lambda found, layer: self.semantics(found, layer.name),
                learning_rate=self.args.learning_rate,
                max_steps=self.args.max_steps,
                ridge=self.args.ridge,
                generalization=self.args.generalization,
                elsewhere=torch.no_grad()(elsewhere),
                on_step=on_step,
            )
        return predictions.head(size)

    def _patch_prior_guided(self, batches, traced: Trace, located, retained, before_retained, on_step) -> Predictions:
        gradients = self.solve(traced, located)
        deltas = [self.layer(name).star_delta[self.adapter] for name in self.patched()]
        for delta in deltas:
            delta.requires_grad_(True)
        try:
            with self.journal.phase("patch", self.args.max_steps):
                return patch_neurons(
                    self.base,
                    batches,
                    deltas,
                    gradients,
                    traced.medium,
                    traced.predictions,
                    learning_rate=self.args.learning_rate,
                    damping=self.args.damping,
                    growth=self.args.growth,
                    max_steps=self.args.max_steps,
                    margin=self.args.margin,
                    replay=self.replay,
                    team=self.team,
                    retain=partial(self._harmed, retained, before_retained) if retained else None,
                    on_step=on_step,
                )
        finally:
            for delta in deltas:
                delta.requires_grad_(False)

    # the modes

    def _single(self, rows: Sequence[Row], before: Predictions, retained, before_retained) -> None:
        """One failure after the other, each with a prior of its own; failures that broke again come up again."""
        state = self.journal.state
        # made once, so that what is replayed of a row serves all of its failures
        batches_of = {row.index: make_batches([row], self.args.max_batch_tokens, self.device) for row in rows}
        all_batches = make_batches(rows, self.team.limit(self.args.max_batch_tokens, rows), self.device)
        for _ in range(self.args.max_rounds):
            solved_at_start = state.num_solved
            for row, start in zip(rows, completion_offsets(rows)):
                batches = batches_of[row.index]
                right = before.right[start : start + len(row.completion_ids)]
                for position in (~right).nonzero()[:, 0].tolist():
                    only = torch.tensor([position])
                    traced = self.trace(batches, only)
                    if not traced.medium.numel():
                        continue
                    self.patch(batches, traced, retained, before_retained)
            now = teacher_forced(self.base, all_batches, team=self.team)
            state.num_solved = int(now.right[~before.right].sum())
            if now.right.all() or state.num_solved <= solved_at_start:
                break

    def run(self, rows: list[Row], retained: list[Row]) -> RepairReport:
        args, state = self.args, self.journal.state
        row_batches, retain_batches = self.batches(rows), self.batches(retained)
        interrupted = traced = after = None
        self.journal.call("on_repair_begin")
        with self.frozen():
            if args.mode == "multiple":
                # the trace's forward says what fails, too
                traced = self.trace(row_batches)
                before = _Before(Predictions.join(traced.predictions), None)
            else:
                with self.journal.phase("failures", self.team.rows(row_batches)):
                    before = _Before(self.teacher_forced(row_batches), None)
            self._before(before, rows, retained, retain_batches)
            state.num_failures = int((~before.rows.right).sum())
            try:
                if state.num_failures and traced is not None:
                    after = self.patch(row_batches, traced, retain_batches, before.retained)
                elif state.num_failures:
                    self._single(rows, before.rows, retain_batches, before.retained)
            except KeyboardInterrupt as error:
                # several processes do not stop at the same place, so they cannot go on together
                if self.team.size > 1:
                    raise
                interrupted = error
            self.config.base_fingerprint = fingerprint(self.base)
            report = self._report(rows, retained, row_batches, retain_batches, before, after, interrupted is not None)
        remember_report(self.model, self.adapter, report)
        self.journal.call("on_repair_end")
        if interrupted is not None:
            raise RepairInterrupted(report) from interrupted
        return report

    def _before(self, before: _Before, rows, retained, retain_batches) -> None:
        if retained:
            with self.journal.phase("failures", self.team.rows(retain_batches)):
                before.retained = self.teacher_forced(retain_batches)
        if self.args.verify_generation:
            with self.journal.phase("verify", len(self.team.share_rows([*rows, *retained]))):
                before.generated = self._generate(rows, retained)

    def _generate(self, rows, retained) -> dict[str, list[tuple[int, ...]]]:
        def run(rows: Sequence[Row]) -> list[tuple[int, ...]]:
            own = self.team.share_rows(rows)
            limit = self.team.limit(self.args.max_batch_tokens, rows)
            new = generate(self.base, self.tokenizer, own, limit, self.journal.advance)
            pairs = self.team.gather({row.index: tokens for row, tokens in zip(own, new)})
            found = {index: tokens for part in pairs for index, tokens in part.items()}
            return [found[row.index] for row in rows]

        return {"failures": run(rows), "retain": run(retained) if retained else []}

    def _harmed(self, batches: Sequence[Batch], before: Predictions) -> list[tuple[Batch, torch.Tensor]]:
        """Retained batches with the mask (N) of tokens that were right and are wrong now."""
        now = teacher_forced(self.base, batches, team=self.team)
        return [(batch, (before.right & ~now.right)[batch.slots.cpu()]) for batch in batches]

    # the report

    def _report(
        self,
        rows,
        retained,
        row_batches,
        retain_batches,
        before: _Before,
        after: Predictions | None,
        interrupted: bool,
    ) -> RepairReport:
        with self.journal.phase("verify", len(self.team.share_rows([*rows, *retained]))):
            # the last forward of `multiple` mode was of these very rows with the state that was kept
            after = teacher_forced(self.base, row_batches, team=self.team) if after is None else after
            after_retained = teacher_forced(self.base, retain_batches, team=self.team) if retained else None
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
