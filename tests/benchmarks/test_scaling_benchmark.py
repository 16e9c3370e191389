"""The rows of the scaling benchmark."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scaling  # noqa: E402


def test_of_rows_with_the_same_prompt_one_is_taken(tmp_path):
    rows = [{"prompt": f"p{number % 3}", "completion": f"c{number}"} for number in range(6)]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "inference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scaling.all_rows(tmp_path, ["task"], demonstrations=0, seed=0)
    assert sorted(row["prompt"] for row in found) == [f"# p{number}\n" for number in range(3)]
    assert all({"prompt": row["prompt"][2:-1], "completion": row["completion"]} in rows for row in found)
