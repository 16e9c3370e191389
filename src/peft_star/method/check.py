"""A regression suite for a patched model: what its ledger holds is run again, and held against what it was then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..engine.batch import completion_offsets
from ..engine.distributed import Team
from ..engine.engine import Engine
from ..engine.passes import generate, predict
from ..engine.predictions import Predictions
from ..failures import Row
from ..report import CONTEXT_CHARACTERS, code
from ..sharing.entries import SOURCES, Entry, LedgerRow
from ..sharing.ledger import Ledger
from .arguments import RepairArguments
from .subject import Subject


@dataclass(frozen=True)
class CheckedRow:
    """One row of a ledger, after its repair and now.

    Attributes:
        entry: The entry's id.
        source: "failures", "retain" or "related".
        prompt, completion: Its texts.
        wrong_after, wrong_now: The completion's tokens, by number, that were wrong after the repair, and that are now.
        generated_after, generated_now: Whether greedy generation gave the completion (None: not looked at).
        said: What the model says now in the place of the first wrong token; "" where none is wrong.
    """

    entry: str
    source: str
    prompt: str
    completion: str
    wrong_after: list[int]
    wrong_now: list[int]
    generated_after: bool | None = None
    generated_now: bool | None = None
    said: str = ""

    @property
    def regressed(self) -> bool:
        """Whether a token that was right after the repair is wrong now, or the row is no longer generated right."""
        lost = not set(self.wrong_now) <= set(self.wrong_after)
        return lost or bool(self.generated_after) and self.generated_now is False


@dataclass(frozen=True)
class CheckReport:
    """What [`check`] returns.

    Attributes:
        rows: Every row that was run.
        entries: The ids of the entries that they belong to.
        unchecked: The ids of entries that keep no rows.
    """

    rows: list[CheckedRow]
    entries: list[str]
    unchecked: list[str] = field(default_factory=list)

    @property
    def regressed(self) -> list[CheckedRow]:
        return [row for row in self.rows if row.regressed]

    @property
    def ok(self) -> bool:
        return not self.regressed

    def summary(self) -> dict[str, Any]:
        """How many rows of each kind were run, and how many of them regressed."""
        counts: dict[str, Any] = {"ok": self.ok, "entries": len(self.entries), "unchecked": len(self.unchecked)}
        for source in SOURCES:
            rows = [row for row in self.rows if row.source == source]
            counts[source] = len(rows)
            counts[f"{source}_regressed"] = sum(row.regressed for row in rows)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        rows = [{**asdict(row), "regressed": row.regressed} for row in self.rows]
        return {"summary": self.summary(), "rows": rows, "entries": self.entries, "unchecked": self.unchecked}

    def to_markdown(self, max_rows: int = 50) -> str:
        """The totals, and a table of what regressed."""
        figures = self.summary()
        kinds = ", ".join(f"{figures[f'{kind}_regressed']} of {figures[kind]} {kind}" for kind in SOURCES)
        lines = [f"**{len(self.regressed)} of {len(self.rows)} rows regressed** ({kinds}).", ""]
        if self.regressed:
            lines += ["| entry | rows | prompt | completion | now says |", "| --- | --- | --- | --- | --- |"]
            for row in self.regressed[:max_rows]:
                texts = map(code, (row.prompt[-CONTEXT_CHARACTERS:], row.completion, row.said))
                lines.append(f"| {row.entry} | {row.source} | {' | '.join(texts)} |")
        return "\n".join(lines)


def check(
    model,
    tokenizer,
    *,
    entries: Sequence[str] | None = None,
    generation: bool = True,
    max_batch_tokens: int = RepairArguments.max_batch_tokens,
    allow_other_base: bool = False,
) -> CheckReport:
    """Run all rows of the patch's ledger again: failures, retained and related ones.

    A row has regressed when a token of it that was right after its repair is wrong now, or greedy generation no longer
    gives its completion. Of rows with the same prompt those of the last repair count; entries that were taken out do
    not.

    Args:
        model: A `PeftModel` with a STAR adapter that was loaded with its ledger.
        tokenizer: Its tokenizer.
        entries: The ids of the entries to check; None: all that stand.
        generation: Whether to generate the rows that were generated at their repair, or to check tokens only.
        max_batch_tokens: Tokens (padding included) of one forward.
        allow_other_base: Check the patch on other weights than those that it was solved for.

    Raises:
        TypeError: `model` is not a PEFT model with a STAR adapter.
        ValueError: The model does not fit, the patch has no ledger, or it has no such entry.
    """
    args = RepairArguments(max_batch_tokens=max_batch_tokens, allow_other_base=allow_other_base, disable_tqdm=True)
    subject = Subject.of(model, tokenizer, args)
    ledger = ledger_of(subject)
    chosen = ledger.standing if entries is None else [ledger.find(name) for name in entries]
    ids = {entry.id for entry in chosen}
    rows = [(entry, row) for entry, row in ledger.standing_rows(*SOURCES) if entry.id in ids]
    unchecked = [entry.id for entry in chosen if not entry.rows]
    checked = look_again(subject, rows, args, generation)
    return CheckReport(checked, [entry.id for entry in chosen if entry.rows], unchecked)


def ledger_of(subject: Subject) -> Ledger:
    """The ledger of the adapter.

    Raises:
        ValueError: It has none, or was loaded without.
    """
    ledger = subject.config.ledger
    if not ledger:
        raise ValueError(
            "The patch has no ledger with entries: it was made before there were ledgers, or loaded without its "
            "repair_ledger.json."
        )
    return ledger


def look_again(
    subject: Subject, rows: Sequence[tuple[Entry, LedgerRow]], args: RepairArguments, generation: bool
) -> list[CheckedRow]:
    """What the model says now at rows of its ledger, in their order."""
    if not rows:
        return []
    encoded = subject.encode([row.row for _, row in rows], "ledger's row")
    with subject.frozen():
        engine = Engine(subject.base, args.max_batch_tokens, Team(subject.base))
        starts = completion_offsets(encoded)
        now = predict(engine, engine.batches(encoded), Predictions.empty(starts[-1]))
        again = [row for row, (_, then) in zip(encoded, rows) if generation and then.generated_after is not None]
        texts = generate(engine, subject.tokenizer, again) if again else []
    generated = {row.index: text == row.completion_ids for row, text in zip(again, texts)}
    return [
        _checked(entry, then, row, now[slice(start, end)], generated.get(row.index), subject.tokenizer)
        for (entry, then), row, start, end in zip(rows, encoded, starts, starts[1:])
    ]


def _checked(
    entry: Entry, then: LedgerRow, row: Row, now: Predictions, generated: bool | None, tokenizer
) -> CheckedRow:
    wrong = (~now.right).nonzero()[:, 0].tolist()
    said = tokenizer.decode([int(now.argmax[wrong[0]])]) if wrong else ""
    after = then.wrong_after, wrong, then.generated_after, generated
    return CheckedRow(entry.id, then.source, row.prompt, row.completion, *after, said)
