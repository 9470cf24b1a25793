"""The picture of generated images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rediffuse.figures.grid import WHITE, grid, strip
from rediffuse.figures.text import annotate, legible
from rediffuse.images.files import save_png
from rediffuse.images.sample_sets import Samples

COLUMNS = 10
ROWS = 50  # classes shown, at most


def draw_samples(samples: Samples, class_names: Sequence[str], folder: Path) -> None:
    """Write samples.png: the first images, in one row for each class if they have labels."""
    images, labels = samples.images, samples.labels
    if labels is None:
        picture = grid(images[: COLUMNS**2], COLUMNS)
    else:
        shown = legible(class_names)[:ROWS]
        table = np.full((len(shown), COLUMNS, *images.shape[1:]), WHITE, np.uint8)
        for label, row in enumerate(table):
            found = images[np.flatnonzero(labels == label)[:COLUMNS]]
            row[: len(found)] = found
        note = f"the first {len(shown)} of {len(class_names):,} classes"
        picture = annotate(strip(table), shown, [note] if len(class_names) > ROWS else [])
    save_png(picture, folder / "samples.png")
