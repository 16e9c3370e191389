"""Files of rows in three formats, and bad ones named with their line."""

import csv
import gzip
import json

import pyarrow
import pytest
from datasets import Dataset, disable_progress_bars
from pyarrow import parquet

from peft_star.failures import encode_rows
from peft_star.row_files import read_rows
from support.words import word_tokenizer

MESSAGES = [{"role": "user", "content": "a b"}]
ANSWER = [{"role": "assistant", "content": "c"}]
TEXTS = [
    {"prompt": "a b", "completion": 'c, "d"\n e', "focus": "b", "problem": "x", "end": True, "id": "BUG-1"},
    {"prompt": " 007", "completion": "None", "focus": None, "problem": None, "end": None, "id": None},
    {"prompt": "ä\u2028b", "completion": "1.0", "focus": "ä", "problem": None, "end": False, "id": "2"},
]
GIVEN = [{name: value for name, value in row.items() if value is not None} for row in TEXTS]


def test_reading_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "ä", "completion": "b\u2028c"}, {"prompt": "c", "completion": "d"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_rows(path) == rows


def test_rows_know_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "completion": "c", "id": 7}\n')
    rows = read_rows(path)
    assert (rows.numbers, rows.unit) == ([2, 4], "line")
    row = encode_rows(rows, word_tokenizer())[1]
    assert (row.index, row.number, row.id) == (1, 4, "7")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .* exceed the model's context of 1"):
        encode_rows(rows, word_tokenizer(), 1)
    assert [row.number for row in encode_rows(list(rows), word_tokenizer())] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": ', "line 2: not JSON"),
        (b'{"prompt": "a", "completion": "b"}\n[1]', "line 2: found list"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b', "completion": "b"}', "line 1: not JSON .*too deep"),
        (b'{"prompt": ' + b"9" * 5000 + b', "completion": "b"}', "line 1: not JSON"),
        (b'{"prompt": "a\\ud800", "completion": "b"}', r"line 1: 'prompt' holds \\ud800, half of a character"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "line 1: not JSON .key 'prompt' is there twice"),
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (gzip.compress(b"{}", mtime=0), "is compressed; unpack it first"),
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


def test_csv_as_datasets_writes_it(tmp_path):
    disable_progress_bars()
    path = tmp_path / "rows.CSV"
    Dataset.from_list(TEXTS).to_csv(path)
    rows = read_rows(path)
    assert rows == GIVEN
    assert rows.numbers == [2, 4, 5]  # the first completion has two lines


def test_csv_with_other_columns_first_and_dos_line_ends(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["end", "completion", "prompt"], dialect="excel")
        writer.writeheader()
        writer.writerow({"end": "TRUE", "completion": "b\r\nc", "prompt": "a"})
        writer.writerow({"end": "", "completion": 200_000 * "b", "prompt": "c"})
    assert read_rows(path) == [
        {"end": True, "completion": "b\r\nc", "prompt": "a"},
        {"completion": 200_000 * "b", "prompt": "c"},
    ]
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,completion\na,b\nc\n", "line 3: 1 cells, and the header has 2; put a text with commas"),
        ("prompt,completion\na,b,c\n", "line 2: 3 cells"),
        ('prompt,completion\na,b\nc,"d\n', "line 3: not CSV"),
        ("prompt,completion,prompt\na,b,c\n", "line 1: column 'prompt' is there twice"),
        ("input,output\na,b\n", "line 2: column 'prompt' and 'completion' is missing .it has 'input', 'output'"),
        ("prompt,completion\na,\n", "line 2: 'completion' is empty"),
        ("prompt,completion,end\na,b,yes\n", "line 2: 'end' is 'yes'; it must be true or false"),
        ("prompt,completion\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_bad_csv_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_rows(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rows", [TEXTS, [{"prompt": MESSAGES, "completion": ANSWER, "focus": ["a", "b"], "id": 3}]])
def test_parquet_as_datasets_writes_it(tmp_path, rows):
    disable_progress_bars()
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    read = read_rows(path)
    assert read == rows
    assert (read.numbers, read.unit) == (list(range(1, len(rows) + 1)), "row")


def test_bad_parquet_is_named_with_its_row(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="rows.parquet is no Parquet file that can be read") as raised:
        read_rows(path)
    assert "\n" not in str(raised.value)
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), path)
    with pytest.raises(ValueError, match="rows.parquet, row 2: 'completion' is NoneType; it must be text"):
        read_rows(path)
    parquet.write_table(pyarrow.table({"prompt": [1, 2], "completion": ["c", "d"]}), path)
    with pytest.raises(ValueError, match="rows.parquet, row 1: 'prompt' is int; it must be text"):
        read_rows(path)
