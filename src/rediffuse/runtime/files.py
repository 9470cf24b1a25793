"""Files written atomically, whose bytes depend only on their content."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rediffuse.runtime.errors import UserError


def dvc_root() -> Path:
    """Return the root of the checkout, also for a stage that DVC runs in a temporary workspace (`--temp`)."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a file atomically, and make its folder.  Readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a mapping.  Raises UserError, with the remedy, for a file that is missing or damaged."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it must hold a mapping, got {type(values).__name__}: {remedy}")
    return values


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write nested numbers and text, keys in the order given.  Raises UserError for NaN and infinity."""
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path} is not written: one of its numbers is not finite ({error})") from None
    replace_file(path, (text + "\n").encode())


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; numbers read back exactly."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    replace_file(path, text.getvalue().encode())


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of `source`, if it exists, into `target`."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
