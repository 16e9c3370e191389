"""The acceptance gate, on a tiny model whose voice counts although it was never trained."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from peft_star import RepairArguments, StarConfig, repair
from peft_star.engine import own_texts as texts_module
from peft_star.engine.engine import Engine
from peft_star.evaluation import own_texts as harm_module
from peft_star.evaluation.own_texts import Parting, TextsHarm, hear, texts_harm
from peft_star.failures import Row
from peft_star.method import gate
from peft_star.method.gate import _costs, _most_rows
from peft_star.method.subject import Subject
from support.words import QUIET, ROWS, decided, star, word_tokenizer

PROMPTS = [f"w{a} w{a + 7} w{a + 11}" for a in range(3, 43, 2)]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(autouse=True)
def voice(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path))
    monkeypatch.setattr(texts_module, "TOKENS", 4)
    monkeypatch.setattr(texts_module, "CHANCE", 99.0)
    monkeypatch.setattr(texts_module, "SURE", 0.0)
    monkeypatch.setattr(texts_module, "own_prompts", lambda: tuple({"prompt": text} for text in PROMPTS))


def run(tokenizer, **arguments):
    model = star()
    return model, repair(model, tokenizer, ROWS, RepairArguments(**{**QUIET, **arguments}))


def test_the_report_has_what_the_patch_does_to_own_texts(tokenizer):
    model, report = run(tokenizer, max_harm=1.0)
    assert report.harm["texts"] == 5 and 0 <= report.harm["unchanged"] <= 5
    engine = Engine(model.base_model.model)
    rows = texts_module.own_texts(engine, tokenizer).measured
    subject = Subject.of(model, tokenizer, RepairArguments())
    with subject.unpatched():
        heard = hear(engine, engine.batches(rows))
    found = texts_harm(engine, heard)
    assert found.unchanged == report.harm["unchanged"]
    assert len(report.changed_texts) == len(found.partings) == found.texts - found.unchanged > 0
    texts = [(*row.prompt_ids, *row.completion_ids) for row in rows]
    for parting, told in zip(found.partings, report.changed_texts):
        front = (*parting.front, parting.was)
        assert any(text[: len(front)] == front for text in texts)
        with torch.no_grad():
            said = engine.model(torch.tensor([parting.front])).logits[0, -1].argmax()
        assert said == parting.now != parting.was
        assert (told.before, told.after) == (tokenizer.decode([parting.was]), tokenizer.decode([parting.now]))
    with subject.unpatched():
        generated = [
            engine.model.generate(torch.tensor([row.prompt_ids]), max_new_tokens=4, do_sample=False) for row in rows
        ]
    assert all(
        tuple(ids[0, len(row.prompt_ids) :].tolist()) == row.completion_ids for ids, row in zip(generated, rows)
    )


def test_unpatched_compared_with_itself_nothing_changes(tokenizer):
    model = star()
    engine = Engine(model.base_model.model.eval())
    rows = texts_module.own_texts(engine, tokenizer).measured
    found = texts_harm(engine, hear(engine, engine.batches(rows)))
    assert found == TextsHarm(5, 5, 5, found.tokens, 0, pytest.approx(0.0, abs=1e-6))
    assert found.changed_share == 0


def test_a_limit_that_cannot_hold_leaves_rows_out_and_says_so(tokenizer):
    _, free = run(tokenizer, max_harm=1.0)
    assert free.success and free.harm["unchanged"] < free.harm["texts"]
    _, report = run(tokenizer, max_harm=0.0)
    assert not report.success
    said = [sentence for problem in report.problems for sentence in problem.warnings]
    assert said and all("--max-harm" in sentence for sentence in said)
    assert report.harm["unchanged"] >= free.harm["unchanged"]


def test_a_limit_that_holds_changes_nothing(tokenizer):
    first, one = run(tokenizer, max_harm=1.0)
    second, two = run(tokenizer, max_harm=one.harm["changed_share"])
    for left, right in zip(first.base_model.model.parameters(), second.base_model.model.parameters()):
        assert torch.equal(left, right)
    assert two.success


def test_without_background_nothing_is_measured(tokenizer):
    _, report = run(tokenizer, background=0)
    assert report.success and report.harm == {}


def test_what_rows_cost_is_that_of_their_failing_tokens():
    rows = [SimpleNamespace(index=index, completion_ids=(1, 2)) for index in range(4)]
    case = SimpleNamespace(rows=rows, failing=lambda seen, gaps: torch.tensor([0, 2, 3, 4]))
    journal = SimpleNamespace(costs={0: 1.0, 2: 1.0, 3: 2.0, 5: 6.0})
    found = _costs(SimpleNamespace(journal=journal), case, SimpleNamespace(predictions=None, gaps=None))
    assert found == {0: 1.0, 1: 3.0, 2: 0.0}


def most(holds, costs):
    """How many rows are kept where as many as `holds` hold, and how many were tried."""
    tried = []

    def attempt(left_out):
        tried.append(len(costs) - len(left_out))
        assert left_out == frozenset(range(tried[-1], len(costs)))  # rows are dearer the later they come
        return trial(tried[-1])

    def trial(rows):
        share = 0.4 if rows <= holds else 0.6 + 0.3 * rows / len(costs)
        return SimpleNamespace(rows=rows, harm=SimpleNamespace(changed_share=share))

    return _most_rows(attempt, trial(len(costs)), dict(enumerate(costs)), 0.5).rows, tried


@pytest.mark.parametrize("holds", [1, 2, 5, 7])
@pytest.mark.parametrize("costs", [[1.0] * 8, [0.0] * 8, [float(index) ** 3 for index in range(8)]])
def test_as_many_rows_are_kept_as_hold(holds, costs, monkeypatch):
    monkeypatch.setattr(gate, "ROUNDS", 8)
    kept, tried = most(holds, costs)
    assert kept == holds and len(set(tried)) == len(tried)


def test_after_so_many_rounds_what_held_is_taken_or_the_fewest_rows_that_were_tried():
    kept, tried = most(3, [1.0] * 200)
    assert kept <= 3 and len(tried) == gate.ROUNDS
    kept, tried = most(0, [1.0] * 200)
    assert kept == min(tried)


def test_rows_that_cost_nothing_by_estimate_are_halved():
    assert most(0, [0.0] * 64)[1] == [32, 16, 8, 4]


def test_the_best_trial_is_what_is_left_and_told_of(tokenizer, monkeypatch):
    """A limit that the first trial holds and the second does not: the first is put back, with its warnings."""
    _, free = run(tokenizer, max_harm=1.0)
    limit = free.harm["changed_share"] - 0.01
    model, report = run(tokenizer, max_harm=limit)
    assert report.harm["changed_share"] <= limit
    engine = Engine(model.base_model.model)
    subject = Subject.of(model, tokenizer, RepairArguments())
    with subject.unpatched():
        heard = hear(engine, engine.batches(texts_module.own_texts(engine, tokenizer).measured))
    assert texts_harm(engine, heard).unchanged == report.harm["unchanged"]
    left = sum("was left out" in sentence for problem in report.problems for sentence in problem.warnings)
    assert report.summary()["rows_exact_after"] == len(ROWS) - left


def test_the_divergence_of_the_words_that_were_heard_is_nearly_all_of_it(tokenizer):
    model, report = run(tokenizer, max_harm=1.0)
    base, subject = model.base_model.model, Subject.of(model, tokenizer, RepairArguments())
    engine, total, count = Engine(base), 0.0, 0
    for row in texts_module.own_texts(engine, tokenizer).measured:
        ids, part = torch.tensor([row.input_ids]), slice(len(row.prompt_ids) - 1, -1)
        with torch.no_grad():
            now = base(ids).logits[0, part].log_softmax(-1)
            with subject.unpatched():
                was = base(ids).logits[0, part].log_softmax(-1)
        total += float((was.exp() * (was - now)).sum())
        count += len(row.completion_ids)
    assert report.harm["kl"] == pytest.approx(total / count, rel=0.02)


def test_a_second_repair_hears_the_base_not_the_patch(tokenizer):
    """Both are measured against what the base says, which is listened to once."""
    model, first = run(tokenizer, max_harm=1.0)
    again = repair(model, tokenizer, ROWS, RepairArguments(**QUIET, max_harm=1.0))
    assert again.harm == first.harm


def test_a_repair_that_may_patch_more_of_a_layer_hears_the_base_anew(tokenizer):
    """What was kept of the lowest layer for another repair is stale in front of what changes only now."""
    base = decided()
    for names in (["down_proj"], ["o_proj", "down_proj"]):
        config = StarConfig(task_type="CAUSAL_LM", target_modules=names, num_layers=2, num_neurons=8)
        model = get_peft_model(base, config)
        report = repair(model, tokenizer, ROWS, RepairArguments(**QUIET, max_harm=1.0))
        subject, engine = Subject.of(model, tokenizer, RepairArguments()), Engine(base)
        assert subject.lowest[0] == "model.layers.1" and len(subject.lowest[1]) == len(names)
        with subject.unpatched():
            heard = hear(engine, engine.batches(texts_module.own_texts(engine, tokenizer).measured))
        found = texts_harm(engine, heard)
        assert found.kl > 0 and report.harm["kl"] == pytest.approx(found.kl, rel=1e-4)
        model.unload()


def test_repairs_of_other_layers_that_take_turns_hear_the_base_once_each(tokenizer, monkeypatch):
    base, listened = decided(), []
    listen = gate.hear
    monkeypatch.setattr(gate, "hear", lambda *args: listened.append(count) or listen(*args))
    for count in (1, 2, 1, 2, 3, 2, 1):
        model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_layers=count, num_neurons=8))
        repair(model, tokenizer, ROWS, RepairArguments(**QUIET, max_harm=1.0))
        model.unload()
    # as a third is heard the first is forgotten
    assert listened == [1, 2, 3, 1] and len(gate._VOICES[base]) == 2


def test_texts_are_measured_in_small_batches(tokenizer, monkeypatch):
    monkeypatch.setattr(gate, "BATCH_TOKENS", 8)
    model, report = run(tokenizer, max_harm=1.0)
    ((heard, _),) = gate._VOICES[model.base_model.model].values()
    assert len(heard) == report.harm["texts"] == 5 and all(len(batch.input_ids) == 1 for batch in heard)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_tokens_are_compared_a_few_at_a_time(rows, tokenizer, monkeypatch):
    model, report = run(tokenizer, max_harm=1.0)
    monkeypatch.setattr(harm_module, "ROWS", rows)
    again = repair(model, tokenizer, ROWS, RepairArguments(**QUIET, max_harm=1.0))
    assert again.harm == report.harm


def test_what_is_kept_of_a_model_does_not_keep_it(tokenizer):
    model, _ = run(tokenizer, max_harm=1.0)
    base = weakref.ref(model.base_model.model)
    del model
    gc.collect()
    assert base() is None


def test_texts_that_say_now_what_the_failures_are_to_say_are_told_of(tokenizer):
    rows = [Row(0, "", "", (3,), (20, 21)), Row(1, "", "", (4,), (40, 2))]
    said = {"w20": 20, "w40": 40, "</s>": 2}
    decode = {token: text for text, token in said.items()}
    decode[2] = "\n"
    journal = SimpleNamespace(warnings=[])
    subject = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: decode[ids[0]]))
    case = SimpleNamespace(rows=rows, failing=lambda predictions, gaps: torch.tensor([0, 2, 3]))
    before = SimpleNamespace(predictions=None, gaps=None)
    # 21 is right already, and so is not taught; a line's end stands everywhere
    now = [20, 40, 40, 2, 2, 21, 21, 50]
    harm = TextsHarm(26, 18, 26, 100, 8, 0.1, tuple(Parting((3,), 5, token, ()) for token in now))
    gate.tell_of_echoes(SimpleNamespace(journal=journal, subject=subject), case, before, harm)
    ((index, sentence),) = journal.warnings
    assert index == 1 and sentence.startswith("2 of 26 texts that the model says by itself say 'w40' now")
