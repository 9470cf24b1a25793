"""Which instrument sees which fault: distances of real images that were damaged a little.

5,000 training images of Fashion-MNIST against the 10,000 test images, as multiples of the distance of the
undamaged ones; the samples of the checkout beside them, if there are any.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from benchmarks.report import Cell, Settings, Table
from rediffuse.evaluation.fidelity import frechet_distance
from rediffuse.evaluation.instruments import make_instrument
from rediffuse.images.sample_sets import load_sets
from rediffuse.sources.fashion_mnist import load_fashion_mnist

INSTRUMENTS = ("fashion-mnist-cnn-v1", "random-conv-v1", "efficientnet-lite0")
N = 5000
Images = NDArray[np.uint8]


def rounded(values: NDArray[np.float64]) -> Images:
    """Return values (N, C, H, W) as uint8."""
    return np.clip(values, 0, 255).round().astype(np.uint8)


def with_noise(images: Images, levels: float) -> Images:
    """Add Gaussian noise with this standard deviation, in grey levels."""
    return rounded(images + np.random.default_rng(1).normal(0, levels, images.shape))


def not_black(images: Images, levels: float) -> Images:
    """Replace pixels that are 0 by the absolute value of such noise."""
    noise = np.abs(np.random.default_rng(1).normal(0, levels, images.shape))
    return np.where(images == 0, rounded(noise), images)


def blurred(images: Images, pixels: float) -> Images:
    """Blur by a Gaussian with this standard deviation."""
    return rounded(gaussian_filter(images.astype(np.float64), (0, 0, pixels, pixels)))


def as_jpeg(images: Images, quality: float) -> Images:
    """Store grey images as JPEG and read them back."""
    found = []
    for image in images[:, 0]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        found.append(np.asarray(Image.open(file)))
    return np.stack(found)[:, None]


FAULTS: list[tuple[str, Callable[[Images, float], Images], float]] = [
    ("noise of 1 grey level", with_noise, 1),
    ("noise of 2 grey levels", with_noise, 2),
    ("noise of 4 grey levels", with_noise, 4),
    ("black is abs(N(0, 2))", not_black, 2),
    ("blur of half a pixel", blurred, 0.5),
    ("JPEG at quality 90", as_jpeg, 90),
]


def measure(settings: Settings) -> list[Table]:
    splits, n = load_fashion_mnist(), 2560 if settings.quick else N
    train, test = splits["train"], splits["test"]
    sets = {"real training images": np.array(train.images[:n])}
    for name, damage, strength in FAULTS[: 1 if settings.quick else None]:
        sets[name] = damage(sets["real training images"], strength)
    for model in ("vae", "ddpm"):
        if (folder := Path("data/samples", model)).exists():
            drawn = load_sets(folder, test.shape, len(test.classes)).sets[0]
            sets[f"samples of the {model}"] = drawn.images[:n]
    distances: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in INSTRUMENTS:
            instrument = make_instrument(name, train, Path(folder, name))
            real = instrument.measure(test.images[: n if settings.quick else None])
            distances[instrument.id] = [
                frechet_distance(instrument.measure(images), real) for images in sets.values()
            ]
    rows: list[list[Cell]] = [
        [name, *(f"{found[i] / found[0]:.2f} ({found[i]:.3g})" for found in distances.values())]
        for i, name in enumerate(sets)
    ]
    note = f"{n:,} images; multiples of the first row, and the Fréchet distance."
    return [Table("What each instrument sees", ["damaged by", *distances], rows, note)]
