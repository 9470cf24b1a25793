"""The picture of generated images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rediffuse.figures.grid import annotate, class_rows, grid
from rediffuse.images.files import save_png
from rediffuse.images.sample_sets import Samples

COLUMNS = 10
ROWS = 50  # classes shown, at most


def draw_samples(samples: Samples, class_names: Sequence[str], folder: Path) -> None:
    """Write samples.png: the first images, a row for each class where they have labels."""
    names = [name.strip() for name in class_names]
    if samples.labels is None:
        picture = grid(samples.images[: COLUMNS**2], COLUMNS, scale=2)
    else:
        shown = names[:ROWS]
        rest = [f"the first {len(shown)} of {len(names):,} classes"] if len(names) > len(shown) else []
        picture = annotate(class_rows(samples.images, samples.labels, len(shown), COLUMNS), shown, rest)
    save_png(picture, folder / "samples.png")
