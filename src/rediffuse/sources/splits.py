"""From the published sets to the splits the models see, and the manifest that describes them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rediffuse.images.image_set import ImageSet, Split

BLOCK = 2**22  # pixels that are counted at once: bincount turns them into int64


def hold_out(images: ImageSet, n: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Divide into (all but n, n held out), drawn by the seed; both keep the published order."""
    # RandomState, because numpy promises that its stream never changes (NEP 19); that of default_rng may.
    order = np.random.RandomState(seed).permutation(len(images))
    return images.take(np.sort(order[n:])), images.take(np.sort(order[:n]))


def place_of(image: NDArray[np.uint8], seed: int) -> int:
    """Return a number of 64 bits by a hash of the image's pixels and the seed: equal images have the same."""
    digest = hashlib.sha256(f"{seed} {image.shape} ".encode() + image.tobytes()).digest()
    return int.from_bytes(digest[:8], "big")


def split_at(place: int, *, validation: float, test: float) -> Split:
    """Return the split of an image of a set without published splits.  place: of `place_of`.

    validation, test: shares of all images, from 0 to 1.  An image that is added, removed or renamed moves no
    other, and equal images are always in the same split.
    """
    share = place / 2**64
    return "test" if share < test else "validation" if share < test + validation else "train"


def describe(splits: Mapping[str, ImageSet], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest: `about`, classes, shape, statistics of pixels, counts and hashes of each split.

    mean, std: of `train` by channel, pixels in [0, 1].  The hashes are the SHA-256 of the arrays' bytes.  The
    manifest does not tell where and when the files were found.
    """
    train = splits["train"]
    mean, std = _mean_and_std(train.images)
    return {
        **about,
        "classes": list(train.classes),
        "shape": list(train.shape),
        "mean": mean,
        "std": std,
        "splits": {name: _describe_split(split) for name, split in splits.items()},
    }


def _describe_split(split: ImageSet) -> dict[str, Any]:
    described: dict[str, Any] = {"count": len(split), "sha256": {"images": _sha256(split.images)}}
    if split.labels is not None:
        described["sha256"]["labels"] = _sha256(split.labels)
        per_class = np.bincount(split.labels, minlength=len(split.classes)).tolist()
        described["per_class"] = dict(zip(split.classes, per_class, strict=True))
    return described


def _sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _mean_and_std(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Return both by channel, from the integer counts of the 256 values: exact in any order of summation."""
    means, stds = [], []
    block = max(1, BLOCK // (images.shape[2] * images.shape[3]))
    for channel in range(images.shape[1]):
        blocks = (images[start : start + block, channel] for start in range(0, len(images), block))
        counts = np.add.reduce([np.bincount(each.ravel(), minlength=256) for each in blocks]).tolist()
        n = sum(counts)
        first = sum(value * count for value, count in enumerate(counts))
        second = sum(value**2 * count for value, count in enumerate(counts))
        means.append(first / n / 255)
        stds.append(math.sqrt(n * second - first**2) / n / 255)
    return means, stds
