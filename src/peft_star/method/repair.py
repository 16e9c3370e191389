"""Repair: failures → trace → locate → solve → patch → verify → report (paper section 3 and figure 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..engine.distributed import Team
from ..engine.engine import Engine
from ..engine.memory import halving
from ..engine.passes import predict
from ..engine.predictions import Predictions
from ..engine.replay import Replay
from ..failures import Row
from ..report import RepairReport
from ..row_checks import check_contradictions
from ..sharing.entries import SOURCES
from ..tuner.patches import remember_report
from . import find_focus, focused, prior_guided, protected
from .arguments import RepairArguments
from .best import keeping_best
from .callbacks import Journal, RepairCallback
from .gate import tell_of_echoes, within_limits
from .history import History, failing_activations, ledger_rows
from .holding import hold
from .locate import locate
from .objective import Goal
from .records import make_report
from .serving import Serving, arithmetics
from .subject import Run, Subject
from .trace import Trace, trace
from .unfinished import AdapterState, Keeper, Unfinished, key_of
from .verify import Case, Seen, look_after, look_at_related, look_before, verify


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
    related: Iterable[dict[str, Any]] | None = None,
    callbacks: Sequence[RepairCallback] | None = None,
    unfinished: Unfinished | None = None,
) -> RepairReport:
    """Find the failing tokens of `failures`, patch the neurons that cause them, and verify the patch.

    The model's active STAR adapter holds the patch afterwards; base weights are not touched. Deltas that the adapter
    had before are kept and built upon, and what earlier repairs of the patch have solved or retained must stay right:
    its ledger (`model.peft_config[adapter].ledger`) has their rows, and gets an entry for this one.

    Args:
        model: A `PeftModel` from `get_peft_model(base, StarConfig(...))` or `PeftModel.from_pretrained`.
        tokenizer: Its tokenizer.
        failures: Rows `{"prompt", "completion"}`, strings or lists of chat messages; a list or a `datasets.Dataset`.
            They may carry `focus` (a text span of the prompt, or a list of spans, that the problem is about),
            `problem` (a name), `end` (whether the model is to stop where the completion does) and `id` (what the row
            is called elsewhere), too.
        args: How to run; defaults to `RepairArguments()`.
        retain: Rows of the same form that must stay as they are; tokens of theirs that break join the loss.
        related: Rows of the same form that are only looked at, for the report to say how far the repair carries over.
        callbacks: [`RepairCallback`]s.
        unfinished: The file in which an [`Unfinished`] keeps what is done so far, and out of which it may go on.

    Returns:
        [`RepairReport`]

    Raises:
        TypeError: `model` is not a PEFT model with a STAR adapter.
        ValueError: A row, the configuration or the model does not fit; nothing has been changed.
        RepairInterrupted: Ctrl-C; the model holds the last finished state.
        MemoryError: Memory does not hold even a single row; the adapter is as it was.
    """
    args = args or RepairArguments()
    subject = Subject.of(model, tokenizer, args)
    rows, raw = _encode(subject, failures, retain, related)
    history = History.of(subject, args, raw)
    earlier = history.earlier()
    rows.append(subject.encode(earlier, "earlier repairs' row") if earlier else [])
    start = AdapterState.of(subject)

    def attempt(tokens: int) -> RepairReport:
        # what an earlier attempt has left is taken back: what failed before is seen without a patch
        if tokens < args.max_batch_tokens:
            start.put_back(subject)
        return _repair(subject, replace(args, max_batch_tokens=tokens), callbacks, rows, unfinished, start, history)

    try:
        return halving(attempt, args.max_batch_tokens, max(len(row) for part in rows for row in part))
    except MemoryError:
        start.put_back(subject)
        raise


def _repair(
    subject: Subject,
    args: RepairArguments,
    callbacks: Sequence[RepairCallback] | None,
    given: Sequence[list[Row]],
    unfinished: Unfinished | None,
    start: AdapterState,
    history: History,
) -> RepairReport:
    """[`repair`] in batches that memory may not hold."""
    journal = Journal(args, callbacks)
    rows, retained, related, earlier = given
    interrupted = after = harm = None
    with _running(subject, args, journal, given) as run:
        case = Case.of(run.engine, rows, retained, related, earlier)
        before, traced = look_before(run, case)
        seen = look_at_related(run, case, before) if related else before
        if unfinished is not None:
            key = key_of(subject, args, given, start)
            run = replace(run, resumed=unfinished.put_back(subject, key, journal))
            journal.callbacks.append(Keeper(unfinished, subject, key, journal))
        try:
            after, harm = within_limits(run, case, before, traced, patched, start)
            tell_of_echoes(run, case, before, harm)
        except KeyboardInterrupt as error:
            # several processes do not stop at the same place, so they cannot go on together
            if run.engine.team.size > 1:
                raise
            interrupted = error
        subject.config.base_fingerprint = subject.fingerprint
        generate = args.verify_generation if not interrupted else False
        # what was seen last was seen in every arithmetic, and nothing has changed since
        seen_now = look_after(run, case, None) if after is None else after
        now = verify(run, case, seen_now, with_generation=bool(generate), behind=generate is not False)
        report = make_report(run, case, seen, now, harm, interrupted is not None)
        keys = {} if args.ledger_rows else failing_activations(run, case, seen)
    history.record(report, ledger_rows(case, history.given, seen, now) if args.ledger_rows else (), keys)
    remember_report(subject.model, subject.adapter, report)
    journal.call("on_repair_end")
    if interrupted is not None:
        raise RepairInterrupted(report) from interrupted
    return report


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
    subject, journal = Subject.of(model, tokenizer, args), Journal(args, ())
    (rows, _, _), _ = _encode(subject, failures)
    with _running(subject, args, journal, rows) as run:
        batches = run.engine.batches(rows)
        with journal.phase("trace", run.engine.team.rows(batches)):
            traced = trace(run.engine, batches, run.probe(), progress=journal.advance)
        if not len(traced.medium):
            raise ValueError("No token of these rows fails; there is nothing to solve.")
        prior_guided.solve(run, locate(run, traced), traced)
    deltas = {name: layer.star_delta[subject.adapter] for name, layer in subject.layers().items()}
    return {name: delta.star_prior for name, delta in deltas.items()}


def _encode(
    subject: Subject, failures: Any, retain: Any = None, related: Any = None
) -> tuple[list[list[Row]], dict[str, Any]]:
    """The failures, the retained and the related rows as tokens and as given, after a look whether they agree."""
    given: list[Any] = [
        rows if rows is None or isinstance(rows, (str, bytes, dict, list)) else list(rows)
        for rows in (failures, retain, related)
    ]
    names = ("failures row", "retain row", "related row")
    encoded = [
        subject.encode(rows, name) if rows or number == 0 else []
        for number, (rows, name) in enumerate(zip(given, names))
    ]
    check_contradictions(given[0], given[1] or ())
    return encoded, dict(zip(SOURCES, given))


@contextmanager
def _running(subject: Subject, args: RepairArguments, journal: Journal, rows: Any) -> Iterator[Run]:
    team = Team(subject.base)
    team.check_same(rows)
    journal.call("on_repair_begin")
    with subject.frozen():
        run = Run(Engine(subject.base, args.max_batch_tokens, team, _replay(subject)), subject, args, journal)
        yield replace(run, serving=_serving(run))


def _replay(subject: Subject) -> Replay:
    """Of what lies below the modules that may be patched."""
    lowest, changing = subject.lowest
    return Replay(subject.base, lowest, changing=changing)


def _serving(run: Run) -> Serving:
    """What the repair is to hold in; lower layers are replayed there as well."""
    wanted = arithmetics(run.subject.base, run.args.serve)
    replays = {name: _replay(run.subject) for name in wanted}
    return Serving({name: (how, replace(run.engine, replay=replays[name])) for name, how in wanted.items()})


def patched(run: Run, case: Case, before: Seen, traced: Trace | None) -> Seen:
    """Patch as the mode has it, and until it holds in what serves it; what is seen then."""
    after = MODES[run.args.mode](run, case, before, traced)
    return hold(run, case, before, look_after(run, case, after), patch_traced)


def together(run: Run, case: Case, before: Seen, traced: Trace) -> Predictions:
    """All failures with one prior (mode "multiple"); returns what the model says at their rows afterwards."""
    medium = case.failing(before.predictions, before.gaps)
    run.journal.state.num_failures = len(medium)
    if not len(medium):
        return before.predictions
    retained, margin = case.retained_batches, run.args.margin
    goal = Goal.of(traced.batches, retained, medium, traced.predictions, margin, before.gaps)
    now = push_the_focus(run, case, goal)
    if now is not None or not len(traced.medium):
        now = traced.predictions if now is None else now
        now, broken = goal.look_at_the_rest(run.engine, now)
        if goal.task.done(now):
            return now
        goal, at_stake = goal.watching(broken), goal.task.at_stake(now).nonzero()[:, 0]
        traced = trace(run.engine, goal.batches, run.probe(), at=at_stake, start=goal.before)
    return patch_traced(run, goal, traced)


def one_by_one(run: Run, case: Case, before: Seen, traced: None) -> Predictions:
    """Each failure with a prior of its own; those that a later patch undid come up again (mode "single")."""
    journal, now, engine = run.journal, before.predictions, run.engine
    own, gaps = case.parts["failures"][1], before.gaps
    medium = case.failing(now, gaps)
    wrong = torch.zeros_like(now.right[own])
    wrong[medium] = True
    journal.state.num_failures = len(medium)
    batches = case.one_row_each()
    if wrong.any():
        goal = Goal.of(case.batches, case.retained_batches, medium, before.predictions, run.args.margin, gaps)
        push_the_focus(run, case, goal)
    for _ in range(run.args.max_rounds if wrong.any() else 0):
        solved_at_start = journal.state.num_solved
        for batch in batches:
            slots = batch.slots.cpu()
            for slot in slots[wrong[slots]].split(1):
                with journal.phase("trace", engine.team.rows([batch])):
                    start, thin = before.predictions, None if gaps is None else lambda here, at: here.gap < gaps[at]
                    found = trace(
                        engine, [batch], run.probe(), only=slot, thin=thin, start=start, progress=journal.advance
                    )
                if len(found.medium):  # an earlier patch may have solved it along with its own failure
                    retained = case.retained_batches
                    goal = Goal.of([batch], retained, found.medium, found.predictions, run.args.margin, gaps)
                    patch_traced(run, goal, found)
        now = predict(engine, case.batches, before.predictions.copy())
        solved = now.right[own] if gaps is None else now.right[own] & (now.gap[own] >= gaps[own])
        journal.state.num_solved = int((wrong & solved).sum())
        if (solved | now.right[own] & ~wrong).all() or journal.state.num_solved <= solved_at_start:
            break
    return now


def push_the_focus(run: Run, case: Case, goal: Goal) -> Predictions | None:
    """Push rows at their focus, as they name it or as it is found, before what is left is pushed where it fails.

    Returns:
        The predictions (S) at the failures' rows, where something was changed.
    """
    if run.resumed:
        # it was done before, and what was recorded of the layers below is no longer so
        run.forget()
        return goal.look(run.engine)[0]
    if run.args.algorithm != "protected":
        return None
    rows = find_focus.with_found_focus(run, goal, case.rows) if find_focus.wanted(run) else case.rows
    if not any(row.focus for row in rows):
        return None
    how = {row.index: "focus" if given.focus else "found focus" for row, given in zip(rows, case.rows)}
    now = focused.patch(run, goal, rows, case.held, how)
    if now is not None:
        # what was recorded of the layers below is no longer so
        run.forget()
    return now


def patch_traced(run: Run, goal: Goal, traced: Trace) -> Predictions:
    """The paper's three operations on what one trace found: locate, solve, patch.

    Returns:
        [`Predictions`] (S) of the state that was kept, at the goal's rows.
    """
    journal, algorithm = run.journal, ALGORITHMS[run.args.algorithm]
    located = locate(run, traced)
    layers, solved = algorithm.solve(run, located, traced, goal.unwatched)
    # of this goal's failures a push at the focus may have solved some
    journal.solved_before = journal.state.num_solved - goal.task.num_solved(traced.predictions)
    deltas = [layer.delta for layer in layers]
    with journal.phase("patch", run.args.max_steps), keeping_best(deltas, goal.task, goal.before, journal) as best:
        algorithm.patch(run, goal, layers, solved, traced, best)
    journal.state.num_solved = journal.solved_before + int(best.predictions.right[goal.task.medium].sum())
    return best.predictions


ALGORITHMS = {"protected": protected, "prior-guided": prior_guided}
MODES: dict[str, Callable[..., Predictions]] = {"multiple": together, "single": one_by_one}
