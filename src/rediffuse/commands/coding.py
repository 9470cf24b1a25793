"""What the commands reconstruct, interpolate, inpaint and nll do with a trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.commands.generate import COLUMNS, checked_target, load, write_images
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.identity import one_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BRIGHT = 128  # grey level from which a pixel of a mask is to be filled in


def reconstruct(output: str, images: Sequence[str], *, model: str, **options: Any) -> Path:
    """Write each image and below it what comes back after coding; to .npz or a folder only the latter.

    options: of `ImageModel.reconstruct`, as those of the other functions here.  Returns where.
    """
    from rediffuse.figures.grid import reconstructions
    from rediffuse.images.files import save_png

    target, loaded = checked_target(output), load(model)
    originals = read_images(images, loaded.shape)
    decoded = loaded.reconstruct(originals, **options)
    if target.suffix.lower() == ".png":
        save_png(reconstructions(originals, decoded, min(len(originals), COLUMNS)), target)
    else:
        write_images(target, decoded)
    return target


def interpolate(output: str, ends: tuple[str, str], *, model: str, **options: Any) -> Path:
    """Write images on the way between two ends, each a file or a seed.  Returns where."""
    target, loaded = checked_target(output), load(model)
    a, b = (int(end) if end.isdecimal() else read_images([end], loaded.shape)[0] for end in ends)
    write_images(target, loaded.interpolate(a, b, **options))
    return target


def inpaint(output: str, image: str, mask: str, *, model: str, **options: Any) -> Path:
    """Write ways to fill in the image where the mask is bright.  Returns where."""
    target, loaded = checked_target(output), load(model)
    [whole], [grey] = read_images([image], loaded.shape), read_images([mask], (1, *loaded.shape[1:]))
    write_images(target, loaded.inpaint(whole, grey[0] >= BRIGHT, **options))
    return target


def nll(images: Sequence[str], *, model: str, as_json: bool, **options: Any) -> str:
    """Return the bits per dimension of each image, one per line, and their mean."""
    loaded = load(model)
    bits = loaded.nll(read_images(images, loaded.shape), **options).tolist()
    mean = sum(bits) / len(bits)
    if as_json:
        return json.dumps({"images": dict(zip(images, bits, strict=True)), "mean": mean}, indent=2)
    lines = [f"{value:7.3f}  {name}" for name, value in zip(images, bits, strict=True)]
    return "\n".join([*lines, f"{mean:7.3f}  mean, bits per dimension"])


def read_images(names: Sequence[str], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return files as uint8 (n, C, H, W), cropped and resized to `shape` as a folder of images is."""
    import numpy as np

    from rediffuse.sources.decode import decode
    from rediffuse.sources.folder import open_image

    found = []
    for name in names:
        try:
            with open_image(name) as image:
                found.append(decode(image, shape))
        except Exception as error:  # Pillow has no base class of what it raises for a damaged file
            raise UserError(f"{name} cannot be read as an image: {one_line(error)}") from None
    return np.stack(found)
