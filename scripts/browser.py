"""A Chromium for the browser tests.

It is the system's, playwright's own, or one that is installed now.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
HELP = """\
The browser tests need Chromium, and none could be installed. Either of these gives one:
    apt install chromium              (Debian, Ubuntu)
    brew install --cask chromium      (macOS)
or set CHROMIUM to the path of a Chromium or Chrome that you have."""


def find() -> str | None:
    """The path of a browser that stands on this machine."""
    named = os.environ.get("CHROMIUM")
    if named:
        if not shutil.which(named):
            raise SystemExit(f"CHROMIUM={named!r} is not a program that can be run")
        return named
    on_path = next((path for path in map(shutil.which, NAMES) if path), None)
    return on_path or (str(MAC) if MAC.exists() else None) or playwright_browser()


def playwright_browser() -> str | None:
    """The browser that `playwright install chromium` downloads, when it is there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        path = p.chromium.executable_path
    return path if Path(path).exists() else None


def install() -> None:
    """Try the package manager where we may use it, then playwright's own download."""
    quiet = {"stdout": subprocess.DEVNULL, "check": False}
    if shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "chromium"], env=environment, **quiet
        )
    if find() is None:
        subprocess.run(
            [sys.executable, "-m", "playwright", "install", "chromium"], **quiet
        )


def ensure() -> str:
    """A browser's path; it is installed when there is none."""
    if find() is None:
        print("Installing Chromium for the browser tests …", flush=True)
        install()
    path = find()
    if path is None:
        raise SystemExit(HELP)
    return path


if __name__ == "__main__":
    print(ensure())
