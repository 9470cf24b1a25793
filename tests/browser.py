"""Pages in a browser, for tests that need one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, PROGRAMS)), None)
# A container has no sandbox for the browser and little /dev/shm.
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
FLAGS += ["--disable-extensions", "--disable-background-networking", "--no-proxy-server"]
FLAGS += ["--virtual-time-budget=60000", "--dump-dom"]

needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {PROGRAMS} is on PATH")


def dump(url: str, folder: Path, *, width: int = 1600, height: int = 4000) -> str:
    """Return the page as HTML once its scripts have run.  Without the screenshot Chromium draws nothing."""
    options = [*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={folder}/profile"]
    options.append(f"--screenshot={folder}/page.png")
    return subprocess.run(
        [str(BROWSER), *options, url], capture_output=True, text=True, timeout=180, check=True
    ).stdout
