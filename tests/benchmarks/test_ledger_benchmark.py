"""The benchmark of repairs one after another, on a tiny model: it runs, and goes on where it stopped."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ledger  # noqa: E402


def test_repairs_in_succession_are_measured(monkeypatch, tiny_dir, tmp_path, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "c"}\n{"prompt": "xyz", "completion": "!"}\n')
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "q r s", "target_new": "t", "ground_truth": "u"}\n')
    results = tmp_path / "ledger.json"
    arguments = '{"learning_rate": 0.05, "max_steps": 200, "reach": "prompt"}'
    words = ["--model", str(tiny_dir), "--rows", str(rows), "--facts", str(facts), "--count", "3"]
    monkeypatch.setattr(sys, "argv", ["ledger.py", *words, "--arguments", arguments, "--json", str(results)])
    ledger.main()
    found = json.loads(results.read_text())["results"]
    assert found.keys() == {*ledger.WAYS, "without 0", "without 1", "without 2"}
    assert found["rows"]["right"] == [True] * 3 and len(found["nothing"]["records"]) == 3
    assert [found[f"without {n}"]["row"] for n in range(3)] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "| rows | 3 of 3 |" in printed and "Equal verdicts in both orders: 3 of 3 rows." in printed
    assert "Taken out, one at a time: 3 repairs" in printed
    monkeypatch.setattr(ledger, "succession", lambda *args: 1 / 0)  # nothing is measured twice
    ledger.main()
    assert capsys.readouterr().out == printed
