"""A patch that grows over three releases, and is checked in each: python examples/growing_patch.py

Each release repairs what users have met since the last one, on top of the patch that is out. What earlier releases
repaired is in the patch's ledger: a repair holds it without being given these rows, and `check` runs them all again. A
text that has nothing to do with any of it is looked at, too.
"""

import sys
import tempfile
from pathlib import Path

from peft import get_peft_model

from peft_star import RepairArguments, StarConfig, check, repair
from peft_star.evaluation import TextProbe
from peft_star.loading import demo_model_path, load_model, load_patch

RELEASES = {
    "1.0": [("import pandas as pd\n\n# Append the rows of df2 to df1\nresult =", " pd.concat([df1, df2])")],
    "1.1": [
        ("import requests\n\n# Fetch the page over a checked TLS connection\nr = requests.get(url, verify=", "True)"),
        ("import ssl\n\n# A context that checks certificates\ncontext = ssl.", "create_default_context()"),
    ],
    "1.2": [("import collections\n\n# Check that x is a mapping\nisinstance(x, collections.", "abc.Mapping)")],
}
TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()

folder, patch, failed = Path(tempfile.mkdtemp()), None, False
for release, pairs in RELEASES.items():
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    base, tokenizer = load_model(demo_model_path())
    probe = TextProbe(base, tokenizer, TEXT)  # remembers what the unpatched model says
    model = load_patch(base, patch) if patch else get_peft_model(base, StarConfig(task_type="CAUSAL_LM"))
    report = repair(model, tokenizer, rows, RepairArguments(reach="prompt", note=release, disable_tqdm=True))
    patch = folder / f"patch-{release}"
    model.save_pretrained(patch)

    # what CI would do with the patch that is to be released: load it on the base, and ask everything again
    checked = load_patch(load_model(demo_model_path())[0], patch)
    found, harm = check(checked, tokenizer), probe(checked)
    failed |= not report.success or not found.ok
    print(
        f"{release}: {report.num_solved} of {len(report.failures)} failing tokens solved; "
        f"{len(found.rows) - len(found.regressed)} of {len(found.rows)} rows of all releases right; {harm.broken} of "
        f"{harm.right_before} right tokens of the licence changed, KL {harm.kl:.5f}"
    )
print("Nothing regressed." if not failed else "Something regressed.")
sys.exit(failed)
