"""Generators that learn almost nothing, as marks on the scale of a distance: a model must be far better.

All return uint8 images (N, C, H, W), the same each time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rediffuse.evaluation.fidelity import SEED

Images = NDArray[np.uint8]

LEVELS = 256
BYTES = 2**23  # of uint8 pixels in one block of training images


def mean_image(train: Images) -> Images:
    """Return the mean of the training images (N, C, H, W), rounded to grey levels (halves up): one image."""
    total = np.zeros(train.shape[1:], np.int64)
    for block in _blocks(train):
        total += block.sum(axis=0, dtype=np.int64)
    mean = (2 * total + len(train)) // (2 * len(train))
    return mean.astype(np.uint8)[None]


def pixel_marginals(train: Images, n: int) -> Images:
    """Draw each pixel of n images independently, from its own values over the training images (N, C, H, W).

    The result does not depend on the order of the training images.
    """
    pixels = int(np.prod(train.shape[1:]))
    counts = np.zeros((pixels, LEVELS), np.int64)
    for block in _blocks(train):
        places = block.reshape(-1, pixels) + LEVELS * np.arange(pixels)
        counts += np.bincount(places.ravel(), minlength=counts.size).reshape(counts.shape)
    random = np.random.RandomState(SEED)
    drawn = np.empty((pixels, n), np.uint8)
    for pixel, up_to in enumerate(counts.cumsum(axis=1)):  # up_to[v]: images with pixel <= v
        drawn[pixel] = up_to.searchsorted(random.randint(len(train), size=n), side="right")
    return np.ascontiguousarray(drawn.T).reshape(n, *train.shape[1:])


def uniform_noise(shape: tuple[int, ...], n: int) -> Images:
    """Draw n images (C, H, W) = shape with independent pixels, uniform over the grey levels."""
    return np.random.RandomState(SEED).randint(LEVELS, size=(n, *shape), dtype=np.uint8)


def _blocks(train: Images) -> list[Images]:
    """Return consecutive views of the images: of a memory-mapped set only one is in memory at a time."""
    size = max(1, BYTES // int(np.prod(train.shape[1:])))
    return [train[start : start + size] for start in range(0, len(train), size)]
