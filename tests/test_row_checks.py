"""What a row may hold, and rows that cannot all be right."""

from pathlib import Path

import pytest

from peft_star.row_checks import FileRows, check_contradictions, number_of, validate_row, where


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "column 'completion' is missing"),
        ({"prompt": "a", "answer": "b"}, r"column 'completion' is missing \(it has 'answer', 'prompt'\)"),
        ({"prompt": "a", "completion": "b", "weight": 1}, "unknown column 'weight'"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "", "completion": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "completion": None}, "'completion' is NoneType; it must be text"),
        ({"prompt": 3, "completion": "b"}, "'prompt' is int; it must be text"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "both be text or both be lists"),
        ({"prompt": [], "completion": [{"role": "assistant", "content": "b"}]}, "'prompt' has no messages"),
        ({"prompt": [{"role": "user"}], "completion": [{"role": "assistant", "content": "b"}]}, "has 'role' and"),
        ({"prompt": [{"role": "user", "content": 1}], "completion": [{"role": "a", "content": "b"}]}, "must be text"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": ""}]},
            "'completion' is empty",
        ),
        (["a", "b"], "found list; a row is an object"),
        ({"prompt": "a", "completion": "b", "focus": "c"}, "'focus' 'c' does not occur in the prompt"),
        ({"prompt": "a", "completion": "b", "focus": ["a", "b"]}, "'focus' 'b' does not occur in the prompt"),
        ({"prompt": "a", "completion": "b", "focus": ""}, "'focus' is empty; give a piece"),
        ({"prompt": "a ", "completion": "b", "focus": " "}, "'focus' is empty; give a piece"),
        ({"prompt": "a", "completion": "b", "focus": []}, "'focus' is empty; give a piece"),
        ({"prompt": "a", "completion": "b", "focus": ["a", ""]}, "'focus' is empty; give a piece"),
        ({"prompt": "a", "completion": "b", "focus": 3}, "'focus' is 3; it must be a piece of the prompt's text"),
        ({"prompt": "a", "completion": "b", "focus": ["a", None]}, "'focus' is .*; it must be a piece"),
        ({"prompt": "a", "completion": "b", "focus": {"a": 1}}, "'focus' is .*; it must be a piece"),
        ({"prompt": "a", "completion": "b", "problem": 3}, "'problem' is int; it must be text"),
        ({"prompt": "a", "completion": "b", "problem": " "}, "'problem' is empty; give a name"),
        ({"prompt": "a", "completion": "b\udfff"}, r"'completion' holds \\udfff, half of a character"),
        ({"prompt": "a", "completion": "b", "focus": ["a", "\ud800"]}, r"'focus' holds \\ud800"),
        ({"prompt": "a", "completion": "b", "problem": "\ud800"}, r"'problem' holds \\ud800"),
        (
            {"prompt": [{"role": "user", "content": "\ud800"}], "completion": [{"role": "a", "content": "b"}]},
            r"'prompt' holds \\ud800",
        ),
        ({"prompt": "a", "completion": "b", "id": ["BUG-1"]}, "'id' is list; it must be text or a whole number"),
        ({"prompt": "a", "completion": "b", "id": True}, "'id' is bool; it must be text or a whole number"),
        ({"prompt": "a", "completion": "b", "id": " "}, "'id' is empty; give the row a name"),
        ({"prompt": "a", "completion": "b", "id": "\ud800"}, r"'id' holds \\ud800"),
        ({"prompt": "a", "completion": "b", "end": "yes"}, "'end' is 'yes'; it must be true or false"),
        ({"prompt": "a", "completion": "b", "end": 1}, "'end' is 1; it must be true or false"),
    ],
)
def test_bad_rows_are_named_in_one_sentence(row, message):
    with pytest.raises(ValueError, match=f"^row 7: .*{message}") as raised:
        validate_row(row, "row 7")
    assert "\n" not in str(raised.value)


def test_rows_are_counted_by_their_line_or_from_1():
    rows = FileRows(Path("rows.jsonl"), "line")
    rows.add(3, {"prompt": "a", "completion": "b"})
    assert (number_of(rows, 0), where(rows, 0, "row")) == (3, "rows.jsonl, line 3")
    assert (number_of(list(rows), 0), where(list(rows), 0, "retain row")) == (1, "retain row 1")
    rows.append(rows[0])  # nobody knows where that came from
    assert [number_of(rows, index) for index in range(2)] == [1, 2]


def rows_of(*pairs, path=None):
    rows = FileRows(Path(path), "line") if path else []
    for number, (prompt, completion, *rest) in enumerate(pairs, start=1):
        row = {"prompt": prompt, "completion": completion, **(rest[0] if rest else {})}
        rows.add(2 * number, row) if path else rows.append(row)
    return rows


def chat(text, **rest):
    return [{"role": "user", "content": "a"}], [{"role": "assistant", "content": text}], rest


END = {"end": True}
GO_ON = {"end": False}


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        (("a", "b"), ("a", "c"), False),
        (("a", "b"), ("a", "b"), True),
        (("a", "b"), ("a ", "c"), True),
        (("a", "b"), ("a", "b c"), True),
        (("a", "b c"), ("a", "b"), True),
        (("a", "b", END), ("a", "b c"), False),
        (("a", "b c", END), ("a", "b"), True),
        (("x\na", "b", END), ("x\na", "b\nc"), True),
        (("x\na", "b", END), ("x\na", "b c"), False),
        (("a", "b", {"focus": "a"}), ("a", "c"), False),
        (chat("b"), chat("c"), False),
        (chat("b"), chat("b c"), False),
        (chat("b", **GO_ON), chat("b c"), True),
    ],
)
def test_two_completions_of_one_prompt(first, second, agree):
    for failures, retained in ((rows_of(first, second), ()), (rows_of(first), rows_of(second))):
        if agree:
            check_contradictions(failures, retained)
        else:
            with pytest.raises(ValueError, match="^(failures row 2|retain row 1): .* in failures row 1, "):
                check_contradictions(failures, retained)


def test_the_longest_of_several_completions_counts():
    with pytest.raises(ValueError, match="^failures row 3: 'b d' .*failures row 2, "):
        check_contradictions(rows_of(("a", "b"), ("a", "b c"), ("a", "b d")))


def test_contradictions_are_named_with_their_lines_in_one_sentence():
    failures = rows_of(("a", "b"), ("c", "d"), path="failures.jsonl")
    retained = rows_of(("x", "y"), ("c", "a\nlong" + 50 * "y"), path="retain.jsonl")
    with pytest.raises(ValueError) as raised:
        check_contradictions(failures, retained)
    assert str(raised.value) == (
        "retain.jsonl, line 4: 'a\\nlongyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy…' has to stay behind the same prompt as in "
        "failures.jsonl, line 4, where something else is wanted; a model can say only one of them, so remove one."
    )


def test_retained_rows_are_not_held_against_each_other():
    check_contradictions(rows_of(("a", "b")), rows_of(("c", "d"), ("c", "e")))
