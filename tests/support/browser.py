"""A real browser without a window, where there is one: Chromium, as Debian and others package it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DARK, LIGHT = 0, 1


class Browser:
    """Runs Chromium over a file. It has a profile of its own, and reaches no network."""

    def __init__(self, program: str, profile: Path) -> None:
        self.command = [
            program,
            "--headless",
            "--no-sandbox",  # a container's root may not have one
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
        ]

    def __call__(self, page: Path, *options: str) -> str:
        done = subprocess.run(
            [*self.command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    def dom(self, page: Path, width: int = 1000) -> str:
        """The page as it is when its scripts, if any, have run."""
        return self(page, "--dump-dom", f"--window-size={width},800")

    def picture(self, page: Path, target: Path, width: int = 1000, scheme: int = LIGHT) -> None:
        self(
            page,
            f"--screenshot={target}",
            f"--window-size={width},1200",
            f"--blink-settings=preferredColorScheme={scheme}",
        )

    def print(self, page: Path, target: Path) -> None:
        self(page, f"--print-to-pdf={target}", "--no-pdf-header-footer")


def find_browser(profile: Path) -> Browser:
    """The browser of this machine; without one, the test is skipped."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        program = shutil.which(name)
        if program:
            return Browser(program, profile)
    pytest.skip("There is no Chromium here.")
