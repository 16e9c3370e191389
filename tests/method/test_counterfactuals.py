"""Prompts with another name in the focus's place and with other text in front, asked of a tiny model."""

from contextlib import contextmanager

import pytest
import torch

from peft_star import RepairArguments, repair
from peft_star.failures import encode_rows
from peft_star.method import counterfactuals, focused, namesakes
from peft_star.method.counterfactuals import Verdict, look
from support.words import QUICK, ROWS, running, star, word_tokenizer

FOCUSED = [{**ROWS[0], "focus": "w9 w11"}, {**ROWS[1], "focus": "w30 w31"}]
NAMES = [f"w{number}" for number in range(41, 57)]
FRONTS = ["w33", "w34 w35"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(autouse=True)
def words_as_names(monkeypatch):
    monkeypatch.setattr(namesakes, "names", lambda: NAMES)


def asked(tokenizer, monkeypatch, says, said_before=()):
    """The verdicts of a model that completes these prompts, and those before its patch."""
    state = {"patched": True}

    @contextmanager
    def without():
        state["patched"] = False
        yield
        state["patched"] = True

    seen = []

    def told(engine, prompts):
        seen.append([tokenizer.decode(prompt.prompt_ids) for prompt in prompts])
        wanted = says if state["patched"] else said_before
        return {prompt for prompt, text in zip(prompts, seen[-1]) if text in wanted}

    monkeypatch.setattr(counterfactuals, "_said", told)
    with running(star(), tokenizer) as run:
        found = look(run.engine, encode_rows(FOCUSED, tokenizer), tokenizer, FRONTS, without)
    assert state["patched"]
    return found, seen


def test_other_names_stand_in_the_place_of_the_focus_and_other_text_in_front(tokenizer, monkeypatch):
    found, (seen,) = asked(tokenizer, monkeypatch, says=())
    # two focuses are kept from the first eight names
    swapped = [f"w5 {name}" for name in NAMES[8:12]] + [f"w7 w8 {name}" for name in NAMES[12:16]]
    behind = [f"{front} {row['prompt']}" for row in FOCUSED for front in FRONTS]
    assert seen == swapped + behind
    assert found == {index: Verdict(names=4, taken=0, fronts=2, kept=0) for index in (0, 1)}
    assert all(verdict.bound and not verdict.astray for verdict in found.values())


def test_names_count_that_have_the_completion_now_and_had_not_before(tokenizer, monkeypatch):
    says = [*(f"w5 {name}" for name in NAMES[8:12]), "w33 w5 w9 w11"]
    found, seen = asked(tokenizer, monkeypatch, says, said_before=says[:1])
    assert sorted(seen[1]) == sorted(says[:4])
    assert found[0] == Verdict(names=4, taken=3, fronts=2, kept=1)
    assert found[0].astray and not found[0].bound and not found[1].astray
    # half of them is no proof
    half, _ = asked(tokenizer, monkeypatch, says, said_before=says[:2])
    assert half[0].taken == 2 and not half[0].astray


def test_what_is_said_is_all_of_the_completion(tokenizer):
    with running(star(), tokenizer) as run:
        (row,) = encode_rows(ROWS[:1], tokenizer)
        ids = list(row.prompt_ids)
        with torch.no_grad():
            for _ in range(2):
                ids.append(int(run.subject.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        said = encode_rows([{"prompt": ROWS[0]["prompt"], "completion": " " + tokenizer.decode(ids[-2:])}], tokenizer)
        half = encode_rows(
            [{"prompt": ROWS[0]["prompt"], "completion": f" {tokenizer.decode(ids[-2])} w60"}], tokenizer
        )
        assert counterfactuals._said(run.engine, [*said, row, *half]) == set(said)


@pytest.mark.parametrize("stray", [(0,), (1,), (0, 1)])
def test_a_push_that_answers_to_other_names_is_taken_back_for_its_row(stray, tokenizer, monkeypatch):
    monkeypatch.setattr(focused, "BAND", (0.0, 0.0))

    def judge(engine, rows, tokenizer, fronts, without):
        return {row.index: Verdict(4, 4 if row.index in stray else 0, 3, 3) for row in rows}

    monkeypatch.setattr(counterfactuals, "look", judge)
    model = star(num_layers=1, num_neurons=32)
    arguments = RepairArguments(learning_rate=0.05, reach="prompt", **QUICK)
    report = repair(model, tokenizer, FOCUSED, arguments)
    assert report.num_solved == len(report.failures)
    (problem,) = report.problems
    assert problem.warnings == [
        "A push at the focus answered to 4 of 4 other names, too, so the failing tokens were pushed instead."
    ]
    told = {token.strip() for act in problem.acts if act["how"] == "focus" for token in act["tokens"]}
    assert told == {focus for row, focus in enumerate(("w11", "w31")) if row not in stray}
    if len(stray) == 2:
        plain = star(num_layers=1, num_neurons=32)
        repair(plain, tokenizer, ROWS, arguments)
        mine, theirs = (
            {name: value for name, value in one.state_dict().items() if "star_" in name} for one in (model, plain)
        )
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_push_that_holds_behind_no_other_text_is_told_of_and_stays(tokenizer, monkeypatch):
    monkeypatch.setattr(focused, "BAND", (0.0, 0.0))
    judge = {0: Verdict(4, 0, 3, 0), 1: Verdict(4, 0, 3, 1)}
    monkeypatch.setattr(counterfactuals, "look", lambda *args: judge)
    report = repair(
        star(num_layers=1, num_neurons=32), tokenizer, FOCUSED, RepairArguments(learning_rate=0.05, **QUICK)
    )
    (problem,) = report.problems
    assert problem.warnings == ["Behind other text the push at the focus does not hold: it answers to its place, too."]
    assert {act["how"] for act in problem.acts} >= {"focus"}
