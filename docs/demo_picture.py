"""Draw docs/demo.svg, the README's picture of what `peft-star demo` prints: python docs/demo_picture.py"""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 104


def main() -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(WIDTH)}
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "peft_star", "demo", "--output", f"{directory}/peft-star-demo"]
        printed = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=True).stderr
    printed = printed.replace(f"{directory}/", "").replace("\r", "")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    text = Text.from_ansi(printed)
    # what libraries of this machine say when they are imported is not the demo's
    console.print(text[text.plain.index("1. What") :])
    target = Path(__file__).parent / "demo.svg"
    svg = console.export_svg(title="peft-star demo")
    # a picture in a README may not fetch fonts: let the reader's monospace font serve
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
    target.write_text(svg)
    print(f"Wrote {target}.")


if __name__ == "__main__":
    main()
