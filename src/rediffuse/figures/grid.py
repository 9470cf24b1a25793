"""Images side by side: uint8 (N, C, H, W) in, one uint8 picture (height, width, C) out.

C = 1 is grey, C = 3 is RGB.  Images are enlarged by repeating pixels (`scale`), so that each pixel of the
model stays one square.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rediffuse.images.files import to_pil

Picture = NDArray[np.uint8]

WHITE = 255  # gaps, margins and cells without an image
GAP = 2  # pixels around each image
FONT_SIZE = 12
LONGEST = 40  # characters of a name


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


def annotate(picture: Picture, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Picture:
    """Write names to the left of evenly spaced rows and below evenly spaced columns, in black on white."""
    high, wide, c = picture.shape
    font, rows = ImageFont.load_default(FONT_SIZE), [shortened(name) for name in rows]
    left = max((int(np.ceil(font.getlength(name))) for name in rows), default=-6) + 6
    below = FONT_SIZE + 6 if columns else 0
    page = Image.new("L" if c == 1 else "RGB", (left + wide, high + below), "white")
    page.paste(to_pil(picture.transpose(2, 0, 1)), (left, 0))
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(rows):
        draw.text((left - 3, (i + 0.5) * high / len(rows)), name, "black", font, anchor="rm")
    for i, name in enumerate(columns):
        x = left + (i + 0.5) * wide / len(columns)
        draw.text((x, high + below / 2), name, "black", font, anchor="mm")
    return np.asarray(page).reshape(high + below, left + wide, c)


def shortened(name: str) -> str:
    """Return a name, for example of a class, on one line and cut to a length that fits into a picture."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
