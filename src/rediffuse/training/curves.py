"""Training curves as CSV for DVC's plots: one row for each logged point, `images` (seen so far) first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rediffuse.runtime.files import write_csv

Row = dict[str, float]


@dataclass
class Curves:
    """What training measured: rows of `images` seen and one value per column."""

    training: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)


def write_curves(folder: Path, curves: Curves) -> None:
    """Write training.csv and validation.csv."""
    write_curve(folder / "training.csv", curves.training)
    write_curve(folder / "validation.csv", curves.validation)


def write_curve(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, each with `images`.  Columns are in order of appearance; a missing value is left empty.

    Numbers read back exactly.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "images"))
    values = [[repr(float(row[name])) if name in row else "" for name in columns] for row in rows]
    table = ([int(row["images"]), *cells] for row, cells in zip(rows, values, strict=True))
    write_csv(path, ["images", *columns], table)
