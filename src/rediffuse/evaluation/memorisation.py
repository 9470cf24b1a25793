"""Does a model repeat its training images?  Exact distances of generated and of real test images to the nearest training images.

Distances are between pixels, L2, and exact.  Pixels minus 128 lie in -128 .. 127, so a product of two is at most 2^14 and any partial sum
of 1024 of them an integer of at most 2^24: float32 holds it exactly, in whatever order the matrix product adds.  So squared distances
|x|^2 + |y|^2 - 2 x.y are exact at the speed of a float32 matrix product; of larger images, pieces of 1024 pixels are added as integers.
The products are numpy's, because torch may be told to round the factors to bfloat16 (`set_float32_matmul_precision`).  Not
scikit-learn's chunked distances: they want the whole training set in memory, as float64, and take twice as long to be as exact.

The numbers are evidence, not a verdict: pixels are blind to a training image that comes back shifted by one, and real images of a small
world lie close to each other too.  So unseen real images, the test set, are measured the same way and stand beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from scipy.stats import rankdata, tiecorrect
from tqdm import tqdm

from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file

Images = NDArray[np.uint8]
Integers = NDArray[np.int64]

PIXELS = 1024  # whose products float32 adds exactly, see above
ROWS, COLUMNS = 1024, 2048  # images and training images in one block of distances, 8 MiB each for products and distances
BYTES = 2**25  # of uint8 pixels in one block, so that large images come in smaller blocks
LEAST = 3  # training images: the nearest, the second nearest, and another neighbour for either


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Where N images lie among the training images.

    squared: int64 (N, 2), squared L2 distances to the nearest and the second nearest training image, in squared grey levels;
    index: int64 (N, 2), which these are; spacing: int64 (N,), squared distance from that nearest training image to the training image
    nearest to it; train: number of training images; pixels: C H W of an image.
    """

    squared: Integers
    index: Integers
    spacing: Integers
    train: int
    pixels: int

    def __len__(self) -> int:
        return len(self.squared)

    @classmethod
    def of(cls, images: Images, train: Images, *, title: str = "images") -> Neighbourhood:
        """Measure images (N, C, H, W) against training images (M, C, H, W), both uint8; either may be memory-mapped.

        2 (N + U) M C H W operations, U <= N being the number of different training images that are nearest to something.
        Raises UserError for another dtype or shape, no images, and fewer than three training images.
        """
        squared, index = nearest(images, train, title=title)
        used, where = np.unique(index[:, 0], return_inverse=True)
        spacing, _ = nearest(train[used], train, k=1, itself=used, title=f"neighbours of {title}")
        return cls(squared, index, spacing[where, 0], len(train), int(np.prod(images.shape[1:])))

    def take(self, rows: Integers | slice) -> Neighbourhood:
        """The images at these rows, in this order: of sets that were measured together, one."""
        return Neighbourhood(self.squared[rows], self.index[rows], self.spacing[rows], self.train, self.pixels)

    @property
    def ratio(self) -> NDArray[np.float64]:
        """(N,), 0 .. 1: distance to the nearest over distance to the second nearest training image; 0 for an exact copy."""
        near, second = self.squared.T
        squared: NDArray[np.float64] = np.divide(near, second, out=np.zeros(len(self)), where=second > 0)
        return np.sqrt(squared)

    @property
    def distance(self) -> NDArray[np.float64]:
        """(N,), 0 .. 255: root mean square difference of the pixels to those of the nearest training image, in grey levels."""
        rms: NDArray[np.float64] = np.sqrt(self.squared[:, 0] / self.pixels)
        return rms


def nearest(
    images: Images, train: Images, *, k: int = 2, itself: Integers | None = None, title: str = "images"
) -> tuple[Integers, Integers]:
    """(N, k) squared L2 distances to the k nearest training images, and (N, k) their indices; both int64, nearest first, exact.

    images: uint8 (N, C, H, W).  train: uint8 (M, C, H, W); of both only blocks are in memory at a time, less than 300 MB in all.
    itself: int64 (N,), for images that are training images: the one that is not counted for each.
    Of training images at equal distance the lower index comes first.  Raises UserError as `Neighbourhood.of`.
    """
    _check(images, train, title)
    if not 1 <= k <= len(train) - (itself is not None):
        raise ValueError(f"k must be between 1 and the number of training images ({len(train)}), got {k}")
    pixels = int(np.prod(images.shape[1:]))
    rows, columns = (max(1, min(size, BYTES // pixels)) for size in (ROWS, COLUMNS))
    squared, index = np.empty((2, len(images), k), np.int64)
    for first in tqdm(range(0, len(images), rows), desc=f"nearest to {title}", unit="block", leave=False):
        x = np.asarray(images[first : first + rows]).reshape(-1, pixels)
        own = None if itself is None else itself[first : first + rows]
        here = slice(first, first + len(x))
        squared[here], index[here] = _nearest_of_block(x, train, columns, k, own)
    return squared, index


def _nearest_of_block(x: Images, train: Images, columns: int, k: int, itself: Integers | None) -> tuple[Integers, Integers]:
    """As `nearest`, for a few images (n, P), going through all training images."""
    best, index = np.empty((len(x), 0), np.int64), np.empty((len(x), 0), np.int64)
    for start in range(0, len(train), columns):
        distances = _relative_distances(x, np.asarray(train[start : start + columns]).reshape(-1, x.shape[1]))
        if itself is not None:
            own = np.flatnonzero((start <= itself) & (itself < start + distances.shape[1]))
            distances[own, itself[own] - start] = np.iinfo(distances.dtype).max
        found, where = _smallest(distances, min(k, distances.shape[1]))
        # What was found before has lower indices and stands in front, where the stable sort leaves it among equals.
        best, index = np.hstack([best, found]), np.hstack([index, where + start])
        order = best.argsort(axis=1, kind="stable")[:, :k]
        best, index = np.take_along_axis(best, order, axis=1), np.take_along_axis(index, order, axis=1)
    return best + _squared_norms(x)[:, None], index


def _relative_distances(x: Images, y: Images) -> NDArray[np.signedinteger]:
    """(n, m): squared distances between x (n, P) and y (m, P) minus |x|^2, exact.

    They lie between -2^14 P and 3 * 2^14 P: int32 holds them for up to 2^15 pixels, at half the memory of int64.
    """
    distances = np.zeros((len(x), len(y)), np.int32 if x.shape[1] <= 2**15 else np.int64)
    distances += _squared_norms(y).astype(distances.dtype)
    for a, b in zip(_pieces(x), _pieces(y), strict=True):
        b *= -2  # even products, at most 2^25 in sum: exact
        distances += (a @ b.T).astype(distances.dtype)
    return distances


def _squared_norms(images: Images) -> Integers:
    """(n,): the squared norms of images (n, P) minus 128, exact."""
    norms = np.zeros(len(images), np.int64)
    for piece in _pieces(images):
        norms += np.einsum("ij,ij->i", piece, piece).astype(np.int64)
    return norms


def _pieces(images: Images) -> Iterator[NDArray[np.float32]]:
    """Images (n, P) minus 128, in pieces of PIXELS columns."""
    for start in range(0, images.shape[1], PIXELS):
        yield images[:, start : start + PIXELS].astype(np.float32) - 128


def _smallest(distances: NDArray[np.signedinteger], k: int) -> tuple[Integers, Integers]:
    """(n, k): the smallest numbers of each row and where they stand, the first one of equals first.  The numbers are overwritten."""
    rows = np.arange(len(distances))
    found, where = np.empty((2, len(distances), k), np.int64)
    for place in range(k):
        where[:, place] = distances.argmin(axis=1)  # numpy promises the first; torch, and topk, promise nothing
        found[:, place] = distances[rows, where[:, place]]
        distances[rows, where[:, place]] = np.iinfo(distances.dtype).max
    return found, where


def memorisation(generated: Neighbourhood, test: Neighbourhood) -> dict[str, float]:
    """What the distances say of generated images, beside those of real images that the model has not seen.

    duplicates: share whose every pixel is a training image's.
    copies: share whose nearest training image is less than a third as far as the second nearest (Yoon et al. 2023).  An exact
        duplicate counts also where the training image is there twice, so that the second is as near; a close but inexact copy of such
        an image escapes the rule.
    authentic: share that is further from its nearest training image than that is from its own nearest neighbour in the training set
        (Alaa et al. 2022, "AuthPct"); the lower, the more copies.  A blurred or broken image is authentic too.
    distance: median over the images of the root mean square difference of the pixels to the nearest training image, grey levels (0 .. 255).
    ratio_to_test: this median over that of the test images; below 1: closer to the training images than unseen real images are.
    mann_whitney_z: z of the Mann-Whitney U of the distances (Meehan et al. 2020, the test behind C_T, over the whole space at once).
        NEGATIVE: generated images lie closer to the training images than unseen real ones, which is memorising; about 0 +- 1 for images
        from the distribution of the test images; positive: further away.  It grows with the square root of the numbers of images.

    Raises UserError if the two were measured against different training images, or half of the test images are training images.
    """
    if (generated.train, generated.pixels) != (test.train, test.pixels):
        found = f"{generated.train} of {generated.pixels} pixels and {test.train} of {test.pixels}"
        raise UserError(
            f"distances to different training images cannot be compared, got {found}: measure the test images again with"
            " `dvc repro -f reference`"
        )
    unseen = float(np.median(test.distance))
    if not unseen:
        raise UserError(
            "at least half of the test images are training images, pixel for pixel, so they say nothing of unseen images:"
            " take the duplicates out of one of the splits"
        )
    near, second = generated.squared.T
    distance = float(np.median(generated.distance))
    return {
        "duplicates": float((near == 0).mean()),
        "copies": float(((9 * near < second) | (near == 0)).mean()),
        "authentic": float((near > generated.spacing).mean()),
        "distance": distance,
        "ratio_to_test": distance / unseen,
        "mann_whitney_z": mann_whitney_z(near, test.squared[:, 0]),
    }


def mann_whitney_z(a: Integers, b: Integers) -> float:
    """Mann and Whitney's U of a (N,) against b (M,) in units of its standard deviation under equal distributions; negative: a is smaller.

    Normal approximation with the correction for ties, without one for continuity, so that exchanging a and b changes the sign only.
    scipy's own test gives p alone, which underflows where z is large.
    """
    n, m = len(a), len(b)
    ranks = rankdata(np.concatenate([a, b]))
    variance = tiecorrect(ranks) * n * m * (n + m + 1) / 12
    u = ranks[:n].sum() - n * (n + 1) / 2  # pairs in which a is the larger one
    return float((u - n * m / 2) / np.sqrt(variance)) if variance > 0 else 0.0


def closest(neighbourhood: Neighbourhood, n: int) -> list[dict[str, Any]]:
    """The n images that look most like copies, by the ratio of `copies`; of equal ones the lower row first.

    index: the row of the image; nearest: the rows of its two nearest training images; ratio: see `Neighbourhood`.
    """
    rows = neighbourhood.ratio.argsort(kind="stable")[:n]
    table = zip(rows.tolist(), neighbourhood.index[rows].tolist(), neighbourhood.ratio[rows].tolist(), strict=True)
    return [{"index": row, "nearest": nearest, "ratio": ratio} for row, nearest, ratio in table]


def save_neighbourhood(path: Path, neighbourhood: Neighbourhood) -> None:
    """Write it atomically; the bytes depend on the numbers alone."""
    arrays = {name: np.ascontiguousarray(getattr(neighbourhood, name)) for name in ("squared", "index", "spacing")}
    sizes = json.dumps({"train": neighbourhood.train, "pixels": neighbourhood.pixels})  # one entry: their order would not be fixed
    replace_file(path, safetensors.numpy.save(arrays, {"sizes": sizes}))


def load_neighbourhood(path: Path) -> Neighbourhood:
    """The neighbourhood in the file.  Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `dvc repro reference`")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in ("squared", "index", "spacing")}
            return Neighbourhood(**arrays, **json.loads(file.metadata()["sizes"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again with `dvc repro -f reference`") from None


def _check(images: Images, train: Images, title: str) -> None:
    for name, array in ((title, images), ("training images", train)):
        if array.dtype != np.uint8 or array.ndim != 4 or not array.size:
            found = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"the {name} must be a uint8 (0..255) array [N, C, H, W] that is not empty, got {found}")
    if images.shape[1:] != train.shape[1:]:
        shapes = f"{list(images.shape[1:])} and {list(train.shape[1:])}"
        raise UserError(f"the {title} and the training images must have one shape [C, H, W], got {shapes}: take both from one image set")
    if len(train) < LEAST:
        raise UserError(f"a nearest-neighbour check needs at least {LEAST} training images, got {len(train)}: use a larger set")
