"""Images above the training images that are nearest to them: what a nearest-neighbour number looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rediffuse.figures.grid import WHITE, Picture, annotate, strip

Integers = NDArray[np.int64]

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
    def of(cls, images: Picture, train: Picture, index: Integers, ratio: NDArray[np.float64], rows: Integers) -> Neighbours:
        """Those of the images at these rows; index: (N, 2), of the two nearest training images of each image; ratio: (N,)."""
        first, second = index[rows].T
        return cls(images[rows], train[first], train[second], ratio[rows])

    def __post_init__(self) -> None:
        shapes = {self.images.shape, self.nearest.shape, self.second.shape}
        if len(shapes) > 1 or len(self.ratio) != len(self.images) or not len(self.ratio):
            raise ValueError(f"need as many neighbours and ratios as images, at least one, got {shapes} and {self.ratio.shape}")


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
