"""The files that images are kept in: the same bytes for the same images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rediffuse.runtime.files import replace_file


def save_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the arrays; np.savez stamps every member with the same date, so that equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    replace_file(path, buffer.getvalue())


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """One image (C, H, W), C = 1 (grey) or 3 (RGB), as PNG, without time or software in it."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()


def save_png(picture: NDArray[np.uint8], path: str | Path) -> None:
    """Write a picture (height, width, 1 or 3) or (height, width) as PNG, without time or software in it."""
    buffer = io.BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture).save(
        buffer, format="PNG", compress_level=9
    )
    replace_file(path, buffer.getvalue())
