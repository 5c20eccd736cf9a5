"""A real browser for the tests and benchmarks of pages: Debian's Chromium, driven by Playwright.

`python tests/chromium.py install` installs it with apt where there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PACKAGE = "chromium"


def find_browser() -> str | None:
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Playwright's Browser. Nothing is fetched: it is told to be offline by every page that asks for it."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no sandbox, as in a container
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def install() -> None:
    """Install the browser with apt where it is missing; SystemExit says what is needed where that cannot be done."""
    if find_browser():
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", PACKAGE]
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        sys.exit(f"no Chromium is installed: as root run {' '.join(command)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "--quiet"], check=True, stdout=sys.stderr)
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit("usage: python tests/chromium.py install")
    install()
