"""A patch's history: what earlier repairs ask of the next one, and the next one's entry in the ledger."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..engine.passes import completion_logits
from ..engine.recording import recording_inputs
from ..models.names import plain_name
from ..report import RepairReport
from ..row_checks import COLUMNS
from ..sharing.changes import Changes, difference, norm
from ..sharing.entries import OUTSIDE, REPAIR, SOURCES, Entry, LedgerRow, size_of
from ..sharing.governor import warnings_of
from ..sharing.ledger import Ledger
from .arguments import RepairArguments
from .subject import Run, Subject
from .verify import Case, Seen

# by how much the deltas of a patch may differ from the sum of its entries, relative to their norm
SAME = 1e-4
# of an earlier failing token's activations, beside the mean over the background: nobody will look whether it holds
WEIGHT = 100.0
# settings of the configuration that say what a repair was allowed to touch
CONFIG = ("layer_selection", "num_layers", "neuron_pattern")
# they say nothing of a repair
LEFT_OUT = ("disable_tqdm", "note")


def deltas_of(subject: Subject) -> Changes:
    """Copies of the adapter's neurons (k), ascending, and deltas (k, d) as they are, by plain module name."""
    found = {}
    for name, layer in subject.layers().items():
        neurons, order = layer.star_neurons[subject.adapter].cpu().long().sort()
        found[plain_name(name)] = neurons, layer.star_delta[subject.adapter].detach().cpu().float()[order]
    return found


@dataclass
class History:
    """The ledger of the adapter at the start of a repair, and the deltas from which it starts.

    Attributes:
        subject: What is patched.
        args: The settings of the repair.
        ledger: The earlier repairs.
        start: Deltas by module.
        given: By source the rows as they were given.
    """

    subject: Subject
    args: RepairArguments
    ledger: Ledger
    start: Changes
    given: Mapping[str, Any]

    @classmethod
    def of(cls, subject: Subject, args: RepairArguments, given: Mapping[str, Any] | None = None) -> History:
        config = subject.config
        if config.ledger is None and config.ledger_sha256:
            warnings.warn(
                "The patch has a ledger that was not loaded with it, so its earlier repairs are not held; load it by "
                "PeftModel.from_pretrained or peft_star.loading.load_patch from where its ledger lies.",
                stacklevel=3,
            )
        history = cls(subject, args, config.ledger or Ledger(), deltas_of(subject), given or {})
        change = difference(history.start, history.ledger.total())
        if norm(change) > SAME * norm(history.start):
            # before this package kept ledgers, or by hand
            entry = Entry.of(change, behind=history.start, kind=OUTSIDE, patch=size_of(history.start, change))
            history.ledger = history.ledger.with_entry(entry)
        return history

    def earlier(self) -> list[dict[str, Any]]:
        """Rows of earlier repairs that are to stay as they are: their failures and what they retained, unless a row
        with the same prompt is given now."""
        if not self.args.keep_earlier:
            return []
        prompts = [row["prompt"] for name in ("failures", "retain") for row in self.given.get(name) or ()]
        found = []
        for _, row in self.ledger.standing_rows("failures", "retain"):
            if row.row["prompt"] not in prompts:
                prompts.append(row.row["prompt"])
                found.append(row.row)
        return found

    def record(
        self, report: RepairReport, rows: Sequence[LedgerRow], keys: Mapping[str, torch.Tensor]
    ) -> Entry | None:
        """Enter what has been done since the start, if anything failed then, and let the report warn of where the
        patch is heading."""
        now = deltas_of(self.subject)
        change = difference(now, self.start)
        if not change and not report.failures:
            return None
        config = self.subject.config
        defaults = RepairArguments()
        settings = {item.name: getattr(self.args, item.name) for item in fields(self.args)}
        entry = Entry.of(
            change,
            keys,
            now,
            kind=REPAIR,
            note=self.args.note,
            rows=list(rows),
            summary=report.summary(),
            harm=_figures(getattr(report, "harm", None)),
            patch=size_of(now, change),
            arguments={
                name: value
                for name, value in settings.items()
                if name not in LEFT_OUT and value != getattr(defaults, name)
            },
            config={"num_neurons": self.subject.num_neurons, **{name: getattr(config, name) for name in CONFIG}},
            base_fingerprint=config.base_fingerprint or "",
            versions=dict(report.versions),
        )
        config.ledger = ledger = self.ledger.with_entry(entry)
        report.entry = entry.id
        report.warnings += warnings_of(ledger)
        return entry


def _figures(harm: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers among the measures of harm."""
    numbers = {name: value for name, value in (harm or {}).items() if isinstance(value, (int, float))}
    return {name: float(value) for name, value in numbers.items() if not isinstance(value, bool)}


def earlier_keys(run: Run) -> dict[str, torch.Tensor]:
    """By module the activations (n, m) at failing tokens of earlier repairs that kept no rows, for the second moment
    of what is to stay undisturbed: each of the n counts `WEIGHT` times as much as the mean of the background."""
    ledger, team = run.subject.config.ledger, run.engine.team
    parts: dict[str, list[torch.Tensor]] = {}
    for entry in ledger.standing if ledger is not None and run.args.keep_earlier else []:
        for name, part in entry.keys().items():
            parts.setdefault(name, []).append(part.float())
    joined = {name: torch.cat(found) for name, found in parts.items()}
    # processes add up what each of them holds, so one of them has the keys
    held = {name: part * (WEIGHT * len(part)) ** 0.5 for name, part in joined.items()}
    return {name: part[: len(part) if team.rank == 0 else 0] for name, part in held.items()}


def ledger_rows(
    case: Case, given: Mapping[str, Sequence[Mapping[str, Any]] | None], before: Seen, after: Seen
) -> list[LedgerRow]:
    """The rows of a repair for its entry.

    Args:
        case: The rows as tokens.
        given: By source the rows as they were given.
        before, after: What the model said.
    """
    found = []
    for source in SOURCES:
        encoded, slots = case.parts[source]
        was, now = (seen.predictions.right[slots] for seen in (before, after))
        generated = [seen.generated.get(source) for seen in (before, after)]
        start = 0
        for number, (row, raw) in enumerate(zip(encoded, given.get(source) or ())):
            part = slice(start, start := start + len(row.completion_ids))
            wrong_was, wrong_now = ((~right[part]).nonzero()[:, 0].tolist() for right in (was, now))
            # unless it was generated, the tokens tell
            wrong = (wrong_was, wrong_now)
            exact_was, exact_now = (
                not wrong_then if texts is None else texts[number] == row.completion_ids
                for texts, wrong_then in zip(generated, wrong)
            )
            plain = {key: value for key, value in raw.items() if value is not None or key in COLUMNS}
            found.append(LedgerRow(source, plain, len(row.completion_ids), wrong_was, wrong_now, exact_was, exact_now))
    return found


@torch.no_grad()
def failing_activations(run: Run, case: Case, before: Seen) -> dict[str, torch.Tensor]:
    """By module the activations (n, m) at the tokens that failed before, of all FFNs that a repair could patch."""
    failing = (~before.predictions.right[case.parts["failures"][1]]).nonzero()[:, 0]
    ffns, parts = run.subject.ffns(run.subject.decoder_of), []
    for batch in run.engine.team.share(case.batches):
        chosen = torch.isin(batch.slots.cpu(), failing)
        if chosen.any():
            with recording_inputs(ffns) as seen:
                completion_logits(run.engine.model, batch)
            rows, positions = batch.rows.cpu()[chosen], batch.positions.cpu()[chosen]
            values = {name: found[0].reshape(*batch.input_ids.shape, -1) for name, found in seen.items()}
            parts.append({plain_name(name): value.cpu()[rows, positions] for name, value in values.items()})
    parts = [part for found in run.engine.team.gather(parts) for part in found]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
