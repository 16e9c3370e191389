"""A patch's page: what it shows, that a stranger's texts cannot act in it, and how a real browser draws it."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from peft_star.report import (
    BrokenToken,
    ChangedText,
    FailureRecord,
    PatchedLayer,
    ProblemRecord,
    RepairReport,
    RowRecord,
)
from peft_star.sharing.page import MAGIC, SHOWN_ROWS, patch_page
from peft_star.sharing.page_map import CELLS, neuron_map
from peft_star.sharing.page_texts import Piece, changed, failing
from peft_star.sharing.patch_files import REPORT_NAME, Patch, write_adapter
from support.browser import DARK, LIGHT, Browser, find_browser

EVIL = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}\x1b[2J\u202e"
SHOWN_EVIL = html.escape("<script>document.title='owned'</script>").replace("&#x27;", "&#39;")
NAMES = [f"model.layers.{index}.mlp.down_proj" for index in (2, 3)]


def write_patch(directory: Path, report: RepairReport | None = None, **config: Any) -> Path:
    directory.mkdir()
    tensors = {}
    for number, name in enumerate(NAMES):
        tensors[f"{name}.star_neurons"] = torch.tensor([0, 7, 900 + number], dtype=torch.int32)
        tensors[f"{name}.star_delta"] = torch.arange(6, dtype=torch.float32).reshape(3, 2) * (1 + number)
    base = {"peft_type": "STAR", "base_model_name_or_path": "org/base", "in_features": 1536}
    write_adapter(directory, {**base, **config}, tensors)
    if report:
        report.save(directory / REPORT_NAME)
    return directory


def row(source: str, number: int = 0, **changes: Any) -> RowRecord:
    values = {"prompt": "result =", "completion": " pd.concat(x)", "tokens": 4, "right_before": 3, "right_after": 4}
    flags = {"exact_before": False, "exact_after": True}
    said = {"generated_before": " df.append(x)", "generated_after": " pd.concat(x)"}
    exact = {"generation_exact_before": False, "generation_exact_after": True}
    return RowRecord(source, number, **{**values, **flags, **said, **exact, **changes})


def kept(source: str, number: int = 0, **changes: Any) -> RowRecord:
    right = {"right_before": 4, "exact_before": True, "generated_before": " pd.concat(x)"}
    return row(source, number, **{**right, "generation_exact_before": True, **changes})


def failure(number: int = 0, **changes: Any) -> FailureRecord:
    texts = {"context": "result =", "expected": " pd", "expected_id": 1, "before": " df", "before_id": 2}
    after = {"after": " pd", "after_id": 1, "gap_before": -0.5, "gap_after": 0.5, "solved": True}
    return FailureRecord(number, **{"position": 3, **texts, **after, **changes})


def test_rows_are_called_as_people_count_them(tmp_path: Path) -> None:
    broken = [BrokenToken("retain", 0, 3, "behind this", "wanted", 1, "another", 2)]
    rows = [row("failures", line=7, id="BUG-12"), kept("retain", line=3)]
    text = text_of(patch_page(write_patch(tmp_path / "p", full_report(rows=rows, broken=broken))))
    assert "row 7 (BUG-12)" in text and "row 3" in text and "retain 3 behind this" in text


def full_report(**changes: Any) -> RepairReport:
    rows = [row("failures", problem="concat", goes_on="\n\nprint(x)"), kept("retain"), row("related")]
    problem = ProblemRecord("concat", rows=1, failures=1, solved=1, rows_exact_after=1, warnings=["Look out."])
    problem.add_act("focus", [" df"], [NAMES[0]])
    problem.add_act("failing position", [" ="], [NAMES[1]])
    layers = [PatchedLayer(name, [0, 7], 1.0) for name in NAMES]
    told = {"problems": [problem], "arguments": {"reach": "problem"}, "versions": {"torch": "2.13"}}
    done = {
        "failures": [failure()],
        "rows": rows,
        "broken": [],
        "layers": layers,
        "steps": 2,
        "seconds": {"patch": 1.5},
    }
    return RepairReport(**{**done, **told, **changes})


def text_of(page: str) -> str:
    """What a reader sees, roughly."""
    body = page[page.index("<main>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_page_says_what_failed_and_what_it_says_now(tmp_path: Path) -> None:
    page = patch_page(write_patch(tmp_path / "my-patch", full_report()))
    assert page.encode().startswith(MAGIC)
    text = text_of(page)
    for part in ("my-patch", "org/base", "6 neurons in 2 layers", "failing tokens solved 1 of 1", "0 → 1 of 1"):
        assert part in text
    assert '<mark class="bad">df</mark>.<mark class="bad">append</mark>' in page
    assert '<mark class="good">pd</mark>.<mark class="good">concat</mark>' in page
    for part in ("goes on with print(x)", "-0.50 → +0.50", "Look out.", "right before and after", "focus: ·df"):
        assert part in text
    assert "Harm" not in text and "What happened" not in text


def test_a_patch_without_a_report_has_a_page(tmp_path: Path) -> None:
    text = text_of(patch_page(write_patch(tmp_path / "p"), name="you/patch"))
    assert "you/patch" in text and "no repair report" in text and "Where it acts" in text


def test_a_failed_repair_is_not_called_a_repair(tmp_path: Path) -> None:
    said = {"exact_after": False, "generation_exact_after": False, "generated_after": " pd.merge(x)"}
    broken = [BrokenToken("retain", 0, 3, "behind this", "wanted", 1, "another", 2)]
    rows = [row("failures", **said), kept("retain", **said)]
    report = full_report(rows=rows, failures=[failure(solved=False, after=" df", gap_after=-0.1)], broken=broken)
    page = patch_page(write_patch(tmp_path / "p", report))
    text = text_of(page)
    assert "Repaired:" not in text and "Not all is as it should be" in text
    assert "not right" in text and "broken" in text and "behind this" in text
    assert '<mark class="bad">merge</mark>' in page and "wanted pd .concat(x)" in text


def test_rows_that_were_not_generated_show_which_tokens_failed(tmp_path: Path) -> None:
    nothing = {name: None for name in ("generated_before", "generated_after")}
    nothing |= {name: None for name in ("generation_exact_before", "generation_exact_after")}
    report = full_report(rows=[row("failures", **nothing)])
    assert '<mark class="mark"> pd</mark>.concat(x)' in patch_page(write_patch(tmp_path / "p", report))


def test_long_lists_end_somewhere(tmp_path: Path) -> None:
    count = SHOWN_ROWS + 7
    report = full_report(rows=[row("failures", n) for n in range(count)], failures=[failure(n) for n in range(count)])
    page = patch_page(write_patch(tmp_path / "p", report))
    assert page.count("<article") == SHOWN_ROWS and "and 7 more rows" in page


def test_the_ledger_is_a_time_line(tmp_path: Path) -> None:
    entries = [{"time": "2026-01-02", "failures": 12, "norm": 1.23456}, {"time": "2026-02-03", "solved": ["a", "b"]}]
    text = text_of(patch_page(write_patch(tmp_path / "p"), ledger=entries))
    assert "2026-01-02 failures 12 norm 1.235 2026-02-03 solved a, b" in text


def test_the_harm_that_a_report_knows_is_shown(tmp_path: Path) -> None:
    harm = {"kl": 0.00123456, "texts": 8.0, "unchanged": 7.0}  # as a ledger has them
    texts = [ChangedText("The sky is", " blue", " grey", " today.")]
    page = patch_page(write_patch(tmp_path / "p", full_report(harm=harm, changed_texts=texts)))
    text = text_of(page)
    assert "Harm to other text The model's own texts 7 of 8 unchanged" in text and "0.0012 nats a token" in text
    assert 'The sky is<mark class="bad"> blue</mark><mark class="good"> grey</mark> today.' in page


def test_entries_are_shown_whatever_they_hold(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(50):
        deep = {"in": [deep, {"a": 1}]}
    page = patch_page(write_patch(tmp_path / "p"), ledger=[{"changed": [{"at": "the", "now": EVIL}], "deep": deep}])
    assert "changed at now the" in text_of(page)
    assert "<script" not in page and SHOWN_EVIL in page


def evil_patch(directory: Path) -> Path:
    """A patch that says of itself only what could do harm."""

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poison(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        return EVIL if isinstance(value, str) and key != "source" else value

    broken, texts = [BrokenToken("retain", 0, 1, "a", "b", 1, "c", 2)], [ChangedText("a", "b", "c", "d")]
    harm = {"texts": 2, "unchanged": 1, "kl": 0.5}
    write_patch(directory, full_report(broken=broken, changed_texts=texts, harm=harm))
    path = directory / REPORT_NAME
    report = poison(json.loads(path.read_text()))
    report |= {"versions": {EVIL: EVIL}, "seconds": {EVIL: 1.0}, "arguments": {EVIL: [EVIL, {EVIL: EVIL}]}}
    path.write_text(json.dumps(report))
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": EVIL, "base_fingerprint": EVIL, "in_features": EVIL}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_nothing_that_a_patch_says_gets_into_the_page_as_it_is(tmp_path: Path) -> None:
    line = {"time": EVIL + "\ud800", EVIL: EVIL, "x": [{EVIL: EVIL}]}  # no file of a patch may hold that half
    page = patch_page(evil_patch(tmp_path / "p"), name=EVIL, ledger=[line])
    page.encode()  # also a lone surrogate
    assert "<script" not in page and "<img" not in page and "49" not in text_of(page).replace("+0.49", "")
    assert not {"\x1b", "\u202e", "\ud800"} & set(page)
    assert page.count(SHOWN_EVIL) > 20
    # every attribute is quoted, and no text of the patch ends one
    for value in re.findall(r'<[^>]*="([^"]*)"', page[page.index("<main>") :]):
        assert "'" not in value and "<" not in value
    assert "default-src 'none'" in page


def test_words_that_changed_are_marked() -> None:
    assert changed(" df1.append(x)", " pd.append(x)") == [Piece(" "), Piece("df1", True), Piece(".append(x)")]
    assert changed("same", "same") == [Piece("same")]
    assert changed("a\n", "a") == [Piece("a"), Piece("↵\n", True)]
    assert changed("", "a") == []
    long, other = "a " * 900 + "b" + " c" * 90, "a " * 900 + "x" + " c" * 90
    marked = [piece.text for piece in changed(long, other) if piece.marked]
    assert marked == ["b"]


def test_failing_tokens_are_found_in_their_order() -> None:
    found = row("failures", prompt="x =", completion=" a a b")
    failures = [
        failure(context="x = a", expected=" a", position=4),
        failure(context="= a a", expected=" b", position=5),
    ]
    assert failing(found, failures[::-1]) == [Piece(" a"), Piece(" a", True), Piece(" b", True)]
    assert failing(found, [failure(context="not there", expected="?")]) == [Piece(" a a b")]
    assert failing(found, [failure(context="", expected="x")]) == [Piece(" a a b")]  # the prompt's x is none


def test_the_map_shows_where_neurons_are_and_which_were_changed_most(tmp_path: Path) -> None:
    report = full_report()
    found = neuron_map(Patch.read(write_patch(tmp_path / "p", report)), report.problems)
    assert (found.width, found.pattern) == (1536, "model.layers.*.mlp.down_proj")
    assert [(strip.label, strip.neurons, strip.how) for strip in found.strips] == [
        ("2", 3, "focus"),
        ("3", 3, "failing position"),
    ]
    assert [strip.share for strip in found.strips] == [0.5, 1.0]
    # each delta is larger than the one before it, and the second strip's are twice the first's
    assert found.strips[1].paths == ["", "M0 0h1v1h-1z", "", f"M1 0h1v1h-1zM{901 * CELLS // 1536} 0h1v1h-1z"]
    assert found.strips[0].paths[0] == "" and found.strips[0].paths[1] == "M0 0h1v1h-1z"


def test_a_map_of_more_neurons_than_it_was_told(tmp_path: Path) -> None:
    found = neuron_map(Patch.read(write_patch(tmp_path / "p", in_features=3)))
    assert found.width == 902 and all(strip.how == "" for strip in found.strips)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return find_browser(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pages, of a good patch and of an evil one."""
    directory = tmp_path_factory.mktemp("pages")
    long = full_report(rows=[row("failures", prompt="line\n" * 30 + "w" * 300), kept("retain"), row("related")])
    (directory / "good.html").write_text(patch_page(write_patch(directory / "good", long)), encoding="utf-8")
    entries = [{"time": EVIL, "rows": [{"a": EVIL, "b": "w" * 300}]}]
    (directory / "evil.html").write_text(patch_page(evil_patch(directory / "evil"), ledger=entries), encoding="utf-8")
    return directory


def test_a_browser_runs_nothing_of_a_page(browser: Browser, pages: Path) -> None:
    dom = browser.dom(pages / "evil.html")
    assert "<title>evil – a patch" in dom
    assert "<script" not in dom and "<img" not in dom


@pytest.mark.parametrize("name", ["good", "evil"])
@pytest.mark.parametrize("width", [340, 1300])
def test_no_page_is_wider_than_its_window(
    browser: Browser, pages: Path, tmp_path: Path, name: str, width: int
) -> None:
    # Chromium's own windows are 500 pixels wide at least; a frame may be narrower
    page = re.sub(r"<meta http-equiv[^>]*>", "", (pages / f"{name}.html").read_text("utf-8"))
    measure = "document.title = document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    (tmp_path / "frame.html").write_text(
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(page)}"></iframe>'
        f'<script>addEventListener("load", () => {{ {measure} }})</script>',
        encoding="utf-8",
    )
    title = re.search(r"<title>(\d+)</title>", browser.dom(tmp_path / "frame.html", 1400))
    assert title and int(title[1]) == width


def test_a_page_is_light_or_dark_as_the_reader_has_it(browser: Browser, pages: Path, tmp_path: Path) -> None:
    corners = {}
    for scheme in (LIGHT, DARK):
        browser.picture(pages / "good.html", tmp_path / f"{scheme}.png", scheme=scheme)
        with Image.open(tmp_path / f"{scheme}.png") as picture:
            corners[scheme] = picture.convert("RGB").getpixel((2, 2))
    assert min(corners[LIGHT]) > 200 and max(corners[DARK]) < 60


def test_a_page_can_be_printed(browser: Browser, pages: Path, tmp_path: Path) -> None:
    browser.print(pages / "good.html", tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
