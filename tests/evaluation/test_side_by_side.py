"""What a model generates with and without its patch, side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_star import StarConfig
from peft_star.evaluation import read_prompts, side_by_side
from support.byte_llama import build_model
from support.evaluated import ROWS

PROMPTS = [row["prompt"] for row in ROWS] + ["q", "a longer prompt that nobody repaired"]


@torch.no_grad()
def said(model, tokenizer, prompt: str, count: int) -> str:
    """Greedy text by plain means: one prompt, no cache, token after token."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_texts_are_those_of_the_base_and_of_the_patched_model(patched, tokenizer) -> None:
    done = []
    result = side_by_side(patched, tokenizer, PROMPTS, max_new_tokens=9, progress=done.append)
    assert [pair.base for pair in result.pairs] == [said(build_model(), tokenizer, text, 9) for text in PROMPTS]
    assert [pair.patched for pair in result.pairs] == [said(patched, tokenizer, text, 9) for text in PROMPTS]
    assert result.pairs[1].patched == "say(x, y)" and result.pairs[0].patched.startswith("cd")
    assert sum(done) == 2 * len(PROMPTS)
    assert not patched.base_model.model.training


def test_the_first_difference_is_where_texts_part(patched, tokenizer) -> None:
    pairs = side_by_side(patched, tokenizer, PROMPTS, max_new_tokens=9).pairs
    assert [pair.changed for pair in pairs] == [pair.base != pair.patched for pair in pairs]
    assert pairs[0].changed
    for pair in pairs:
        if pair.changed:
            assert pair.base[: pair.at] == pair.patched[: pair.at]
            assert pair.base[pair.at : pair.at + 1] != pair.patched[pair.at : pair.at + 1]
            assert pair.token is not None
        else:
            assert pair.at is None and pair.token is None


def test_a_patch_of_nothing_changes_nothing(tokenizer) -> None:
    model = get_peft_model(build_model(), StarConfig(task_type="CAUSAL_LM", num_neurons=4))
    result = side_by_side(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert result.changed == []
    assert result.to_dict()["prompts"] == 4 and result.to_dict()["changed"] == 0
    json.dumps(result.to_dict())


def test_batches_do_not_matter(patched, tokenizer) -> None:
    whole = side_by_side(patched, tokenizer, PROMPTS, max_new_tokens=6)
    assert whole == side_by_side(patched, tokenizer, PROMPTS, max_new_tokens=6, max_batch_tokens=1)
    alone = [side_by_side(patched, tokenizer, [text], max_new_tokens=6).pairs[0] for text in PROMPTS]
    assert whole.pairs == [replace(pair, row=row) for row, pair in enumerate(alone)]


def test_chat_messages_are_asked_as_the_template_says(patched, tokenizer, monkeypatch) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = side_by_side(patched, tokenizer, [[{"role": "user", "content": "hi"}]], max_new_tokens=4).pairs[0]
    assert chat.prompt == "<user>hi<assistant>"
    ids = tokenizer(chat.prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        first = int(patched(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    assert chat.patched.startswith(tokenizer.decode([first], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([""], "prompt 1: the prompt is empty"),
        (["ok", [{"role": "user", "content": ""}]], "prompt 2: the prompt is empty"),
        (["\ud800"], "half of a character"),
        ([[{"role": "user", "content": "hi"}]], "chat template"),
        (["a" * 5000], "exceed the model's context"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(patched, tokenizer, prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        side_by_side(patched, tokenizer, prompts)


def test_what_is_no_prompt_or_no_patched_model_is_refused(patched, tokenizer) -> None:
    with pytest.raises(TypeError, match="prompt 1: the prompt must be text"):
        side_by_side(patched, tokenizer, [3])
    with pytest.raises(TypeError, match="no patch to compare"):
        side_by_side(build_model(), tokenizer, ["a"])
    with pytest.raises(ValueError, match="at least one token"):
        side_by_side(patched, tokenizer, ["a"], max_new_tokens=0)


def test_prompts_are_read_from_rows_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "completion": "x", "note": 1}, {"prompt": messages}]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert read_prompts(path) == ["a", messages]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: a row is an object with 'prompt'"),
        ('{"prompt": 3}', "line 1: the prompt must be text"),
        ('{"prompt": ""}', "line 1: the prompt is empty"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_files_of_prompts_are_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_prompts(tmp_path / "nowhere.jsonl")
