"""`peft-star report`: the file that it writes, and one sentence for what it refuses."""

from __future__ import annotations

from pathlib import Path

from support.command_line import Run, is_one_sentence, names


def test_a_report_is_one_file(run: Run, patch: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    result = run("report", patch, "-o", output)
    assert (result.code, result.out) == (0, "") and str(output) in result.err
    page = output.read_text("utf-8")
    assert page.startswith("<!doctype html>") and "2 <small>of 2</small>" in page
    assert names(tmp_path) == ["report.html"]
    result = run("report", patch, "-o", output, "--overwrite", "--json")
    assert result.json == {"patch": str(patch), "output": str(output), "bytes": len(page.encode())}


def test_what_is_no_earlier_report_is_not_replaced(run: Run, patch: Path, tmp_path: Path) -> None:
    output = tmp_path / "thesis.html"
    output.write_text("<!doctype html>\n<p>years of work")
    for options in ((), ("--overwrite",)):
        result = run("report", patch, "-o", output, *options)
        assert result.code == 2 and is_one_sentence(result)
    assert "years of work" in output.read_text()


def test_what_is_no_patch_is_2(run: Run, tiny_dir: Path, tmp_path: Path) -> None:
    for patch in (tiny_dir, "./nowhere"):
        result = run("report", patch, "-o", tmp_path / "report.html")
        assert result.code == 2 and is_one_sentence(result), result.err
    assert names(tmp_path) == []


def test_the_ledger_is_a_time_line(run: Run, twice: Path, tmp_path: Path) -> None:
    result = run("report", twice, "-o", tmp_path / "report.html")
    assert result.code == 0, result.err
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "the second" in page and page.count("failing tokens solved") >= 3
