"""What is written down of the package in several places agrees."""

import re
import subprocess
from pathlib import Path

import pytest

import peft_star

ROOT = Path(__file__).parents[1]


def test_the_version_is_everywhere_the_same():
    version = peft_star.__version__
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert 'version = { attr = "peft_star.__version__" }' in (ROOT / "pyproject.toml").read_text()


def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    try:
        listed = subprocess.run(["make", "-s", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("there is no make here")
    assert re.findall(r"^  make (\S+) ", listed, re.MULTILINE) == phony


def test_what_is_supported_of_peft_is_said_twice_alike():
    from peft_star.registration import SUPPORTED_PEFT

    assert f'"peft{SUPPORTED_PEFT}"' in (ROOT / "pyproject.toml").read_text()
