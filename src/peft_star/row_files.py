"""Files of failures: JSON Lines, and CSV and Parquet as `datasets` reads and writes them."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import parse_json
from .row_checks import OPTIONAL, FileRows, validate_row


def read_rows(path: str | Path) -> FileRows:
    """Read a file of prompt-completion rows: by its name's end CSV (`.csv`), Parquet (`.parquet`), or JSON Lines.

    All cells of a CSV file are text, whatever they look like, and an empty one is no value; `end` is true or false
    there. Chat messages and several spans of `focus` need one of the other formats.

    Returns:
        `FileRows`: The rows, a list that knows where in the file each of them stands.

    Raises:
        FileNotFoundError, ValueError: One sentence with the file and line that is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; give a JSON Lines, CSV or Parquet file of rows with 'prompt' and 'completion'."
        )
    kind = path.suffix.lower()
    unit = "row" if kind == ".parquet" else "line"
    found = FileRows(path, unit)
    for number, row in {".csv": _read_csv, ".parquet": _read_parquet}.get(kind, _read_json_lines)(path):
        validate_row(row, f"{path}, {unit} {number}")
        found.add(number, row)
    if not found:
        raise ValueError(f"{path} holds no rows; give at least one with 'prompt' and 'completion'.")
    return found


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is compressed; unpack it first (gunzip).")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def _read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    # not splitlines(): JSON text may hold U+2028, which that takes for the end of a line
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except ValueError as error:
            reason = getattr(error, "msg", error)
            raise ValueError(f"{path}, line {number}: not JSON ({reason}); write one object a line.") from None


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # the standard library's reader guesses no types: a completion may well be `None` or `007`
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
        header, start = next(reader, []), 1
        if twice := next((name for name in header if header.count(name) > 1), None):
            raise ValueError(f"{path}, line 1: column {twice!r} is there twice; remove one or rename it.")
        while True:
            start = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {start}: {len(cells)} cells, and the header has {len(header)}; put a text with "
                    "commas, quotes or line ends into quotes."
                )
            yield start, _from_cells(dict(zip(header, cells)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not CSV ({error}).") from None
    finally:
        csv.field_size_limit(limit)


def _from_cells(cells: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {name: value for name, value in cells.items() if value or name not in OPTIONAL}
    if (end := row.get("end", "").lower()) in ("true", "false"):
        row["end"] = end == "true"
    return row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"Reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.read_table(path, memory_map=False).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read ({str(error).splitlines()[0]}).") from None
    yield from enumerate(rows, start=1)
