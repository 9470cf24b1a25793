"""Contenders for tests/test_benchmarks.py, which another process can import without anything heavy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def writes_its_name(diary: Path, name: str, mib: int) -> Callable[[], float]:
    """Hold so much memory for a moment.  Each turn adds a line to the diary and returns their number."""
    b"x" * (mib * 2**20)  # written to, so that it is resident

    def turn() -> float:
        with diary.open("a") as file:
            file.write(name + "\n")
        return float(len(diary.read_text().split()))

    return turn


def dies() -> Callable[[], float]:
    os._exit(7)
