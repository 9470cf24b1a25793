"""Images above the training images that are nearest to them: what a nearest-neighbour number looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rediffuse.figures.grid import WHITE, Picture, annotate, strip
from rediffuse.images.files import save_png
from rediffuse.images.image_set import ImageSet

Record = Mapping[str, Any]

CELL = 84  # pixels, at least, of an enlarged image: room for the ratio below it
GAP = 24  # between two blocks
RATIO = "d1 / d2"


@dataclass(frozen=True, eq=False)
class Neighbours:
    """n images with their neighbours: images, nearest, second (each uint8 (n, C, H, W)) and ratio (n,), the quotient of the distances."""

    images: Picture
    nearest: Picture
    second: Picture
    ratio: NDArray[np.float64]

    @classmethod
    def of(cls, closest: Sequence[Mapping[str, Any]], images: Picture, train: Picture) -> Neighbours:
        """Those that a record names as `closest`: rows of the images and of their two nearest training images, and the ratios."""
        rows, ratio = [each["index"] for each in closest], np.array([each["ratio"] for each in closest])
        first, second = np.array([each["nearest"] for each in closest]).T
        return cls(images[rows], train[first], train[second], ratio)

    def __post_init__(self) -> None:
        shapes = {self.images.shape, self.nearest.shape, self.second.shape}
        if len(shapes) > 1 or len(self.ratio) != len(self.images) or not len(self.ratio):
            raise ValueError(f"need as many neighbours and ratios as images, at least one, got {shapes} and {self.ratio.shape}")


def draw_neighbours(record: Record, reference: Record, samples: Picture, train: ImageSet, test: ImageSet, folder: Path) -> None:
    """Write neighbours.png: of the samples and, as calibration, of real test images those that look most like copies."""
    generated = Neighbours.of(record["closest"], samples, train.images)
    real = Neighbours.of(reference["closest"], test.images, train.images)
    save_png(pairs({"generated": generated, "real, unseen": real}), folder / "neighbours.png")


def pairs(blocks: Mapping[str, Neighbours], pad: int = 2) -> Picture:
    """A block for each name, e.g. generated images and, as calibration, real test images: one column for each image.

    From top to bottom: the image, its nearest and its second nearest training image, and d1 / d2, the distance to the nearest over that
    to the second nearest: 0 is an exact copy, below 1/3 counts as a copy, near 1 are two neighbours alike.
    """
    pictures = [_block(name, neighbours, pad) for name, neighbours in blocks.items()]
    wide = max(picture.shape[1] for picture in pictures)
    rows = []
    for picture in pictures:  # flush right: the columns of all blocks stand below each other
        rows.append(np.pad(picture, ((0, 0), (wide - picture.shape[1], 0), (0, 0)), constant_values=WHITE))
        rows.append(np.full((GAP, wide, picture.shape[2]), WHITE, np.uint8))
    return np.concatenate(rows[:-1])


def _block(name: str, neighbours: Neighbours, pad: int) -> Picture:
    images = np.stack([neighbours.images, neighbours.nearest, neighbours.second])
    picture = strip(images, pad, scale=max(1, -(-CELL // images.shape[-1])))
    page = annotate(picture, [name, "nearest in train", "second nearest"], [f"{ratio:.3f}" for ratio in neighbours.ratio])
    title = annotate(np.full((len(page) - len(picture), 1, page.shape[2]), WHITE, np.uint8), [RATIO])
    left = page.shape[1] - picture.shape[1]
    page = page.copy()
    page[len(picture) :, left - title.shape[1] + 1 : left] = title[:, :-1]  # below the names of the rows
    return page
