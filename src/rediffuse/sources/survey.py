"""Look at images before they are decoded for good: which shape and ground they get, and what they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from threading import Event

import numpy as np
from PIL import Image

from rediffuse.params import SIDES, Data
from rediffuse.runtime.errors import UserError
from rediffuse.sources.decode import Ground, Shape, is_grey, is_grey_mode, lightness, upright_size
from rediffuse.sources.found import Found
from rediffuse.sources.reading import Unreadable, in_parallel

LIGHT = 0.6  # above this lightness, 0 to 1, what is drawn on transparent ground is hard to see on white


@dataclass(frozen=True)
class Look:
    """What one image is.  grey: None if its pixels were not looked at.  visible: see `decode.lightness`."""

    kind: str  # format and mode
    size: tuple[int, int]  # width and height, upright
    grey: bool | None
    visible: tuple[float, float] | None  # None: nothing is transparent
    brightest: int  # of 16 bits; 0: it has 8
    frames: bool  # whether it has more than one


@dataclass(frozen=True)
class Survey:
    """The shape (C, H, W) and the ground of all images, and what they are, counted."""

    shape: Shape
    ground: Ground
    kinds: Counter[str]
    sizes: Counter[tuple[int, int]]
    grey: Counter[bool | None]
    transparent: int
    brightest: int  # of all images with 16 bits; 0: there are none
    animated: int


def survey(found: Found, data: Data, *, thorough: bool = False) -> Survey:
    """Look at the heads of all images, and at their pixels where the parameters need them.

    thorough: look at all pixels.  Unreadable images are passed over: decoding names them all.  Raises
    UserError if size is 0 and the sizes differ, or are out of SIDES.
    """
    coloured = Event()  # once seen, `channels: auto` is decided

    def look(image: Image.Image) -> Look:
        kind, size = f"{image.format or 'array'} {image.mode}", upright_size(image)
        grey, visible = True if is_grey_mode(image) else None, None
        if grey is None and (thorough or (data.channels == "auto" and not coloured.is_set())):
            grey = is_grey(image)
            if not grey:
                coloured.set()
        if image.has_transparency_data and not image.mode.startswith("I"):
            visible = lightness(image)
        brightest = int(np.asarray(image).max()) if image.mode.startswith("I") else 0
        frames = getattr(image, "is_animated", False) and image.format != "MPO"
        # Many images are stored with an alpha channel that hides nothing.
        return Look(kind, size, grey, visible if visible and visible[1] < 1 else None, brightest, frames)

    kinds, sizes, grey = Counter[str](), Counter[tuple[int, int]](), Counter[bool | None]()
    transparent, light, opacity, brightest, animated = 0, 0.0, 0.0, 0, 0
    for each in in_parallel(found.images, look, "looking"):
        if isinstance(each, Unreadable):
            continue
        kinds[each.kind] += 1
        sizes[each.size] += 1
        grey[each.grey] += 1
        brightest, animated = max(brightest, each.brightest), animated + each.frames
        if each.visible is not None:
            transparent += 1
            light += each.visible[0] * each.visible[1]
            opacity += each.visible[1]
    channels = data.channels if data.channels != "auto" else 3 if coloured.is_set() else 1
    ground: Ground = "black" if light > LIGHT * opacity else "white"
    return Survey(
        (channels, *_target(data.size, sizes)),
        data.background if data.background != "auto" else ground,
        kinds,
        sizes,
        grey,
        transparent,
        brightest,
        animated,
    )


def _target(size: int | tuple[int, int], sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    """Return height and width of the images.  Raises UserError if size is 0 and they have no common one."""
    if size:
        return (size, size) if isinstance(size, int) else size
    if not sizes:
        return SIDES[0], SIDES[0]  # no image can be read, which decoding says
    (narrow, low), (wide, high) = min(sizes), max(sizes)
    remedy = "set data.size, for example to 64 (params.yaml)"
    if len(sizes) > 1:
        raise UserError(
            "data.size is 0, so all images of data.path must have one size; they have"
            f" {len(sizes)}, from {narrow}x{low} to {wide}x{high}: {remedy}"
        )
    if not (SIDES[0] <= narrow <= SIDES[1] and SIDES[0] <= low <= SIDES[1]):
        raise UserError(
            f"the images of data.path are {narrow}x{low}, and must have {SIDES[0]} to {SIDES[1]} pixels a"
            f" side: {remedy}"
        )
    return low, narrow
