"""A trained model in hand: in Python by `rediffuse.load`, and what the commands reconstruct, interpolate, inpaint and nll do with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rediffuse.commands.generate import COLUMNS, checked_target, image_model, write_images
from rediffuse.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rediffuse.inference.model import ImageModel

BRIGHT = 128  # grey level from which a pixel of a mask is to be filled in


def load(model: str | Path = "ddpm", **settings: Any) -> ImageModel:
    """A trained model, on the GPU where there is one; the process becomes deterministic.

    model: vae or ddpm, of the checkout; REVISION:vae or REVISION:ddpm, of a commit or an experiment; a folder with a model; or an address
    of MLflow's, models:/NAME@ALIAS or models:/NAME/VERSION.
    settings: of sampling, in the place of those it comes with: sampler, steps, spacing, eta, guidance_scale (see params.yaml).
    Raises UserError if there is none, or the settings do not fit it.
    """
    with image_model(str(model), settings) as loaded:
        return loaded


def reconstruct(output: str, images: Sequence[str], *, model: str, label: str | None, steps: int | None) -> Path:
    """Write each image and below it what comes back after coding.  Returns where."""
    import numpy as np

    target = checked_target(output)
    with image_model(model, {}) as loaded:
        seen = read_images(images, loaded.shape)
        back = loaded.reconstruct(seen, label=label, steps=steps)
    rows = [part for i in range(0, len(seen), COLUMNS) for part in (seen[i : i + COLUMNS], back[i : i + COLUMNS])]
    if target.suffix.lower() != ".png":
        write_images(target, back)
    elif len(seen) <= COLUMNS:
        write_images(target, np.concatenate(rows), columns=len(seen))
    else:
        blank = np.full((-len(seen) % COLUMNS, *loaded.shape), 255, np.uint8)  # fills the last rows
        write_images(target, np.concatenate([*rows[:-2], rows[-2], blank, rows[-1], blank]))
    return target


def interpolate(output: str, ends: tuple[str, str], *, n: int, model: str, label: str | None, steps: int | None) -> Path:
    """Write n images on the way between two, each a file or a seed.  Returns where."""
    target = checked_target(output)
    with image_model(model, {}) as loaded:
        a, b = (int(end) if end.isdecimal() else read_images([end], loaded.shape)[0] for end in ends)
        write_images(target, loaded.interpolate(a, b, n, label=label, steps=steps))
    return target


def inpaint(
    output: str, image: str, mask: str, *, n: int, seed: int, model: str, label: str | None, steps: int | None, rounds: int
) -> Path:
    """Write n ways to fill in the image where the mask is bright.  Returns where."""
    target = checked_target(output)
    with image_model(model, {}) as loaded:
        [whole], [bright] = read_images([image], loaded.shape), read_images([mask], (1, *loaded.shape[1:]))
        filled = loaded.inpaint(whole, bright[0] >= BRIGHT, n, label=label, seed=seed, steps=steps, rounds=rounds)
    write_images(target, filled)
    return target


def nll(images: Sequence[str], *, model: str, label: str | None, seed: int, evaluations: int | None, as_json: bool) -> str:
    """The bits per dimension of each image, a line for each, and their mean."""
    with image_model(model, {}) as loaded:
        bits = loaded.nll(read_images(images, loaded.shape), label=label, seed=seed, evaluations=evaluations).tolist()
    mean = sum(bits) / len(bits)
    if as_json:
        return json.dumps({"images": dict(zip(images, bits, strict=True)), "mean": mean}, indent=2)
    return "\n".join(
        [*(f"{value:7.3f}  {name}" for name, value in zip(images, bits, strict=True)), f"{mean:7.3f}  mean, bits per dimension"]
    )


def read_images(names: Sequence[str], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """uint8 (n, C, H, W), C = 1 or 3, of files, cut and resized to the model's shape (C, H, W) as a folder of images is."""
    import numpy as np

    from rediffuse.sources.folder import decode

    found, wrong = [], []
    for name in names:
        try:
            found.append(decode(Path(name), (shape[0], shape[1], shape[2])))
        except (OSError, ValueError, SyntaxError) as error:
            wrong.append(f"{name}: {' '.join(str(error).split())}")
    if wrong:
        raise UserError("these are no images that can be read:" + "".join(f"\n  {line}" for line in wrong))
    return np.stack(found)
