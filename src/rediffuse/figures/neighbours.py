"""Images above the training images that are nearest to them: what a nearest-neighbour number looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rediffuse.figures.grid import WHITE, Picture, strip
from rediffuse.figures.text import annotate
from rediffuse.images.files import save_png
from rediffuse.images.image_set import ImageSet

Record = Mapping[str, Any]

CELL = 84  # pixels, at least, of an enlarged image: room for the ratio below it
GAP = 24  # between the two blocks
RATIO = "d1 / d2"


def draw_neighbours(
    record: Record, reference: Record, samples: Picture, train: ImageSet, test: ImageSet, folder: Path
) -> None:
    """Write neighbours.png: the samples most like copies and, as calibration, such real test images.

    One column for each image.  From top to bottom: the image, its nearest and its second nearest training
    image, and d1 / d2, the ratio of their distances.  0 is an exact copy, below 1/3 counts as a copy, near 1
    both are equally far.
    """
    generated = _block("generated", record["closest"], samples, train.images)
    real = _block("real, unseen", reference["closest"], test.images, train.images)
    wide = max(generated.shape[1], real.shape[1])
    # Aligned on the right, so that the columns of both blocks match.
    above, below = (
        np.pad(block, ((0, 0), (wide - block.shape[1], 0), (0, 0)), constant_values=WHITE)
        for block in (generated, real)
    )
    gap = np.full((GAP, *above.shape[1:]), WHITE, np.uint8)
    save_png(np.concatenate([above, gap, below]), folder / "neighbours.png")


def _block(name: str, closest: Sequence[Record], images: Picture, train: Picture) -> Picture:
    """Return the picture of the images that a record lists as `closest`."""
    first, second = np.array([each["nearest"] for each in closest]).T
    shown = np.stack([images[[each["index"] for each in closest]], train[first], train[second]])
    picture = strip(shown, scale=max(1, -(-CELL // shown.shape[-1])))
    ratios = [f"{each['ratio']:.3f}" for each in closest]
    page = annotate(picture, [name, "nearest in train", "second nearest"], ratios).copy()
    title = annotate(np.full((len(page) - len(picture), 1, page.shape[2]), WHITE, np.uint8), [RATIO])
    left = page.shape[1] - picture.shape[1]
    page[len(picture) :, left - title.shape[1] + 1 : left] = title[:, :-1]  # below the names of the rows
    return page
