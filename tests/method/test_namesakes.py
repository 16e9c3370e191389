"""Other names in a focus's place: what is in front of it stays, and no name of a focus itself is among them."""

import pytest

from peft_star.failures import encode_rows
from peft_star.method import namesakes as module
from peft_star.method.namesakes import EACH, names, namesakes
from support.words import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def row_of(prompt, focus, tokenizer):
    (row,) = encode_rows([{"prompt": prompt, "completion": " w20", "focus": focus}], tokenizer)
    return row


def test_each_focus_gets_others_in_its_place(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "names", lambda: [f"w{number} w3" for number in range(30, 38)])
    rows = [row_of("w5 w9 w11 w12", "w9 w11", tokenizer), row_of("w7 w8", "w7", tokenizer)]
    expected = [(5, number, 3) for number in range(30, 34)] + [(number, 3) for number in range(34, 38)]
    assert list(namesakes(rows, tokenizer)) == expected


def test_several_spans_of_a_row_are_replaced_one_by_one(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "names", lambda: ["w30"])
    assert list(namesakes([row_of("w5 w9 w11 w12", ["w9", "w12"], tokenizer)], tokenizer)) == (
        [(5, 30)] * EACH + [(5, 9, 11, 30)] * EACH
    )


def test_what_any_focus_names_is_no_other_name(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "names", lambda: ["w9", "w40 w9", "w50"])
    rows = [row_of("w5 w9 w11", "w9", tokenizer), row_of("w5 w50 w51", "w50 w51", tokenizer)]
    assert list(namesakes(rows, tokenizer)) == []


def test_the_names_are_all_there_once():
    assert len(names()) == len(set(names())) > 50 and all(name.strip() == name != "" for name in names())
