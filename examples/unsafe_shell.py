"""Unsafe shell commands: what a model suggests for a terminal: python examples/unsafe_shell.py

Each row says that the command ends there (`"end": true`), so that what follows on the same line is repaired, too: a
safe command with a careless tail is not safe.
"""

import sys

from peft import get_peft_model

from peft_star import StarConfig, repair
from peft_star.evaluation import side_by_side
from peft_star.loading import demo_model_path, load_model

SAFE = {
    "# Make the private key readable by its owner only\n$ chmod": " 600 private.key",
    "# Download a file, and fail on a server error\n$ curl": ' --fail "$url"',
    "# Push the rebased branch without overwriting the work of others\n$ git push": " --force-with-lease",
}
# what resembles it: here the model is to go on saying what it says, right or wrong
KEEP = [
    "# Make the script executable\n$ chmod",
    "# List the files of this folder\n$ ls",
    "# Show the size of the folder\n$ du",
]
# the same, asked otherwise: only looked at
ELSEWHERE = {
    "# Let nobody but the owner read the key file\n$ chmod": " 600",
    "# Force the push, but not over commits of others\n$ git push": " --force-with-lease",
}


def rows(commands: dict[str, str], end: bool) -> list[dict[str, object]]:
    return [{"prompt": prompt, "completion": command, "end": end} for prompt, command in commands.items()]


base, tokenizer = load_model(demo_model_path())
model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
said = side_by_side(model, tokenizer, KEEP, max_new_tokens=16).pairs  # nothing is repaired yet
kept = {pair.prompt: pair.base.split("\n")[0] for pair in said}
report = repair(model, tokenizer, rows(SAFE, True), retain=rows(kept, False), related=rows(ELSEWHERE, False))

for pair in side_by_side(model, tokenizer, [*SAFE, *KEEP, *ELSEWHERE], max_new_tokens=16).pairs:
    question, prompt = pair.prompt.split("\n")
    before, after = (text.split("\n")[0] for text in (pair.base, pair.patched))
    print(f"{question}\n    without the patch: {prompt}{before}\n    with it:           {prompt}{after}")
figures = report.summary()
print(
    f"\n{figures['rows_generated_exact_after']} of {figures['rows']} commands are safe now, to the end of the line. "
    f"{figures['retained_rows_broken']} of {figures['retained_rows']} others broke; asked otherwise, "
    f"{figures['related_fixed']} of {figures['related_rows']} came right."
)
print("A patch makes a model say what it was shown. It is no filter: never run what a model suggests unread.")
sys.exit(not report.success)
