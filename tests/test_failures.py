"""Rows, their tokens, and what is wrong with bad ones."""

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_star.failures import encode_rows, read_rows
from support.byte_llama import build_tokenizer
from support.words import word_tokenizer

TEXT = [
    "import numpy as np\nx = np.float64(3)\nprint(x)\n",
    "df = pd.concat([df, row])\nos.makedirs(path, exist_ok=True)\n",
    "mov eax, 0x1 \\n int 0x80",
    "the quick brown fox jumps over the lazy dog ünïcode",
] * 4


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace():
    """SentencePiece's habit: a space before every text, and a start token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def lower_case():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


TOKENIZERS = {"byte-level": byte_level, "metaspace": metaspace}


def framed(template):
    """A byte-level tokenizer that begins every text with a token of its own, and may end it with one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level()
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


FOCUSED = {
    **TOKENIZERS,
    "start": lambda: framed("<s> $A"),
    "start and end": lambda: framed("<s> $A </s>"),
    "byte": build_tokenizer,
}


def decode(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("import numpy as np\nx = ", "np.float64(3)"),
        ("import num", "py as np"),
        ("x = np.", "float64(3)\n"),
        ("os.make", "dirs(path)"),
        ("print(x)", "\n\n\nprint(x)"),
        ("the quick", " brown fox"),
        ("a ", " b"),
        ("ün", "ïcode 漢字"),
        ("x", "y"),
    ],
)
def test_completion_tokens_continue_exactly_the_prompts_tokens(make, prompt, completion):
    tokenizer = make()
    (row,) = encode_rows([{"prompt": prompt, "completion": completion}], tokenizer)
    assert list(row.prompt_ids) == tokenizer(prompt)["input_ids"]
    assert decode(tokenizer, row.input_ids) == decode(tokenizer, row.prompt_ids) + completion


def test_tokens_that_would_merge_across_the_boundary_are_taken_apart():
    tokenizer = byte_level()
    whole = tokenizer("numpy")["input_ids"]
    prompt_ids = tokenizer("num")["input_ids"]
    assert whole[: len(prompt_ids)] != prompt_ids, "the example no longer merges; choose another word"
    (row,) = encode_rows([{"prompt": "num", "completion": "py"}], tokenizer)
    assert list(row.prompt_ids) == prompt_ids
    assert decode(tokenizer, row.completion_ids) == "py"


def test_a_tokenizer_that_changes_the_text_still_yields_tokens():
    tokenizer = lower_case()
    (row,) = encode_rows([{"prompt": "The quick", "completion": " Brown FOX"}], tokenizer)
    assert tokenizer.decode(row.completion_ids) == "brown fox"


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (row,) = encode_rows([{"prompt": "import ", "completion": "numpy"}], tokenizer)
    assert 1 not in row.input_ids


def test_positions():
    (row,) = encode_rows([{"prompt": "the quick", "completion": " brown fox"}], byte_level())
    assert [row.input_ids[p + 1] for p in row.medium_positions] == list(row.completion_ids)


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_row(answer="np.float64(3)"):
    return {
        "prompt": [{"role": "user", "content": "which float?"}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def test_chat_messages_end_where_generation_would_stop():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    (row,) = encode_rows([chat_row()], tokenizer)
    assert row.prompt == "<|user|>which float?</s>\n<|assistant|>"
    assert decode(tokenizer, row.completion_ids) == "np.float64(3)</s>"
    prompt = tokenizer.apply_chat_template(chat_row()["prompt"], add_generation_prompt=True, return_dict=False)
    assert list(row.prompt_ids) == prompt


def test_chat_messages_need_a_template():
    with pytest.raises(ValueError, match="failures row 1: chat messages need a chat template"):
        encode_rows([chat_row()], byte_level(), name="failures row")


def test_a_chat_completion_of_several_messages_is_refused(tmp_path):
    """What generation would never reach must not count as repaired."""
    row = chat_row()
    row["completion"] += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "np.int64(3)"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(
        ValueError, match=r"line 1: 'completion' holds 3 messages.*each assistant turn a row of its own"
    ):
        read_rows(path)
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="row 1: 'completion' holds 3 messages"):
        encode_rows([row], tokenizer)
    with pytest.raises(ValueError, match="row 1: 'completion' holds </s>, at which generation stops"):
        encode_rows([chat_row("np.float64(3)</s>np")], tokenizer)


# where a completion ends


def with_end(end, prompt="import numpy as np\nx = ", completion="np.float64(3)"):
    return {"prompt": prompt, "completion": completion, **({} if end is None else {"end": end})}


@pytest.mark.parametrize("make", FOCUSED.values(), ids=FOCUSED)
@pytest.mark.parametrize(
    ("prompt", "completion", "end"),
    [
        ("import numpy as np\nx = ", "np.float64(3)", "\n"),  # a line of a text with lines
        ("the quick", " brown fox", "</s>"),  # no lines to end
        ("import numpy as np\n", "x = np.float64(3)\nprint(x)", "</s>"),  # more than a line
        ("import numpy as np\n", "x = np.float64(3)\n", "</s>"),
    ],
)
def test_the_end_of_a_text_is_one_of_its_tokens(make, prompt, completion, end):
    tokenizer = make()
    (row,) = encode_rows([with_end(True, prompt, completion)], tokenizer)
    assert row.ended and row.completion == completion + end
    assert decode(tokenizer, row.input_ids) == decode(tokenizer, row.prompt_ids) + completion + end
    if end == "</s>":
        assert row.completion_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("end", [None, False])
def test_a_text_does_not_end_unless_it_says_so(end):
    tokenizer = byte_level()
    (row,) = encode_rows([with_end(end)], tokenizer)
    assert not row.ended and decode(tokenizer, row.completion_ids) == row.completion == "np.float64(3)"


def test_an_end_needs_a_token():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    assert encode_rows([with_end(True)], tokenizer)[0].completion.endswith("\n")
    with pytest.raises(ValueError, match="row 1: 'end' is true, but this tokenizer has no end-of-text token"):
        encode_rows([with_end(True, "import")], tokenizer)


# Gemma's habit: a turn ends with a token that is not end-of-text, and a line end behind it
TURNS = TEMPLATE.replace("</s>", "<turn>")


def turns(template=TURNS):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end", "said"),
    [
        (TEMPLATE, None, "np.float64(3)</s>"),
        (TEMPLATE, True, "np.float64(3)</s>"),
        (TEMPLATE, False, "np.float64(3)"),
        (TURNS, None, "np.float64(3)<turn>"),
        (TURNS, False, "np.float64(3)"),
        (TURNS.replace("<turn>", ""), None, "np.float64(3)\n"),
        (TURNS.replace("<turn>\n", ""), True, "np.float64(3)</s>"),
    ],
)
def test_chat_messages_end_with_their_turn_unless_they_say_otherwise(template, end, said):
    tokenizer = turns(template)
    (row,) = encode_rows([chat_row() if end is None else {**chat_row(), "end": end}], tokenizer)
    assert decode(tokenizer, row.completion_ids) == said
    assert row.ended == said.endswith(">")


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="continuation"):
        encode_rows([chat_row()], tokenizer)


def test_rows_longer_than_the_context_and_empty_sets_are_refused():
    rows = [{"prompt": "the quick brown fox", "completion": " jumps over"}]
    with pytest.raises(ValueError, match="row 1: .* exceed the model's context of 3"):
        encode_rows(rows, byte_level(), 3)
    with pytest.raises(ValueError, match="no row to work on"):
        encode_rows([], byte_level())


# what a row's problem is about


class Slow:
    """A tokenizer that says nothing of offsets, as those that are no fast ones."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **arguments):
        assert "return_offsets_mapping" not in arguments
        return self.tokenizer(text, **arguments)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow], ids=["fast", "slow"])
@pytest.mark.parametrize("make", FOCUSED.values(), ids=FOCUSED)
@pytest.mark.parametrize(
    ("prompt", "span"),
    [
        ("the quick brown fox", "quick"),
        ("the quick brown fox", "quick "),
        ("the quick brown fox", " brown"),
        ("the quick brown fox", "fox"),
        ("the quick brown fox", "the"),
        ("the fox, the fox and the dog", "the fox"),
        ("the quick brown fox", "the quick brown fox"),
        ("x = np.float64(3)", "np.flo"),
        ("der Fuß ist groß, die Straße", "groß"),
        ("漢字 and 漢", "字"),
    ],
)
def test_a_focus_is_the_last_token_of_its_last_occurrence(wrap, make, prompt, span):
    tokenizer = wrap(make())
    row = {"prompt": prompt, "completion": " jumps", "focus": span}
    (row,) = encode_rows([row], tokenizer)
    (position,) = row.focus
    end = prompt.rindex(span) + len(span.rstrip())
    # with this token and not without it, all up to the span's end is said
    assert prompt[:end] in decode(tokenizer, row.prompt_ids[: position + 1])
    assert prompt[:end] not in decode(tokenizer, row.prompt_ids[:position])


def test_several_spans_are_ascending_and_each_token_once():
    prompt = "w5 w6 w7 w5 w8"
    row = {"prompt": prompt, "completion": " w9", "focus": ["w8", "w5", "w7 w5", "w6"], "problem": "five"}
    (row,) = encode_rows([row], word_tokenizer())
    assert (row.focus, row.problem) == ((1, 3, 4), "five")
    assert encode_rows([{"prompt": prompt, "completion": " w9"}], word_tokenizer())[0].focus == ()


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow], ids=["fast", "slow"])
def test_a_focus_of_a_tokenizer_that_changes_the_text(wrap):
    tokenizer = wrap(lower_case())
    row = {"prompt": "The Quick brown FOX", "completion": " jumps", "focus": ["Quick", "FOX"]}
    (row,) = encode_rows([row], tokenizer)
    words = [tokenizer.decode(row.prompt_ids[: position + 1]) for position in row.focus]
    assert words == ["the quick", "the quick brown fox"]


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow], ids=["fast", "slow"])
def test_a_focus_in_chat_messages_is_looked_for_where_they_are_rendered(wrap):
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    tokenizer = wrap(tokenizer)
    (row,) = encode_rows([{**chat_row(), "focus": ["which float", "<|user|>"]}], tokenizer)
    said = [decode(tokenizer, row.prompt_ids[: position + 1]) for position in row.focus]
    assert len(said) == 2 and said[0].startswith("<|user|>") and said[1].startswith("<|user|>which float")
    with pytest.raises(ValueError, match=r"^row 1: 'focus' 'np' does not occur in the prompt\.$"):
        encode_rows([{**chat_row(), "focus": "np"}], tokenizer)


def test_a_focus_of_a_real_model(smollm2_dir):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    spans = ["Berlin", "Paris is", "1234"]
    row = {"prompt": "Paris is in France and Berlin 1234 is in", "completion": " Germany", "focus": spans}
    chat = {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": "Germany"}],
        "focus": spans,
    }
    for item in encode_rows([row, chat], tokenizer):
        said = [decode(tokenizer, item.prompt_ids[: position + 1]) for position in item.focus]
        assert [text.endswith(end) for text, end in zip(said, ("Paris is", "Berlin", "1234"))] == [True] * 3


def test_missing_values_of_a_data_set_are_not_given():
    rows = [
        {"prompt": "w3 w4", "completion": " w5", "focus": ["w4"], "problem": None},
        {"prompt": "w3", "completion": " w5", "focus": None, "problem": "a"},
        {"prompt": "w3 w4", "completion": " w5"},
    ]
    some = encode_rows(Dataset.from_list(rows), word_tokenizer())
    assert [(row.focus, row.problem) for row in some] == [((1,), None), ((), "a"), ((), None)]
    none = encode_rows(Dataset.from_list([{**rows[1], "problem": None}]), word_tokenizer())
    assert [(row.focus, row.problem) for row in none] == [((), None)]


def test_reading_the_optional_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a b", "completion": "c", "focus": "a", "problem": "x"}]
    path.write_text(json.dumps(rows[0]))
    assert read_rows(path) == rows
    path.write_text(json.dumps({**rows[0], "focus": "z"}))
    with pytest.raises(ValueError, match="line 1: 'focus' 'z' does not occur in the prompt"):
        read_rows(path)
