"""Files written atomically, whose bytes depend on their content alone."""

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


def replace_file(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, making its folder; whoever reads meanwhile sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write nested numbers and text, keys in the order given.  Raises UserError for NaN and infinity, which JSON has no word for."""
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
    """Give `target` the files of the folder `source`, if there is one."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
