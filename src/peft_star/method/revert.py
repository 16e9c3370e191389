"""Takes one repair out of a patch and leaves the others solved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..models.names import plain_name
from ..sharing.changes import Changes, subtract
from ..sharing.entries import Entry
from ..sharing.ledger import Ledger
from .arguments import RepairArguments
from .check import CheckedRow, CheckReport, check, ledger_of, look_again
from .history import deltas_of
from .repair import repair
from .subject import Subject

# how often entries are solved again that the last round broke
ROUNDS = 3


@dataclass(frozen=True)
class RevertReport:
    """What [`revert`] returns.

    Attributes:
        entry: The id of the entry that was taken out.
        failures, fail_again: Its tokens that failed before it, and those of them that are wrong again.
        broken: Rows of other entries that were wrong without it.
        solved_again: The ids of the entries that were solved again for that.
        check: What the other entries' rows are now.
    """

    entry: str
    failures: int
    fail_again: int
    broken: int
    solved_again: list[str]
    check: CheckReport

    @property
    def ok(self) -> bool:
        """Whether the other entries' failures and retained rows are all as they were after their repairs."""
        return not _held(self.check)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        data = {key: value for key, value in asdict(self).items() if key != "check"}
        return {**data, "ok": self.ok, "check": self.check.to_dict()}


def revert(model, tokenizer, entry: str, args: RepairArguments | None = None) -> RevertReport:
    """Take one repair out of the model's patch and leave the others solved.

    What the repair changed in the deltas is taken off, exactly. Repairs are not independent of each other, so the rows
    of the other entries are looked at then, and entries with rows that broke are solved again; what this changes
    belongs to those entries from then on. The ledger keeps the entry, marked as taken out.

    Args:
        model: A `PeftModel` with a STAR adapter that was loaded with its ledger.
        tokenizer: Its tokenizer.
        entry: The entry's id, the beginning of it, or its number in the log.
        args: How entries are solved again; by default with the settings that each was solved with.

    Raises:
        TypeError: `model` is not a PEFT model with a STAR adapter.
        ValueError: The model does not fit, the patch has no ledger, or there is no such entry that stands.
    """
    own = args or RepairArguments(disable_tqdm=True)
    subject = Subject.of(model, tokenizer, own)
    ledger = ledger_of(subject)
    taken = ledger.find(entry)
    subject.config.ledger = left = ledger.revert(taken)
    set_deltas(subject, subtract(deltas_of(subject), taken.changes(), left.kept_neurons()))

    again: list[str] = []
    found = check(model, tokenizer, generation=False, allow_other_base=own.allow_other_base)
    broken = len(_held(found))
    for _ in range(ROUNDS):
        names = list(dict.fromkeys(row.entry for row in _held(found)))
        for name in names:
            _solve_again(model, tokenizer, subject, name, args)
        again += [name for name in names if name not in again]
        if not names:
            break
        found = check(model, tokenizer, generation=False, allow_other_base=own.allow_other_base)
    wrong = look_again(subject, [(taken, row) for row in taken.rows_of("failures")], own, False)
    before = [set(row.wrong_before) for row in taken.rows_of("failures")]
    fail_again = sum(len(was & set(now.wrong_now)) for was, now in zip(before, wrong))
    found = check(model, tokenizer, allow_other_base=own.allow_other_base)
    subject.config.repaired = None  # what solving again has reported tells of a part of the patch
    return RevertReport(taken.id, sum(map(len, before)), fail_again, broken, again, found)


def set_deltas(subject: Subject, deltas: Changes) -> None:
    """Let the adapter hold just these neurons (k) and deltas (k, d), by plain module name."""
    names = {plain_name(name): name for name, _ in subject.base.named_modules()}
    subject.model.base_model.retarget(subject.adapter, {names[name]: part[0] for name, part in deltas.items()})
    layers = subject.layers()
    for name, (neurons, delta) in deltas.items():
        layers[names[name]].set_neurons(subject.adapter, neurons, delta)


def _held(found: CheckReport) -> list[CheckedRow]:
    """The regressed rows that a repair solves or holds; related ones are only looked at."""
    return [row for row in found.regressed if row.source != "related"]


def _solve_again(model, tokenizer, subject: Subject, name: str, args: RepairArguments | None) -> None:
    """Solve an entry's broken rows again, and let it have what that changes."""
    ledger = ledger_of(subject)
    entry = ledger.find(name)
    rows = [pair for pair in ledger.standing_rows("failures", "retain") if pair[0].id == name]
    args = args or _settings(entry)
    now = look_again(subject, rows, args, False)
    wrong = [row.row for (_, row), seen in zip(rows, now) if seen.regressed]
    if not wrong:
        return
    repair(model, tokenizer, wrong, args)
    *others, solved = ledger_of(subject).entries
    subject.config.ledger = Ledger(tuple(others)).replaced(entry.amend(solved.changes(), deltas_of(subject)))


def _settings(entry: Entry) -> RepairArguments:
    """The settings of an entry's repair, as far as this version knows them."""
    known = {item.name for item in fields(RepairArguments)}
    values = {name: value for name, value in entry.arguments.items() if name in known}
    values |= {"keep_earlier": True, "verify_generation": False, "disable_tqdm": True}
    try:
        return RepairArguments(**values)
    except TypeError as error:
        raise ValueError(f"The settings of entry {entry.id} cannot be used: {error}") from error
