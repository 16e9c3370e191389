"""Finds what a failure is about where its row does not say: one span of the prompt, or none (not in the paper).

Two things tell such a span. Its words are hard to foresee: they carry what this prompt has and others have not. And
the test of grammars, substitution: with a plain word of its kind in its place ("it", a name), the text behind it stays
as likely as it was, which it does not where the span cuts a name in two or takes a word along that asks the question.
The best span is a focus only if it is clearly one, and if another one in its place changes what is said where the row
fails. A few short forwards tell all of this; nothing is trained, and what the row should say is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..engine.batch import completion_offsets, make_batches
from ..engine.distributed import ALONE
from ..engine.engine import Engine
from ..engine.passes import completion_logits
from ..failures import Row
from ..models.inputs import context_length, input_device
from .namesakes import put_in_place
from .objective import Goal
from .subject import Run

# what stands for any span: a text of its kind, so that one of them has to fit
FORMS = ("it", "John Smith")
# surprisal (nats) of a word that tells nothing by itself: more speaks for a span, less against it
USUAL = 7.0
# a name ends with a capital or a number (nats for it, or against what has a capital and does not end with one)
CAPITALS = 4.0
# words of a span, and the most surprising spans, which are all that is tried
WORDS, TRIED = 6, 4
# tokens behind a span that have to stay likely
BEHIND = 12
# a longer prompt, in tokens, is about many things, and takes long to read
LONGEST = 256
# what a focus must reach: nats in its favour, and the divergence (nats) of what is said where the row fails
CLEAR, FELT = 10.0, 0.1

_WORD = re.compile(r"\w+|[^\w\s]|\n")


@dataclass(frozen=True)
class Word:
    """A word, a mark or a line's end: its text, and its first and last token."""

    text: str
    first: int
    last: int

    @property
    def ends(self) -> bool:
        """Whether a span may begin and end with it."""
        return self.text[0] == "_" or self.text[0].isalnum()

    @property
    def capital(self) -> bool:
        return self.text[0].isupper() or self.text[0].isdigit()


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `last` of a row, and what speaks for them as its focus, in nats."""

    first: int
    last: int
    clear: float


def wanted(run: Run) -> bool:
    """Whether this repair looks for a focus where rows name none."""
    return run.args.reach == "problem" and run.args.mode == "multiple"


def with_found_focus(run: Run, goal: Goal, rows: Sequence[Row]) -> list[Row]:
    """The rows, those that fail and name no focus with the one that was found, if one was.

    Args:
        run: What every stage is given.
        goal: The failures, over the rows' slots.
        rows: The failures' rows.

    Returns:
        `list[Row]`
    """
    failing, engine, done = goal.task.medium.tolist(), replace(run.engine, team=ALONE), []
    with run.journal.phase("locate", len(rows)):
        for row, start in zip(rows, completion_offsets(rows)):
            wrong = failing[start : start + len(row.completion_ids)]
            if any(wrong) and not row.focus:
                found = find_focus(engine, run.subject.tokenizer, row, wrong.index(True))
                if found is not None:
                    row = replace(row, focus=(found.last,), focus_starts=(found.first,))
            done.append(row)
            run.journal.advance()
    return done


def find_focus(engine: Engine, tokenizer, row: Row, wrong: int = 0) -> Span | None:
    """The span of a row's prompt that its failure is about.

    Args:
        engine: Its model reads the prompt.
        tokenizer: The model's; one that cannot tell where its tokens stand in the text finds nothing.
        row: The row.
        wrong: Which token of the completion is said wrong.

    Returns:
        [`Span`], or None where no span is clearly what the prompt is about, or what is said does not depend on it.
    """
    if len(row) > min(LONGEST, (context_length(engine.model) or LONGEST) - WORDS):
        return None
    words = last_line(prompt_words(row, tokenizer))
    if not words:
        return None
    asked = _Asked.of(engine, tokenizer, row, wrong)
    if not asked.surprisal:
        return None
    # substitution decides between spans; it is not to make one of what anybody would have foreseen
    spans = [span for span in _spans(words, asked.surprisal) if span.clear >= CLEAR]
    spans = sorted(spans, key=lambda span: span.clear, reverse=True)[:TRIED]
    if not spans:
        return None
    gains = asked.gains(spans)
    best = max((replace(span, clear=span.clear + gain) for span, gain in zip(spans, gains)), key=lambda s: s.clear)
    return best if best.clear >= CLEAR and asked.felt(best) >= FELT else None


def prompt_words(row: Row, tokenizer) -> list[Word]:
    """The words of a prompt, in order; of a chat, those of the last message that has a few."""
    if not getattr(tokenizer, "is_fast", False):
        return []
    ids = list(row.prompt_ids)
    for special in (True, False):  # a chat's special tokens are in its text already
        encoded = tokenizer(row.prompt, add_special_tokens=special, return_offsets_mapping=True)
        if encoded["input_ids"][: len(ids)] == ids:
            break
    else:
        return []
    offsets, marks = encoded["offset_mapping"], set(tokenizer.all_special_ids)
    words: list[Word] = []
    groups: list[list[Word]] = [words]
    token = 0
    for match in _WORD.finditer(row.prompt):
        start, end = match.span()
        while token < len(ids) and min(offsets[token][1], end) <= max(offsets[token][0], start):
            token += 1
        first = last = token
        while last + 1 < len(ids) and offsets[last + 1][0] < end:
            last += 1
        if first >= len(ids):
            break
        if ids[first] in marks:
            if groups[-1]:
                groups.append([])
            token = first
            continue
        token = last
        groups[-1].append(Word(match.group(), first, last))
    full = [group for group in groups if sum(word.ends for word in group) > 2]
    return (full or groups)[-1]


def last_line(words: Sequence[Word]) -> list[Word]:
    """The words behind the last line's end. In a prompt of several lines, code most of all, what is hard to foresee
    stands in any of them, and a push there answers to much that is said; so only a sentence that the model is to go on
    with, or is asked, is searched."""
    ends = [number for number, word in enumerate(words) if word.text == "\n"]
    return list(words[ends[-1] + 1 :] if ends else words)


def _spans(words: Sequence[Word], surprisal: Sequence[float]) -> Iterator[Span]:
    """Spans of a few words within a line, with what the words themselves say; they end in front of the last token, at
    which a failure is pushed anyway."""
    opens = True
    for i, begin in enumerate(words):
        # marks may stand before the first word of a line
        opens = i == 0 or words[i - 1].text == "\n" or opens and not words[i - 1].ends
        # a word that shares its token with the one before it cannot be replaced
        if not begin.ends or i and words[i - 1].last >= begin.first:
            continue
        for j, end in enumerate(words[i : i + WORDS], start=i):
            if end.text == "\n" or j + 1 == len(words):
                break
            if end.ends and words[j + 1].first > end.last:
                total = sum(surprisal[begin.first : end.last + 1]) - USUAL * (j + 1 - i)
                yield Span(begin.first, end.last, total + _capitals(words[i : j + 1], opens))


def _capitals(words: Sequence[Word], opens: bool) -> float:
    """What capitals say of words as a name; `opens`: they open a line, where any word may have one."""
    if words[-1].capital:
        return 0.0 if opens and len(words) == 1 else CAPITALS
    return -CAPITALS if any(word.capital for word in words) else 0.0


@dataclass(frozen=True)
class _Asked:
    """A row that was asked once: its tokens up to the failure behind a `front`, their surprisal (nats), and the
    log-probabilities (V) of what is said then."""

    engine: Engine
    tokenizer: object
    front: tuple[int, ...]
    ids: tuple[int, ...]
    surprisal: list[float]
    said: torch.Tensor

    @classmethod
    def of(cls, engine: Engine, tokenizer, row: Row, wrong: int) -> _Asked:
        ids = row.input_ids[: len(row.prompt_ids) + wrong]
        # the first token is foreseen from the end of another text
        ends = [] if ids[0] in tokenizer.all_special_ids else [tokenizer.eos_token_id]
        front = tuple(token for token in ends if token is not None)
        skipped = 1 - len(front)
        begin = (*front, *ids)[:1]
        (log_p,), (said,) = _read(engine, [Row(0, "", "", begin, (*ids[skipped:], ids[-1]))])
        return cls(engine, tokenizer, front, ids, [0.0] * skipped + (-log_p[:-1]).tolist(), said)

    def _replaced(self, span: Span, form: str) -> tuple[int, ...]:
        """The tokens up to the span's end, with the form in its place."""
        return self.front + put_in_place(self.ids, span.first, form, self.tokenizer)

    def gains(self, spans: Sequence[Span]) -> list[float]:
        """By how much the tokens behind each span get likelier (nats) with the form that fits best in its place."""
        rows: list[Row] = []
        was = []
        for span in spans:
            behind = self.ids[span.last + 1 :][:BEHIND]
            for form in FORMS:
                rows.append(Row(len(rows), "", "", self._replaced(span, form), behind))
                was.append(-sum(self.surprisal[span.last + 1 :][:BEHIND]))
        log_p, _ = _read(self.engine, rows)
        gains = [float(now.sum()) - before for now, before in zip(log_p, was)]
        return [max(gains[i : i + len(FORMS)]) for i in range(0, len(gains), len(FORMS))]

    def felt(self, span: Span) -> float:
        """The divergence (nats) of what is said from what is said with another form in the span's place, at most."""
        rows = [
            Row(number, "", "", (*self._replaced(span, form), *self.ids[span.last + 1 :]), self.ids[-1:])
            for number, form in enumerate(FORMS)
        ]
        _, said = _read(self.engine, rows)
        return max(float((self.said.exp() * (self.said - now)).sum()) for now in said)


@torch.no_grad()
def _read(engine: Engine, rows: Sequence[Row]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probabilities of each row's completion tokens, and those of all tokens (V) at the last of them."""
    log_p: list = [None] * len(rows)
    last: list = [None] * len(rows)
    for batch in make_batches(rows, engine.max_batch_tokens, input_device(engine.model), engine.model):
        logits = completion_logits(engine.model, batch).float().log_softmax(-1).cpu()
        for row, part in zip(batch.items, logits.split([len(row.completion_ids) for row in batch.items])):
            log_p[row.index] = part[torch.arange(len(part)), torch.tensor(row.completion_ids)]
            last[row.index] = part[-1]
    return log_p, last
