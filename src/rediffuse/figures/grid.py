"""Images side by side: uint8 (N, C, H, W) in, one uint8 picture (height, width, C) out.

C = 1 is grey, C = 3 is RGB.  Images are enlarged by repeating pixels (`scale`), so that each pixel of the
model stays one square.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

WHITE = 255  # gaps, margins and cells without an image
GAP = 2  # pixels around each image


def grid(images: Picture, columns: int, scale: int = 2) -> Picture:
    """Return the images row by row, `columns` to a row, with white gaps between them.

    images: uint8 (N, C, H, W).  Returns (rows (scale H + 2) + 2, columns (scale W + 2) + 2, C).
    """
    n, c, h, w = images.shape
    rows, high, wide = -(-n // columns), scale * h + GAP, scale * w + GAP
    cells = np.full((rows * columns, c, high, wide), WHITE, np.uint8)
    cells[:n, :, GAP:, GAP:] = images.repeat(scale, axis=2).repeat(scale, axis=3)
    by_position = cells.reshape(rows, columns, c, high, wide).transpose(0, 3, 1, 4, 2)
    picture = by_position.reshape(rows * high, columns * wide, c)
    return np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=WHITE)


def strip(images: Picture, scale: int = 2) -> Picture:
    """Return rows of images as a grid.  images: uint8 (rows, columns, C, H, W)."""
    return grid(images.reshape(-1, *images.shape[2:]), images.shape[1], scale)


def reconstructions(originals: Picture, decoded: Picture, columns: int) -> Picture:
    """Return rows of originals, each above the row of their reconstructions.  Both are uint8 (N, C, H, W)."""
    shape = originals.shape[1:]
    blank = np.full((-len(originals) % columns, *shape), WHITE, np.uint8)  # fills the last rows
    parts = [np.concatenate([part, blank]).reshape(-1, columns, *shape) for part in (originals, decoded)]
    return strip(np.stack(parts, axis=1).reshape(-1, columns, *shape))
