"""Files of arrays and pictures.

The bytes of .npy depend only on the array, those of PNG on the picture and Pillow's zlib (pinned by the
lock).  .npz is for users only and must not be hashed: its bytes depend on Python's patch release (zipfile's
headers).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file


def load_npy(path: Path, remedy: str, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """Read one array.  Raises UserError, with the remedy, for a file that is missing or damaged."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    return array


def save_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write several arrays by name."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    replace_file(path, buffer.getvalue())


def to_pil(image: NDArray[np.uint8]) -> Image.Image:
    """Return an image (C, H, W) as a Pillow image: grey for C = 1, RGB for C = 3."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def encode_image(image: NDArray[np.uint8]) -> bytes:
    """Return an image (C, H, W) as PNG, without time or software in it."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()


def save_png(picture: NDArray[np.uint8], path: str | Path) -> None:
    """Write a picture (height, width, 1 or 3) as PNG."""
    replace_file(path, encode_image(picture.transpose(2, 0, 1)))
