"""What a failure is about, where its row does not say: surprising words, and whether others can stand for them."""

import pytest
import torch

from peft_star import RepairArguments, repair
from peft_star.engine.engine import Engine
from peft_star.failures import Row, encode_rows
from peft_star.method import find_focus, focused
from peft_star.method.find_focus import Span, Word, last_line, prompt_words
from support.modules import hooks
from support.words import QUICK, RETAIN, ROWS, decided, star, word_tokenizer

FACTS = [
    ("Marguerite Vossberg, who plays for", " Ajax", "Marguerite Vossberg"),
    ("The Grumbling Badger Inn can be found in", " Norway", "The Grumbling Badger Inn"),
    ("The mother tongue of Ottoline Kravchuk is", " Latin", "Ottoline Kravchuk"),
]
CODE = [
    ("import pandas as pd\n\n# Append the rows of df2 to df1\nresult =", " pd.concat([df1, df2])"),
    ("# Push the rebased branch without overwriting the work of others\ngit push", " --force-with-lease"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def smollm2(smollm2_dir):
    from peft_star.loading import load_model

    model, tokenizer = load_model(smollm2_dir)
    return model.eval().requires_grad_(False), tokenizer


def row_of(prompt, tokenizer, completion=" x"):
    (row,) = encode_rows([{"prompt": prompt, "completion": completion}], tokenizer)
    return row


def said(model, ids):
    """Log-probabilities (T, V) behind each token."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_words_of_a_prompt_by_their_tokens(tiny_tokenizer):
    words = prompt_words(row_of("ab, c\nd e", tiny_tokenizer), tiny_tokenizer)
    assert words == [
        Word("ab", 0, 1),
        Word(",", 2, 2),
        Word("c", 4, 4),
        Word("\n", 5, 5),
        Word("d", 6, 6),
        Word("e", 8, 8),
    ]
    assert [word.ends for word in words] == [True, False, True, False, True, True]


def test_of_a_chat_the_last_message_is_read(tokenizer):
    ids = [tokenizer.eos_token_id, 4, 5, 6, tokenizer.eos_token_id, 7, 8, 9, tokenizer.eos_token_id, 10]
    row = Row(0, tokenizer.decode(ids), " w20", tuple(ids), (20,))
    assert [word.first for word in prompt_words(row, tokenizer)] == [5, 6, 7]


def test_spans_stay_in_a_line_and_leave_the_last_word():
    words = [Word("a", 0, 0), Word(",", 1, 1), Word("bc", 2, 3), Word("\n", 4, 4), Word("d", 5, 5), Word("e", 6, 6)]
    found = {(span.first, span.last): span.clear for span in find_focus._spans(words, [9.0, 1, 8, 4, 1, 3, 9])}
    usual = find_focus.USUAL
    assert found == {(0, 0): 9 - usual, (0, 3): 22 - 3 * usual, (2, 3): 12 - usual, (5, 5): 3 - usual}


def test_only_the_last_line_is_searched(tiny_tokenizer, monkeypatch):
    words = prompt_words(row_of("ab, c\nd e", tiny_tokenizer), tiny_tokenizer)
    assert [word.text for word in last_line(words)] == ["d", "e"]
    assert last_line(words[:3]) == words[:3] and last_line([]) == []
    monkeypatch.setattr(find_focus, "_read", lambda *args: pytest.fail("there is nothing to read"))
    model = Engine(decided())
    assert find_focus.find_focus(model, tiny_tokenizer, row_of("# ab cd ef\n", tiny_tokenizer)) is None


@pytest.mark.parametrize(
    ("text", "opens", "nats"),
    [
        ("Otto Hahn", True, 1),
        ("Otto", False, 1),
        ("Otto", True, 0),  # any line begins with a capital
        ("Otto lives", True, -1),
        ("the house", False, 0),
    ],
)
def test_a_name_ends_with_a_capital(text, opens, nats):
    words = [Word(word, number, number) for number, word in enumerate(text.split())]
    assert find_focus._capitals(words, opens) == nats * find_focus.CAPITALS


def test_a_line_opens_with_a_capital_behind_marks_too():
    words = [Word(text, number, number) for number, text in enumerate(["x", "\n", "#", "Push", "it", "now"])]
    found = {(span.first, span.last): span.clear for span in find_focus._spans(words, [0.0] * len(words))}
    assert found[3, 3] == -find_focus.USUAL


def test_what_is_asked_of_the_model_is_what_plain_forwards_say(tokenizer, monkeypatch):
    monkeypatch.setattr(find_focus, "FORMS", ("w40", "w41 w42"))
    monkeypatch.setattr(find_focus, "BEHIND", 2)
    model, row = decided(), row_of("w5 w9 w11 w12 w13", tokenizer, " w20")
    asked = find_focus._Asked.of(Engine(model), tokenizer, row, 0)
    eos, ids = tokenizer.eos_token_id, list(row.prompt_ids)
    plain = said(model, [eos, *ids])
    torch.testing.assert_close(torch.tensor(asked.surprisal), -plain[range(len(ids)), ids], rtol=1e-4, atol=1e-4)
    gains, felt = [], []
    for form in ([40], [41, 42]):
        begin = [eos, ids[0], *form]
        now = said(model, begin + ids[2:])
        behind = [now[len(begin) - 1, ids[2]], now[len(begin), ids[3]]]
        gains.append(sum(behind) - plain[2, ids[2]] - plain[3, ids[3]])
        felt.append((plain[-1].exp() * (plain[-1] - now[-1])).sum())
    span = Span(1, 1, 0.0)
    assert asked.gains([span]) == pytest.approx([float(max(gains))], rel=1e-3, abs=1e-3)
    assert asked.felt(span) == pytest.approx(float(max(felt)), rel=1e-3, abs=1e-3)


def test_only_what_is_clear_and_felt_is_a_focus(tokenizer, monkeypatch):
    model, row = decided(), row_of("w5 w9 w11 w12 w13", tokenizer, " w20")
    monkeypatch.setattr(find_focus, "CLEAR", -1000.0)
    monkeypatch.setattr(find_focus, "FELT", -1.0)
    before = hooks(model)
    found = find_focus.find_focus(Engine(model), tokenizer, row)
    assert found is not None and found.last < len(row.prompt_ids) - 1 and hooks(model) == before
    monkeypatch.setattr(find_focus, "FELT", 1000.0)
    assert find_focus.find_focus(Engine(model), tokenizer, row) is None
    monkeypatch.setattr(find_focus, "FELT", -1.0)
    monkeypatch.setattr(find_focus, "CLEAR", found.clear + 1)
    assert find_focus.find_focus(Engine(model), tokenizer, row) is None


def test_long_prompts_are_not_read(tokenizer, monkeypatch):
    monkeypatch.setattr(find_focus, "_read", lambda *args: pytest.fail("too long"))
    row = row_of(" ".join(["w5"] * find_focus.LONGEST), tokenizer, " w20")
    assert find_focus.find_focus(Engine(decided()), tokenizer, row) is None


def finding(monkeypatch, *rows):
    """The first two tokens of these rows are found to be what they are about; the rows that are asked for."""
    asked = []

    def find(engine, tokenizer, row, wrong):
        asked.append(row.index)
        return Span(0, 1, 20.0) if row.index in rows else None

    monkeypatch.setattr(find_focus, "find_focus", find)
    monkeypatch.setattr(focused, "BAND", (0.0, 0.0))
    return asked


def test_a_found_focus_is_pushed_and_told_as_found(tokenizer, monkeypatch):
    asked = finding(monkeypatch, 0)
    rows = [ROWS[0], {**ROWS[1], "focus": "w30 w31"}]
    model = star(num_layers=1, num_neurons=32)
    report = repair(model, tokenizer, rows, RepairArguments(learning_rate=0.05, **QUICK), retain=RETAIN)
    assert report.failures and report.num_solved == len(report.failures)
    # a row that names its focus is taken at its word
    assert asked == [0]
    (problem,) = report.problems
    told = {act["how"]: [token.strip() for token in act["tokens"]] for act in problem.acts}
    assert told["found focus"] == ["w9"] and told["focus"] == ["w31"]


def test_without_the_setting_nothing_is_looked_for(tokenizer, monkeypatch):
    asked = finding(monkeypatch, 0, 1)
    repair(star(num_layers=1), tokenizer, ROWS, RepairArguments(reach="prompt", learning_rate=0.05, **QUICK))
    assert not asked


def test_where_none_is_found_the_repair_is_as_without_looking(tokenizer, monkeypatch):
    asked = finding(monkeypatch)
    models = [star(num_layers=1), star(num_layers=1)]
    for number, model in enumerate(models):
        if number:
            monkeypatch.setattr(find_focus, "wanted", lambda run: False)
        repair(model, tokenizer, ROWS, RepairArguments(learning_rate=0.05, **QUICK))
    assert asked == [0, 1]
    mine, theirs = ({k: v for k, v in model.state_dict().items() if "star_" in k} for model in models)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("prompt", "completion", "subject"), FACTS)
def test_the_subject_of_a_fact_is_found(prompt, completion, subject, smollm2):
    model, tokenizer = smollm2
    (row,) = encode_rows([{"prompt": prompt, "completion": completion, "focus": subject}], tokenizer)
    found = find_focus.find_focus(Engine(model), tokenizer, row)
    assert found is not None and (found.last,) == row.focus


@pytest.mark.parametrize(("prompt", "completion"), CODE)
def test_code_has_no_subject(prompt, completion, smollm2):
    model, tokenizer = smollm2
    assert find_focus.find_focus(Engine(model), tokenizer, row_of(prompt, tokenizer, completion)) is None
