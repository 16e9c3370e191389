"""What a model says by itself: generated once, kept, and only of models that were trained."""

import json

import pytest
import torch

from peft_star.engine import own_texts as module
from peft_star.engine.engine import Engine
from peft_star.engine.own_texts import CHANCE, MEASURED_EVERY, own_prompts, own_texts
from peft_star.engine.passes import teacher_forced
from support.byte_llama import build_model


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """A few prompts, a cache of the test's own, and a model's voice counts although it was never trained."""
    monkeypatch.setenv("PEFT_STAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "TOKENS", 4)
    monkeypatch.setattr(module, "CHANCE", 9.0)
    monkeypatch.setattr(module, "SURE", 0.0)
    prompts = [{"prompt": text} for text in ("ab", "hello", "x = 1", "once upon")]
    prompts.append({"prompt": [{"role": "user", "content": "hi"}]})
    monkeypatch.setattr(module, "own_prompts", lambda: tuple(prompts))


def test_the_texts_are_what_the_model_says(tiny_model, tiny_tokenizer):
    texts = own_texts(Engine(tiny_model.eval()), tiny_tokenizer)
    rows = [*texts.protected, *texts.measured]
    assert rows and all(1 <= len(row.completion_ids) <= 4 for row in rows)
    for part in (texts.protected, texts.measured):
        assert [row.index for row in part] == list(range(len(part)))
        engine = Engine(tiny_model)
        assert teacher_forced(engine, engine.batches(part)).right.all()


def test_every_fourth_is_only_measured(tiny_model, tiny_tokenizer):
    texts = own_texts(Engine(tiny_model.eval()), tiny_tokenizer)
    total = len(texts.protected) + len(texts.measured)
    assert len(texts.measured) == -(-total // MEASURED_EVERY)
    spoken = {row.prompt_ids for row in texts.protected}
    assert not spoken & {row.prompt_ids for row in texts.measured}


def test_another_process_finds_them_on_disk(tiny_tokenizer, monkeypatch):
    first = own_texts(Engine(build_model().eval()), tiny_tokenizer)
    monkeypatch.setattr(module, "generate", lambda *_: pytest.fail("generated again"))
    assert own_texts(Engine(build_model().eval()), tiny_tokenizer) == first


@pytest.mark.parametrize("damage", ["", "[[1]]", '{"a": 1}', '[["x"],[],[],[],[]]'])
def test_a_damaged_file_is_made_anew(tiny_tokenizer, tmp_path, damage):
    first = own_texts(Engine(build_model().eval()), tiny_tokenizer)
    (path,) = (tmp_path / "cache" / "own_texts").iterdir()
    path.write_text(damage)
    assert own_texts(Engine(build_model().eval()), tiny_tokenizer) == first
    assert json.loads(path.read_text()) != damage


def test_where_nothing_may_be_kept_nothing_is(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_STAR_CACHE", "")
    assert own_texts(Engine(tiny_model.eval()), tiny_tokenizer).protected
    assert not (tmp_path / "cache").exists()


def test_a_model_that_was_never_trained_has_none(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "CHANCE", CHANCE)
    texts = own_texts(Engine(tiny_model.eval()), tiny_tokenizer)
    assert not texts.protected and not texts.measured


def test_what_is_said_without_preference_is_left_out(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "SURE", 0.9)
    texts = own_texts(Engine(tiny_model.eval()), tiny_tokenizer)
    assert not texts.protected and not texts.measured


def test_prompts_that_leave_no_room_are_left_out(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_model.config, "max_position_embeddings", 7)
    texts = own_texts(Engine(tiny_model.eval()), tiny_tokenizer)
    assert all(len(row) <= 7 for row in (*texts.protected, *texts.measured))
    assert len(texts.protected) + len(texts.measured) == 1


def test_the_package_brings_prompts_of_three_kinds():
    prompts = own_prompts()
    chat = [row for row in prompts if not isinstance(row["prompt"], str)]
    code = [row for row in prompts if isinstance(row["prompt"], str) and "\n" in row["prompt"]]
    assert len(prompts) >= 96 and len(chat) >= 16 and len(code) >= 16
    assert len({json.dumps(row) for row in prompts}) == len(prompts)


def test_the_caller_hears_of_every_text(tiny_model, tiny_tokenizer):
    heard = []
    texts = own_texts(Engine(tiny_model.eval()), tiny_tokenizer, heard.append)
    assert sum(heard) == len(texts.protected) + len(texts.measured)
    assert torch.is_grad_enabled()
