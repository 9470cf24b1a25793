"""Training curves as CSV: one row per logged point, `images` (seen so far) first.  DVC's templates draw them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rediffuse.runtime.files import replace_file


def write_curves(path: str | Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the rows, each with `images`; a value that a row lacks (a validation loss between validations) is left empty.

    Columns stand in the order in which they first appear.  Numbers are written so that they read back exactly.
    """
    columns = list(dict.fromkeys(["images", *(column for row in rows for column in row)]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        images = row["images"]
        if images != int(images):
            raise ValueError(f"images must be a whole number, got {images}")
        writer.writerow([int(images), *(repr(float(row[column])) if column in row else "" for column in columns[1:])])
    replace_file(path, text.getvalue().encode())


def read_curves(path: str | Path) -> list[dict[str, float]]:
    """The rows of `write_curves`, without the empty values; no rows for a table of another kind, which has no `images` in front."""
    with Path(path).open(newline="") as file:
        table = csv.DictReader(file)
        if not table.fieldnames or table.fieldnames[0] != "images":
            return []
        return [{column: float(value) for column, value in row.items() if value} for row in table]
