"""Rows, their tokens, and what is wrong with bad ones."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peft_star.failures import encode_rows, read_rows, validate_row

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
    with pytest.raises(ValueError, match="failures row 0: chat messages need a chat template"):
        encode_rows([chat_row()], byte_level(), name="failures row")


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="continuation"):
        encode_rows([chat_row()], tokenizer)


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
    ],
)
def test_bad_rows_are_named_in_one_sentence(row, message):
    with pytest.raises(ValueError, match=f"^row 7: .*{message}") as raised:
        validate_row(row, "row 7")
    assert "\n" not in str(raised.value)


def test_rows_longer_than_the_context_and_empty_sets_are_refused():
    rows = [{"prompt": "the quick brown fox", "completion": " jumps over"}]
    with pytest.raises(ValueError, match="row 0: .* exceed the model's context of 3"):
        encode_rows(rows, byte_level(), 3)
    with pytest.raises(ValueError, match="no row to work on"):
        encode_rows([], byte_level())


def test_reading_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "ä", "completion": "b\u2028c"}, {"prompt": "c", "completion": "d"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": ', "line 2: not JSON"),
        (b'{"prompt": "a", "completion": "b"}\n[1]', "line 2: found list"),
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'{"prompt": "a", "completion": ""}', "line 1: 'completion' is empty"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl is not a file"):
        read_rows(tmp_path / "nowhere.jsonl")
