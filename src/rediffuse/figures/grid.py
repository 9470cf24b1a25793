"""Images side by side: uint8 (N, C, H, W) in, one uint8 picture (height, width, C) out, C = 1 (grey) or 3 (RGB).

Small images are enlarged by repeating pixels (`scale`), so that each pixel of the model stays one square.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

WHITE = 255  # gaps, margins and cells without an image
LONGEST = 40  # characters of a name


def grid(images: Picture, columns: int, pad: int = 2, scale: int = 1) -> Picture:
    """The images row by row, `columns` to a row, with `pad` white pixels around each.

    images: uint8 (N, C, H, W).  Returns (rows (scale H + pad) + pad, columns (scale W + pad) + pad, C).
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), got {images.dtype} {images.shape}")
    if columns < 1 or pad < 0 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1 and pad at least 0, got {columns}, {scale}, {pad}")
    n, c, h, w = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, c, scale * h + pad, scale * w + pad), WHITE, np.uint8)
    cells[:n, :, pad:, pad:] = images.repeat(scale, axis=2).repeat(scale, axis=3)
    _, _, high, wide = cells.shape
    picture = cells.reshape(rows, columns, c, high, wide).transpose(0, 3, 1, 4, 2).reshape(rows * high, columns * wide, c)
    return np.pad(picture, ((0, pad), (0, pad), (0, 0)), constant_values=WHITE)


def strip(images: Picture, pad: int = 2, scale: int = 2) -> Picture:
    """Rows of images that change from left to right: noising (t = 0 to T), denoising (T to 0), interpolation (a to b).

    images: uint8 (rows, columns, C, H, W).
    """
    if images.ndim != 5:
        raise ValueError(f"images must be (rows, columns, C, H, W), got {images.shape}")
    return grid(images.reshape(-1, *images.shape[2:]), images.shape[1], pad, scale)


def class_rows(images: Picture, labels: NDArray[np.int64], classes: int, columns: int, pad: int = 2, scale: int = 2) -> Picture:
    """One row per class 0, 1, ..., classes - 1, with the first `columns` images of each; cells that a class lacks are white.

    images: uint8 (N, C, H, W).  labels: (N,).
    """
    table = np.full((classes, columns, *images.shape[1:]), WHITE, np.uint8)
    for label in range(classes):
        found = images[np.flatnonzero(labels == label)[:columns]]
        table[label, : len(found)] = found
    return strip(table, pad, scale)


def reconstructions(originals: Picture, decoded: Picture, columns: int, pad: int = 2, scale: int = 2) -> Picture:
    """Rows of originals, each above the row of their reconstructions.  Both uint8 (N, C, H, W), N a multiple of columns."""
    if originals.shape != decoded.shape or len(originals) % columns:
        raise ValueError(f"need as many reconstructions as originals, a multiple of {columns}: {originals.shape}, {decoded.shape}")
    rows = originals.reshape(-1, 1, columns, *originals.shape[1:])
    pairs = np.concatenate([rows, decoded.reshape(rows.shape)], axis=1)
    return grid(pairs.reshape(-1, *originals.shape[1:]), columns, pad, scale)


def annotate(picture: Picture, rows: Sequence[str] = (), columns: Sequence[str] = (), size: int = 12) -> Picture:
    """Write names to the left of evenly spaced rows and below evenly spaced columns, in black on white."""
    high, wide, c = picture.shape
    font, rows = ImageFont.load_default(size), [shortened(name) for name in rows]
    left = max((int(np.ceil(font.getlength(name))) for name in rows), default=-6) + 6
    below = size + 6 if columns else 0
    page = Image.new("L" if c == 1 else "RGB", (left + wide, high + below), "white")
    page.paste(_image(picture), (left, 0))
    draw = ImageDraw.Draw(page)
    for index, name in enumerate(rows):
        draw.text((left - 3, (index + 0.5) * high / len(rows)), name, "black", font, anchor="rm")
    for index, name in enumerate(columns):
        draw.text((left + (index + 0.5) * wide / len(columns), high + below / 2), name, "black", font, anchor="mm")
    return np.asarray(page).reshape(high + below, left + wide, c)


def shortened(name: str) -> str:
    """A name, of a class for instance, on one line and not too long for a picture."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray(picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture)
