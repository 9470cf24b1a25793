"""Generated images on disk: a folder for each seed with `images.npy` and, from a conditional model, `labels.npy`; and `sampling.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rediffuse.images.files import save_npy
from rediffuse.images.image_set import check_images
from rediffuse.runtime.errors import UserError

RECONSTRUCTIONS = "reconstructions"  # the folder beside those of the seeds, from a VAE


@dataclass(frozen=True, eq=False)
class Samples:
    """images: uint8 (N, C, H, W); labels: int64 (N,), the classes asked for, or None."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class SampleSets:
    """Independent sets of the same size, all labelled or none; `sampling`: n, seeds, and the settings they were drawn with.

    reconstructions: of a VAE, uint8 (N, C, H, W), what it makes of test images.
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
        """Those of all sets, one set after the other."""
        return np.concatenate([part.images for part in self.sets])

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Those of all sets, or None."""
        labels = [part.labels for part in self.sets if part.labels is not None]
        return np.concatenate(labels) if labels else None


def save_samples(folder: Path, samples: Samples) -> None:
    """Write one set."""
    save_npy(folder / "images.npy", samples.images)
    if samples.labels is not None:
        save_npy(folder / "labels.npy", samples.labels)


def load_sets(folder: Path, shape: tuple[int, ...], classes: int) -> SampleSets:
    """The sets in the folder.  Raises UserError if anything is missing or damaged, or does not fit `sampling.json`."""
    remedy = f"make it with `dvc repro -f sample_{folder.name}`"
    try:
        sampling = json.loads((folder / "sampling.json").read_text())
        n, seeds = sampling["n"], sampling["seeds"]
    except FileNotFoundError:
        raise UserError(f"{folder / 'sampling.json'} is missing: {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'sampling.json'} is damaged ({error!r}): {remedy}") from None
    sets = [load_samples(folder / str(seed), shape, classes) for seed in seeds]
    if {len(part) for part in sets} != {n} or len({part.labels is None for part in sets}) != 1:
        found = ", ".join(f"{len(part)} {'un' if part.labels is None else ''}labelled" for part in sets)
        raise UserError(f"{folder} must hold sets of {n} images, all labelled or none, got {found}: {remedy}")
    again = folder / RECONSTRUCTIONS
    return SampleSets(sets, sampling, load_samples(again, shape, classes).images if again.exists() else None)


def load_samples(folder: Path, shape: tuple[int, ...], classes: int) -> Samples:
    """One set.  Raises UserError if it is missing or damaged, or holds other things than images (C, H, W) = shape."""
    remedy = f"make it with `dvc repro -f sample_{folder.parent.name}`"
    images, labels = _load(folder / "images.npy", remedy), None
    check_images(images, shape, str(folder))
    if (folder / "labels.npy").exists():
        labels = _load(folder / "labels.npy", remedy)
        if labels.shape != (len(images),) or labels.dtype != np.int64 or not 0 <= labels.min() <= labels.max() < classes:
            found = f"{labels.dtype} {list(labels.shape)}"
            raise UserError(f"{folder}: labels must be {len(images)} int64 numbers from 0 to {classes - 1}, got {found}: {remedy}")
    return Samples(images, labels)


def _load(path: Path, remedy: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    return array
