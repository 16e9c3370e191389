"""The core tests with the oldest and the newest PEFT and transformers that pyproject.toml allows, each in an
environment of its own that lies on top of .venv: `make test-versions`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("peft", "transformers")
CORE = ["tests/test_extension_points.py", "tests/test_registration.py", "tests/whole/test_peft_promises.py"]
CORE += ["tests/tuner", "tests/test_loading.py"]


def wanted() -> dict[str, list[str]]:
    """What pip is to install, by environment: the lowest versions allowed, and whatever is newest."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # Python 3.10 cannot read TOML
    requirements = re.findall(rf'^    "((?:{"|".join(PACKAGES)})>=[^"]*)",$', project, re.MULTILINE)
    assert len(requirements) == len(PACKAGES), requirements
    oldest = [re.sub(r">=([\d.]+).*", r"==\1", item) for item in requirements]
    return {"oldest": oldest, "newest": requirements}


def build(name: str, requirements: list[str]) -> Path:
    """An environment that finds in .venv all that it has not itself; returns its Python."""
    directory = ROOT / ".venv-versions" / name
    venv.create(directory, clear=True, with_pip=False)
    below = sysconfig.get_path("purelib")
    own = directory / Path(below).relative_to(sys.prefix)
    (own / "below.pth").write_text(below + "\n")
    python = directory / Path(sys.executable).relative_to(sys.prefix)
    subprocess.run([python, "-m", "pip", "install", "-q", "-U", *requirements], check=True)
    return python


def versions_of(python: Path) -> str:
    told = "import sys; from importlib.metadata import version; print(*(f'{n} {version(n)}' for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", told, *PACKAGES], check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    failed = []
    for name, requirements in wanted().items():
        python = build(name, requirements)
        versions = versions_of(python)
        print(f"== {name}: {versions}", flush=True)
        if versions == versions_of(Path(sys.executable)):
            print("as in .venv, with which `make test` runs all tests", flush=True)
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
        command = [python, "-m", "pytest", "-q", *workers, "-p", "no:cacheprovider", *(sys.argv[1:] or CORE)]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            failed.append(name)
    print(f"Failed: {', '.join(failed)}" if failed else "The oldest and the newest pass.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
