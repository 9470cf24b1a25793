"""Files of arrays and pictures, written atomically.

The bytes of .npy depend on the array alone, those of PNG on the picture and on Pillow's zlib, which requirements.lock pins.  .npz is for
users only and must not be hashed: its bytes depend on the patch release of Python (zipfile's headers).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rediffuse.runtime.files import replace_file


def save_npy(path: Path, array: NDArray[Any]) -> None:
    """Write one array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    replace_file(path, buffer.getvalue())


def save_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write several arrays by name."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    replace_file(path, buffer.getvalue())


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """A picture (height, width, 1 or 3), grey or RGB, as PNG, without time or software in it."""
    buffer = io.BytesIO()
    Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()


def encode_image(image: NDArray[np.uint8]) -> bytes:
    """An image (C, H, W) as PNG."""
    return encode_png(image.transpose(1, 2, 0))


def save_png(picture: NDArray[np.uint8], path: str | Path) -> None:
    """Write a picture as `encode_png`."""
    replace_file(path, encode_png(picture))
