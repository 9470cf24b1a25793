"""Generators that everybody understands: the marks between which a distance is read.

They have learnt nothing of the images but their mean, the values of each pixel, or not even that; a model must be far better.
All give uint8 (n, C, H, W), the same each time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rediffuse.evaluation.fidelity import SEED

Images = NDArray[np.uint8]

LEVELS = 256
BYTES = 2**23  # of uint8 pixels in one block of training images


def mean_image(train: Images, n: int) -> Images:
    """The mean of the training images (N, C, H, W), rounded to the nearest grey level (halves up), n times: no variety at all."""
    total = np.zeros(train.shape[1:], np.int64)
    for block in _blocks(train):
        total += block.sum(axis=0, dtype=np.int64)
    mean = (2 * total + len(train)) // (2 * len(train))
    return np.repeat(mean.astype(np.uint8)[None], n, axis=0)


def pixel_marginals(train: Images, n: int) -> Images:
    """n images whose every pixel is drawn, independently of the others, from its own values over the training images (N, C, H, W).

    Right in each pixel's histogram, wrong in everything that makes an image.  The order of the training images changes nothing.
    """
    pixels = int(np.prod(train.shape[1:]))
    counts = np.zeros((pixels, LEVELS), np.int64)
    for block in _blocks(train):
        places = block.reshape(-1, pixels) + LEVELS * np.arange(pixels)
        counts += np.bincount(places.ravel(), minlength=counts.size).reshape(counts.shape)
    random = np.random.RandomState(SEED)
    drawn = np.empty((pixels, n), np.uint8)
    for pixel, up_to in enumerate(counts.cumsum(axis=1)):  # up_to[v]: training images whose pixel is at most v
        drawn[pixel] = up_to.searchsorted(random.randint(len(train), size=n), side="right")
    return np.ascontiguousarray(drawn.T).reshape(n, *train.shape[1:])


def uniform_noise(shape: tuple[int, ...], n: int) -> Images:
    """n images (C, H, W) = shape whose pixels are uniform over the grey levels and independent: nothing learnt."""
    return np.random.RandomState(SEED).randint(LEVELS, size=(n, *shape), dtype=np.uint8)


def _blocks(train: Images) -> list[Images]:
    """Consecutive views of the images, so that of a memory-mapped set only one block is in memory at a time."""
    size = max(1, BYTES // int(np.prod(train.shape[1:])))
    return [train[start : start + size] for start in range(0, len(train), size)]
