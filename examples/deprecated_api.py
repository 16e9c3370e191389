"""A deprecated API across a code base: what the model completes before and after: python examples/deprecated_api.py

Python 3.12 removed `assertEquals`. A model that completes code in a project that is full of it goes on writing it. Two
files of the project are enough to repair that; the other files tell whether it carried over.
"""

import re
import sys
from pathlib import Path

from peft import get_peft_model

from peft_star import StarConfig, repair
from peft_star.evaluation import side_by_side
from peft_star.loading import demo_model_path, load_model

CODE_BASE = Path(__file__).parent / "code_base"
OLD, NEW = "assertEquals(", "assertEqual("
REPAIRED_FROM = ("test_bank.py", "test_slug.py")


def rows_of(path: Path, old: str, new: str) -> list[dict[str, str]]:
    """A row for each call but the first: the file up to it, and what should stand there."""
    text = path.read_text()
    starts = [found.start() for found in re.finditer(re.escape(old), text)]
    return [{"prompt": text[:start], "completion": new, "problem": OLD.strip("(")} for start in starts[1:]]


files = sorted(CODE_BASE.glob("test_*.py"))
failures = [row for path in files if path.name in REPAIRED_FROM for row in rows_of(path, OLD, NEW)]
related = [row for path in files if path.name not in REPAIRED_FROM for row in rows_of(path, OLD, NEW)]
# calls that look alike and are right, in the same files
retained = [
    {"prompt": text[: found.start()], "completion": found[0]}
    for text in (path.read_text() for path in files)
    for found in re.finditer(r"(?<=self\.)assert(?!Equals)\w+\(", text)
]
print(f"{len(files)} files; to repair {len(failures)} rows, to look at {len(related)}, to keep {len(retained)}.")

base, tokenizer = load_model(demo_model_path())
model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
report = repair(model, tokenizer, failures, retain=retained, related=related)
print(report.to_markdown())

result = side_by_side(model, tokenizer, [row["prompt"] for row in related], max_new_tokens=8)
for pair in result.pairs:
    before, after = (text.split("\n")[0] for text in (pair.base, pair.patched))
    print(f"...{pair.prompt.splitlines()[-1].strip():8} {before:32} -> {after}")
figures = report.summary()
print(
    f"\nRepaired: {figures['rows_exact_after']} of {figures['rows']} rows. Elsewhere in the code base: "
    f"{figures['related_fixed']} came right and {figures['related_broken']} broke, of {figures['related_rows']}; "
    f"of {figures['retained_rows']} other assertions {figures['retained_rows_broken']} broke."
)
print("An assertion that the base model itself gets wrong protects nothing: see the report's rows.")
sys.exit(not report.success)
