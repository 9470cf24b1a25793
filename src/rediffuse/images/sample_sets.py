"""Generated images on disk: a folder for each seed, and `sampling.json`.

A folder holds `images.npy` and, from a conditional model, `labels.npy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rediffuse.images.files import load_npy
from rediffuse.images.image_set import check_images, save_arrays
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import read_json

RECONSTRUCTIONS = "reconstructions"  # a VAE's folder beside those of the seeds


@dataclass(frozen=True, eq=False)
class Samples:
    """images: uint8 (N, C, H, W); labels: int64 (N,), the classes asked for, or None."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class SampleSets:
    """Independent sets of the same size, all labelled or none.

    sampling: n, seeds, and the settings of the sampler.
    reconstructions: a VAE's, of test images, uint8 (N, C, H, W).
    """

    sets: list[Samples]
    sampling: dict[str, Any]
    reconstructions: NDArray[np.uint8] | None

    @property
    def n(self) -> int:
        """Images in each set."""
        return len(self.sets[0])

    @property
    def images(self) -> NDArray[np.uint8]:
        """The images of all sets, one set after the other."""
        return np.concatenate([part.images for part in self.sets])

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The labels of all sets, or None."""
        labels = [part.labels for part in self.sets if part.labels is not None]
        return np.concatenate(labels) if labels else None


def save_samples(folder: Path, samples: Samples) -> None:
    """Write one set."""
    save_arrays(folder, samples.images, samples.labels)


def load_sets(folder: Path, shape: tuple[int, ...], classes: int) -> SampleSets:
    """Load the sets.  Raises UserError if they are missing, damaged, or not as `sampling.json` says."""
    remedy = f"make it with `dvc repro -f sample_{folder.name}`"
    sampling = read_json(folder / "sampling.json", remedy)
    try:
        n, seeds = sampling["n"], sampling["seeds"]
    except KeyError as error:
        raise UserError(f"{folder / 'sampling.json'} is damaged ({error} is missing): {remedy}") from None
    sets = [load_samples(folder / str(seed), shape, classes) for seed in seeds]
    if {len(part) for part in sets} != {n} or len({part.labels is None for part in sets}) != 1:
        found = ", ".join(f"{len(part)} {'un' if part.labels is None else ''}labelled" for part in sets)
        raise UserError(f"{folder} must hold sets of {n} images, all labelled or none, got {found}: {remedy}")
    again = folder / RECONSTRUCTIONS
    return SampleSets(sets, sampling, load_samples(again, shape, classes).images if again.exists() else None)


def load_samples(folder: Path, shape: tuple[int, ...], classes: int) -> Samples:
    """Load one set.  Raises UserError if it is missing or damaged, or its images are not of this shape."""
    remedy = f"make it with `dvc repro -f sample_{folder.parent.name}`"
    images, labels = load_npy(folder / "images.npy", remedy), None
    check_images(images, shape, str(folder))
    if (folder / "labels.npy").exists():
        labels = load_npy(folder / "labels.npy", remedy)
        fits = labels.shape == (len(images),) and labels.dtype == np.int64
        if not fits or not 0 <= labels.min() <= labels.max() < classes:
            raise UserError(
                f"{folder}: labels must be {len(images)} int64 numbers from 0 to {classes - 1}, got"
                f" {labels.dtype} {list(labels.shape)}: {remedy}"
            )
    return Samples(images, labels)
