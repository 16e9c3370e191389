"""What a report says by problem, and of related rows: counted, saved, shown."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from peft_star import RepairReport
from peft_star.cli.console import print_report
from peft_star.failures import Row
from peft_star.method.callbacks import Journal
from peft_star.method.records import problem_records
from peft_star.report import BrokenToken, FailureRecord, PatchedLayer, ProblemRecord, RowRecord
from peft_star.report.markdown import escaped
from support.words import word_tokenizer

LAYERS = [PatchedLayer(f"model.layers.{index}.mlp.down_proj", [1, 2], 0.5) for index in (2, 3)]
NAMES = [layer.name for layer in LAYERS]


def record(source, row, was, now, problem=None):
    return RowRecord(source, row, "a", "b", 1, int(was), int(now), was, now, problem=problem)


def failed(row, position, solved=True):
    return FailureRecord(row, position, "a", "b", 1, "c", 2, "b" if solved else "c", 1, -0.5, 0.5, solved)


def report_of(rows, failures=(), **changes):
    return RepairReport(list(failures), rows, [], LAYERS, 4, {"patch": 1.0}, **changes)


def rows_of(*problems):
    """Rows w3 w4 -> w5, w6 w7 -> w8, ... of these problems."""
    return [
        Row(n, "", "", (3 + 3 * n, 4 + 3 * n), (5 + 3 * n,), problem=problem) for n, problem in enumerate(problems)
    ]


class Args:
    max_steps, disable_tqdm = 1, True


def problems_of(report, rows, acts=(), warnings=()):
    journal = Journal(Args(), ())
    journal.acts += acts
    journal.warnings += warnings
    return problem_records(report, rows, journal, word_tokenizer())


def test_rows_count_for_the_problem_that_they_name():
    rows = rows_of("a", None, "a", "b")
    records = [record("failures", n, False, n != 2, row.problem) for n, row in enumerate(rows)]
    records += [record("retain", 0, True, True, "b"), record("retain", 1, True, False, "b")]
    records += [record("retain", 2, False, False), record("retain", 3, True, True, "other")]
    records += [record("related", n, *seen, "a") for n, seen in enumerate([(0, 1), (0, 0), (1, 1), (1, 0), (1, 1)])]
    report = report_of(records, [failed(0, 1), failed(1, 1), failed(2, 1, solved=False), failed(3, 1)])
    a, unnamed, b, other = problems_of(report, rows)
    assert (a.name, a.rows, a.failures, a.solved, a.rows_exact_after) == ("a", 2, 2, 1, 1)
    assert (a.related, a.related_fixed, a.related_right, a.related_broken) == (2, 1, 3, 1)
    assert (a.retained, unnamed.related, b.related) == (0, 0, 0)
    assert (unnamed.name, unnamed.title, unnamed.rows, unnamed.retained, unnamed.retained_kept) == (
        "",
        "(no name)",
        1,
        1,
        1,
    )
    assert (b.name, b.rows, b.retained, b.retained_kept) == ("b", 1, 2, 1)
    assert (other.name, other.rows, other.retained, other.retained_kept, other.acts) == ("other", 0, 1, 1, [])


def test_readers_are_shown_lines_and_ids(tmp_path):
    known = record("failures", 0, False, True)
    known.id, known.line, known.goes_on = "BUG|7\x1b[2J", 3, "x"
    rows = [known, record("failures", 1, False, True), record("retain", 0, True, False)]
    rows[2].line = 12
    broken = [BrokenToken("retain", 0, 1, "a", "b", 1, "c", 2)]
    report = report_of(rows, [failed(0, 1), failed(1, 1)])
    report.broken = broken
    report.save(tmp_path / "report.json")
    assert RepairReport.load(tmp_path / "report.json") == report
    text = report.to_markdown()
    assert "| 3 (BUG\\|7\\\\x1b\\[2J) | `a` | `b` |" in text and "| 3 (BUG\\|7\\\\x1b\\[2J) | `b` | `x` |" in text
    assert "\n| 2 | `a` |" in text and "\n| retain | 12 | `a` |" in text
    shown = io.StringIO()
    print_report(report, Console(file=shown, width=120))
    lines = [" ".join(line.replace("│", "|").split()) for line in shown.getvalue().splitlines()]
    assert sum(line.startswith("| 3 (BUG|7\\x1b[2J) |") for line in lines) == 2
    assert any(line.startswith("| 2 | a |") for line in lines)
    assert any(line.startswith("| retain | 12 |") for line in lines)


@pytest.mark.parametrize("name", ["a", None])
def test_rows_without_a_name_count_for_the_only_problem(name):
    rows = rows_of(name, name)
    records = [record("failures", n, False, True, name) for n in range(2)]
    records += [record("retain", 0, True, True), record("related", 0, False, True)]
    (problem,) = problems_of(report_of(records, [failed(0, 1), failed(1, 1)]), rows)
    assert (problem.name, problem.rows, problem.retained_kept, problem.related_fixed) == (name or "", 2, 1, 1)


def test_generation_counts_for_related_rows():
    def generated(was, now):
        return RowRecord("related", 0, "a", "b", 1, 1, 1, True, True, "", "", was, now)

    problem = ProblemRecord("")
    for was, now in ((False, True), (False, False), (True, False), (True, True)):
        problem.count(generated(was, now))
    assert (problem.related, problem.related_fixed, problem.related_right, problem.related_broken) == (2, 1, 2, 1)


def test_where_a_patch_acts_and_what_is_to_be_known():
    rows = rows_of("a", "a", "a", "b")
    records = [record("failures", n, False, True, row.problem) for n, row in enumerate(rows)]
    report = report_of(records, [failed(n, 1) for n in range(4)])
    acts = [
        {"row": 0, "how": "focus", "tokens": [0], "layers": NAMES[:1]},
        {"row": 1, "how": "focus", "tokens": [0, 1, 0], "layers": NAMES[::-1]},
    ]
    warnings = [(0, "It answers to all."), (1, "It answers to all."), (3, "Another.")]
    a, b = problems_of(report, rows, acts, warnings)
    assert a.acts == [
        {"how": "focus", "tokens": ["w3", "w6", "w7"], "layers": NAMES},
        {"how": "failing position", "tokens": ["w10"], "layers": NAMES},
    ]
    assert b.acts == [{"how": "failing position", "tokens": ["w13"], "layers": NAMES}]
    assert (a.warnings, b.warnings) == (["It answers to all."], ["Another."])


def told():
    rows = [
        record("failures", 0, False, True, "a"),
        record("related", 0, False, True),
        record("related", 1, True, False),
    ]
    problem = ProblemRecord("a|b", 1, 2, 1, 1, 3, 2, 5, 1, 4, 4)
    problem.add_act("focus", ["w3", "`"], NAMES)
    problem.warnings.append("It answers to <b>w3</b>,\nnot to `w4`.")
    return report_of(rows, problems=[problem, ProblemRecord("", 1)])


def test_problems_survive_the_disk_and_reports_without_them_are_read(tmp_path):
    path = tmp_path / "report.json"
    report = told()
    report.save(path)
    again = RepairReport.load(path)
    assert again.to_dict() == report.to_dict() and isinstance(again.problems[0], ProblemRecord)
    data = json.loads(path.read_text())
    del data["problems"]
    for row in data["rows"]:
        del row["problem"]
    path.write_text(json.dumps(data))
    old = RepairReport.load(path)
    assert old.problems == [] and not old.tells_problems and old.summary() == report.summary()
    path.write_text(json.dumps({**data, "problems": [{"title": "a"}]}))
    with pytest.raises(ValueError, match="not a repair report"):
        RepairReport.load(path)


def test_problems_in_markdown():
    text = told().to_markdown()
    assert "| problem | solved | rows right | related fixed | related broken | retained kept | acts at |" in text
    assert (
        "| `a\\|b` | 1 of 2 | 1 of 1 | 2 of 3 | 1 of 5 | 4 of 4 | focus: `w3`, `ˋ` in 2 layers |\n| (no name) | 0 of 0"
    ) in text
    assert "- Warning: `a\\|b`: It answers to \\<b\\>w3\\</b\\>, not to \\`w4\\`." in text


def shown(report):
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    return console.file.getvalue()


def test_problems_on_the_console():
    text = shown(told())
    (row,) = [line for line in text.splitlines() if "a|b" in line and "2 of 3" in line]
    assert "1 of 2" in row and "1 of 5" in row and "focus: w3, ` in 2 layers" in row
    assert "Warning (a|b): It answers to <b>w3</b>,\\nnot to `w4`." in text
    assert any("related rows fixed, broken" in line and "1 and 1 of 2" in line for line in text.splitlines())


def test_what_the_model_goes_on_to_say_on_the_console(tmp_path):
    report = told()
    assert "goes on" not in shown(report) + report.to_markdown()
    report.rows[0].goes_on = "-branch\n|"
    assert "goes on with" in shown(report) and "-branch\\n|" in shown(report)
    assert "`-branch\\n\\|` |" in report.to_markdown()
    report.save(tmp_path / "report.json")
    assert RepairReport.load(tmp_path / "report.json").rows[0].goes_on == "-branch\n|"


def test_many_tokens_are_not_all_shown():
    problem = ProblemRecord("a")
    problem.add_act("focus", [f"w{number}" for number in range(9)], NAMES[:1])
    assert problem.places(str) == f"focus: w0, w1, w2, w3, w4, … in {NAMES[0]}"


def test_nothing_is_told_of_problems_that_have_no_name_where_nothing_is_related():
    report = report_of([record("failures", 0, False, True)], [failed(0, 1)], problems=[ProblemRecord("", 1, 1, 1, 1)])
    assert not report.tells_problems and "related_rows" not in report.summary()
    assert "acts at" not in report.to_markdown() and "acts at" not in shown(report)


def test_related_rows_decide_no_success():
    rows = [record("failures", 0, False, True), record("related", 0, True, False), record("related", 1, False, False)]
    report = report_of(rows, [failed(0, 1)])
    report.broken.append(BrokenToken("related", 0, 1, "a", "b", 1, "c", 2))
    assert report.success
    figures = report.summary()
    assert [figures[f"related_{name}"] for name in ("rows", "fixed", "broken")] == [2, 0, 1]
    assert (figures["tokens_broken"], figures["retained_rows"], figures["retained_rows_broken"]) == (1, 0, 0)


def test_tables_of_what_serves_a_patch_count_rows_as_the_others_do():
    known = record("failures", 0, False, True)
    known.id, known.line, known.served_before, known.served_after = "BUG-7", 3, {"<b>": False}, {"<b>": True}
    text = report_of([known], [failed(0, 1)]).to_markdown()
    assert f"| 3 (BUG-7) | `{known.completion}` | ✓ | ✓ |" in text and "| 0 |" not in text
    assert "<b>" not in text.replace("\\<b\\>", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("q8_0", "q8_0"),
        ("BUG_12", "BUG_12"),
        ("_a_ a__b", r"\_a\_ a\_\_b"),
        ("[x](y) <b> *c* `d` e|f", r"\[x\](y) \<b\> \*c\* \`d\` e\|f"),
        ("two\nlines", "two lines"),
    ],
)
def test_words_of_strangers_mean_nothing_to_markdown(text, shown):
    assert escaped(text) == shown
