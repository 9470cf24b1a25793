"""From an image as Pillow opens it to uint8 (C, H, W).

It is turned as its EXIF orientation says, 16 bits of grey become 8, transparent pixels show the ground; then
it is fitted into the target and resized (Lanczos).  Of an animation, the first frame is taken.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Fit = Literal["crop", "pad", "stretch"]
Ground = Literal["white", "black"]
Shape = tuple[int, int, int]

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GREY = "1", "L", "LA", "La"  # modes of Pillow; those that begin with I are grey too
TINT = 2  # levels between the channels of a grey image that was stored as a lossy colour image


def decode(
    image: Image.Image, shape: Shape, fit: Fit = "crop", ground: Ground = "white"
) -> NDArray[np.uint8]:
    """Return uint8 (C, H, W) = shape, C = 1 or 3.

    fit: crop, the largest central part of this shape | pad, all of it, with `ground` around it | stretch.
    """
    channels, height, width = shape
    flat = flatten(image, ground).convert("L" if channels == 1 else "RGB")
    if flat.size != (width, height):
        flat = _fit(flat, width, height, fit, ground)
    pixels = np.asarray(flat)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _fit(flat: Image.Image, width: int, height: int, fit: Fit, ground: Ground) -> Image.Image:
    if fit == "pad":
        return ImageOps.pad(flat, (width, height), Image.Resampling.LANCZOS, color=ground)
    if fit == "crop":
        scale = min(flat.width / width, flat.height / height)
        across, down = round(width * scale), round(height * scale)
        left, top = (flat.width - across) // 2, (flat.height - down) // 2
        flat = flat.crop((left, top, left + across, top + down))
    return flat.resize((width, height), Image.Resampling.LANCZOS)


def flatten(image: Image.Image, ground: Ground = "white") -> Image.Image:
    """Return the image upright, with 8 bits a channel, and nothing transparent."""
    image = _eight_bits(image)
    if (turn := TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height after the EXIF rotation, without decoding."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)  # these lie on their side


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8.  `ImageOps.exif_transpose` fails where another entry is odd."""
    try:
        code = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata is no reason to refuse an image
        return 1
    return code if code in TURNS else 1


def is_grey_mode(image: Image.Image) -> bool:
    """Return whether the image is stored in grey."""
    return image.mode in GREY or image.mode.startswith("I")


def is_grey(image: Image.Image) -> bool:
    """Return whether no pixel has a colour.  A grey photograph is often stored in colour."""
    pixels = np.asarray(flatten(image).convert("RGB"))
    return int((pixels.max(axis=2) - pixels.min(axis=2)).max()) <= TINT


def lightness(image: Image.Image) -> tuple[float, float]:
    """Return the lightness of all that is visible, 0 to 1, weighted by its opacity, and the mean opacity."""
    image = image.convert("RGBA")
    grey, alpha = (np.asarray(band, np.float64) / 255 for band in (image.convert("L"), image.getchannel("A")))
    opacity = float(alpha.mean())
    return (float((grey * alpha).mean()) / opacity if opacity else 0.0), opacity


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits of grey to 8; Pillow would cut off what is above 255."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are not within 16 bits, 0 to 65,535: convert it to 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range: convert it to 8 or 16 bits")
    return image
