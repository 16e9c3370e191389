"""Whether a push at a focus answers to it: prompts with another name in its place, and with other text in front.

With another name the effect is to go away, behind other text it is to stay. Nothing of it is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from ..engine.engine import Engine
from ..engine.passes import teacher_forced
from ..failures import Row
from .namesakes import put_in_front, put_in_place, strangers

# other names that are tried in a focus's place, none of those that a push is kept from
NAMES = 4
# a push that answers to more than this share of them does not answer to the focus
MOST = 0.5


@dataclass(frozen=True)
class Verdict:
    """What a patch makes of a row's counterfactuals.

    Attributes:
        names: How many prompts have another name in the focus's place.
        taken: Those of them that say the completion now and did not before.
        fronts: How many have other text in front.
        kept: Those of them that say the completion.
    """

    names: int
    taken: int
    fronts: int
    kept: int

    @property
    def astray(self) -> bool:
        """Whether the push answers to other names, too."""
        return self.taken > MOST * self.names

    @property
    def bound(self) -> bool:
        """Whether it answers behind no other text."""
        return self.fronts > 0 and not self.kept


def look(
    engine: Engine,
    rows: Sequence[Row],
    tokenizer,
    fronts: Sequence[str],
    without: Callable[[], AbstractContextManager],
) -> dict[int, Verdict]:
    """Ask the patched model the counterfactuals of rows that have a focus.

    Args:
        engine: Its model is patched.
        rows: The rows.
        tokenizer: The model's tokenizer.
        fronts: Texts that are put in front.
        without: A context in which the model is as it was before.

    Returns:
        By the row's index its [`Verdict`].
    """
    others = strangers(rows, tokenizer)
    swapped = {row.index: list(_swapped(row, number, others, tokenizer)) for number, row in enumerate(rows)}
    behind = {
        row.index: [_unnamed(row, put_in_front(row.prompt_ids, text, tokenizer)) for text in fronts] for row in rows
    }
    said = _said(engine, [prompt for part in (*swapped.values(), *behind.values()) for prompt in part])
    taken = {prompt for part in swapped.values() for prompt in part if prompt in said}
    if taken:
        with without():
            taken -= _said(engine, list(taken))
    return {
        index: Verdict(len(names), len(taken.intersection(names)), len(fronts), len(said.intersection(behind[index])))
        for index, names in swapped.items()
    }


def _swapped(row: Row, number: int, others: Sequence[str], tokenizer) -> Iterator[Row]:
    """The row with other names in its focus's place."""
    for place in range(min(NAMES, len(others))):
        name, ids = others[(NAMES * number + place) % len(others)], row.prompt_ids
        for start, last in reversed(list(zip(row.focus_starts, row.focus))):
            ids = put_in_place(ids, start, name, tokenizer) + ids[last + 1 :]
        yield _unnamed(row, ids)


def _unnamed(row: Row, prompt_ids: tuple[int, ...]) -> Row:
    """The row with another prompt, in which no focus is named."""
    return replace(row, prompt_ids=prompt_ids, focus=(), focus_starts=())


def _said(engine: Engine, prompts: Sequence[Row]) -> set[Row]:
    """Those of the prompts whose completions the model says, all tokens of them."""
    prompts = list(dict.fromkeys(prompts))
    if not prompts:
        return set()
    numbered = [replace(prompt, index=number) for number, prompt in enumerate(prompts)]
    right = teacher_forced(engine, engine.batches(numbered)).right
    parts = right.split([len(prompt.completion_ids) for prompt in prompts])
    return {prompt for prompt, part in zip(prompts, parts) if part.all()}
