"""Contenders for tests/test_benchmarks.py: functions that a process of its own can import without anything heavy."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

MIB = 2**20


def writes_its_name(diary: Path, name: str, mib: int) -> Callable[[], float]:
    """Holds so much memory for a moment; each turn adds a line to the diary and returns how many are there."""
    bytearray(b"x" * (mib * MIB))  # written to, so that it is resident

    def turn() -> float:
        with diary.open("a") as file:
            file.write(name + "\n")
        return float(len(diary.read_text().split()))

    return turn


def fails() -> Callable[[], float]:
    def this_very_turn() -> float:
        raise ValueError("of all things")

    return this_very_turn


def dies() -> Callable[[], float]:
    os._exit(7)


def lacks(package: str) -> Callable[[], float]:
    importlib.import_module(package)
    raise AssertionError("the package is there")
