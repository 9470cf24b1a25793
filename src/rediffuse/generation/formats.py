"""The files that images are kept in: the same bytes for the same images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rediffuse.files import replace_file

PRIOR = "prior.safetensors"  # the fitted mixture of a VAE, beside the images drawn from it


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
