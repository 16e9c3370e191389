"""What a report is made of: failing tokens, rows, broken tokens, patched layers, problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN_TOKENS = 5  # of where a patch acts
PROBLEM_COLUMNS = ("solved", "rows right", "related fixed", "related broken", "retained kept", "acts at")


class Labels(dict[tuple[str, int], str]):
    """What readers are shown of rows, by source and index."""

    def __missing__(self, key: tuple[str, int]) -> str:
        return str(key[1] + 1)


def label_of(record: Any) -> str:
    """What readers are shown of a record's row: its line or number, counted from 1, with its id."""
    number = str(record.row + 1 if record.line is None else record.line)
    return f"{number} ({record.id})" if record.id else number


@dataclass
class FailureRecord:
    """One failing token.

    Attributes:
        row: Index of its row in the failures, from 0.
        position: The medium token's position in the row's tokens; the expected token is at `position + 1`.
        context: The text right before the expected token.
        expected, before, after: The expected token and the model's argmax before and after, as text (`*_id`: ids).
        gap_before, gap_after: p(expected) − the largest other probability.
        solved: Whether the argmax is the expected token after the patch.
    """

    row: int
    position: int
    context: str
    expected: str
    expected_id: int
    before: str
    before_id: int
    after: str
    after_id: int
    gap_before: float
    gap_after: float
    solved: bool


@dataclass
class RowRecord:
    """One row, before and after.

    `source` is "failures", "retain", "related" or "earlier" (of an earlier repair of the patch); `problem` is the
    problem that the row names.
    `exact_*`: every
    completion token right teacher-forced. `served_*`: the same by arithmetic, in each that the repair is to be served
    in. `generated_*`: the text of greedy generation, and `generation_exact_*` whether it equals the completion. Unless
    the repair generated (`verify_generation`), both are told from the tokens: what is right teacher-forced is
    generated, and the text of a wrong row ends with its first wrong token (None: an earlier version's report).
    `goes_on`: what the model says next, to the end of the line, after a completion of the failures that it says right
    now and that says nothing of where it ends (None: not looked at). `row` is the row's
    index, from 0; `line` is how people count it, from 1; `id` is what it is called elsewhere.
    """

    source: str
    row: int
    prompt: str
    completion: str
    tokens: int
    right_before: int
    right_after: int
    exact_before: bool
    exact_after: bool
    generated_before: str | None = None
    generated_after: str | None = None
    generation_exact_before: bool | None = None
    generation_exact_after: bool | None = None
    problem: str | None = None
    goes_on: str | None = None
    served_before: dict[str, bool] = field(default_factory=dict)
    served_after: dict[str, bool] = field(default_factory=dict)
    id: str | None = None
    line: int | None = None

    @property
    def label(self) -> str:
        """The row for readers: its line or number, with its id."""
        return label_of(self)

    @property
    def was_right(self) -> bool:
        """Right before, by every check that was made."""
        generated = self.generation_exact_before is not False
        return self.exact_before and generated and all(self.served_before.values())

    @property
    def is_right(self) -> bool:
        """Right after, by every check that was made."""
        generated = self.generation_exact_after is not False
        return self.exact_after and generated and all(self.served_after.values())

    @property
    def broken(self) -> bool:
        """Right before, by a check that was made, and wrong after."""
        teacher_forced = self.exact_before and not self.exact_after
        generated = bool(self.generation_exact_before) and self.generation_exact_after is False
        return teacher_forced or generated or any(self.broken_in(name) for name in self.served_before)

    def broken_in(self, name: str) -> bool:
        """Right before in the arithmetic of this name, and wrong after."""
        return self.served_before[name] and not self.served_after.get(name, True)


@dataclass
class BrokenToken:
    """A token that was right before the patch and is wrong after it."""

    source: str
    row: int
    position: int
    context: str
    expected: str
    expected_id: int
    after: str
    after_id: int


@dataclass
class ChangedText:
    """A text that the model said by itself and that the patch changes, where it changes first: what stands in front,
    the token there before and after, and how the text went on before."""

    context: str
    before: str
    after: str
    rest: str = ""


@dataclass
class PatchedLayer:
    """One patched FFN: its module, its neurons (ascending) and the Frobenius norm of its delta."""

    name: str
    neurons: list[int]
    delta_norm: float


@dataclass
class ProblemRecord:
    """One problem: the rows that name it, and how far its repair reaches.

    Attributes:
        name: Its name; the rows that name none share "".
        rows, rows_exact_after: Its failures' rows, and those with every token right teacher-forced after the patch.
        failures, solved: Its failing tokens, and those that are right now.
        related, related_fixed: Its related rows that were wrong before, and those of them that are right now.
        related_right, related_broken: Its related rows that were right before, and those of them that are wrong now.
        retained, retained_kept: Its retained rows, and those that did not break.
        acts: Where the patch acts: `how` ("focus", "found focus" or "failing position") with the texts of its
            `tokens`, and the `layers`.
        warnings: A sentence each.
    """

    name: str
    rows: int = 0
    failures: int = 0
    solved: int = 0
    rows_exact_after: int = 0
    related: int = 0
    related_fixed: int = 0
    related_right: int = 0
    related_broken: int = 0
    retained: int = 0
    retained_kept: int = 0
    acts: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return self.name or "(no name)"

    def count(self, row: RowRecord) -> None:
        """Count a row that belongs to the problem."""
        if row.source == "failures":
            self.rows += 1
            self.rows_exact_after += row.exact_after
        elif row.source == "retain":
            self.retained += 1
            self.retained_kept += not row.broken
        elif row.was_right:
            self.related_right += 1
            self.related_broken += not row.is_right
        else:
            self.related += 1
            self.related_fixed += row.is_right

    def add_act(self, how: str, tokens: Sequence[str], layers: Sequence[str]) -> None:
        """Say that the patch acts at these tokens; those of one kind are told together."""
        act = next((act for act in self.acts if act["how"] == how), None)
        if act is None:
            self.acts.append(act := {"how": how, "tokens": [], "layers": []})
        for known, more in (("tokens", tokens), ("layers", layers)):
            act[known] += [item for item in dict.fromkeys(more) if item not in act[known]]

    def cells(self) -> list[str]:
        """The figures as a table shows them, in the order of `PROBLEM_COLUMNS`."""
        return [
            f"{self.solved} of {self.failures}",
            f"{self.rows_exact_after} of {self.rows}",
            f"{self.related_fixed} of {self.related}",
            f"{self.related_broken} of {self.related_right}",
            f"{self.retained_kept} of {self.retained}",
        ]

    def places(self, show: Callable[[str], str]) -> str:
        """Where the patch acts, in words; `show` makes a token's or a layer's text fit for its surroundings."""
        parts = []
        for act in self.acts:
            tokens = [show(text) for text in act["tokens"][:SHOWN_TOKENS]]
            tokens += ["…"] if len(act["tokens"]) > SHOWN_TOKENS else []
            layers = act["layers"]
            within = show(layers[0]) if len(layers) == 1 else f"{len(layers)} layers"
            how = "".join(char for char in act["how"] if char.isalnum() or char == " ")
            parts.append(f"{how}: {', '.join(tokens)} in {within}")
        return "; ".join(parts)
