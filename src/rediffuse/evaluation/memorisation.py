"""Does a model repeat its training images? Distances of generated and real images to the nearest of them.

Distances are L2 between pixels, and exact. Pixels minus 128 lie in -128 .. 127, so any sum of 1024 products
of two is an integer of at most 2^24, which float32 holds exactly. So |x|^2 + |y|^2 - 2 x.y is exact at the
speed of a float32 matrix product; of larger images, pieces of 1024 pixels are added as integers. The products
are numpy's, because torch may round the factors to bfloat16 (`set_float32_matmul_precision`).

The numbers are evidence, not a verdict: pixels miss a training image shifted by one, and real images can lie
close to each other too. So real test images, which no model has seen, are measured for comparison.
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
ROWS, COLUMNS = 1024, 2048  # images and training images in one block, 8 MiB each for products and distances
BYTES = 2**25  # of uint8 pixels in one block, so that large images come in smaller blocks
LEAST = 3  # training images: the nearest, the second nearest, and another neighbour of either
ARRAYS = ("squared", "index", "spacing")


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Where N images lie among the training images.

    squared: int64 (N, 2), squared L2 distances to the nearest and second nearest training image, grey levels;
    index: int64 (N, 2), their indices; spacing: int64 (N,), squared distance from the nearest one to its own
    nearest neighbour in the training set; train: number of training images; pixels: C H W of an image.
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
        """Measure images (N, C, H, W) against training images (M, C, H, W): uint8, may be memory-mapped.

        2 (N + U) M C H W operations, where U <= N is the number of different nearest training images.
        Raises UserError for another dtype or shape, no images, and fewer than three training images.
        """
        _check(images, train, title)
        squared, index = nearest(images, train, title=title)
        used, where = np.unique(index[:, 0], return_inverse=True)
        spacing, _ = nearest(train[used], train, k=1, itself=used, title=f"neighbours of {title}")
        return cls(squared, index, spacing[where, 0], len(train), int(np.prod(images.shape[1:])))

    def take(self, rows: slice) -> Neighbourhood:
        """Return these rows: of sets that were measured together, one."""
        parts = {name: getattr(self, name)[rows] for name in ARRAYS}
        return Neighbourhood(**parts, train=self.train, pixels=self.pixels)

    @property
    def ratio(self) -> NDArray[np.float64]:
        """(N,), 0 .. 1: distance to the nearest over that to the second nearest; 0 for an exact copy."""
        near, second = self.squared.T
        squared: NDArray[np.float64] = np.divide(near, second, out=np.zeros(len(self)), where=second > 0)
        return np.sqrt(squared)

    @property
    def distance(self) -> NDArray[np.float64]:
        """(N,), 0 .. 255: root mean square difference to the nearest training image, in grey levels."""
        rms: NDArray[np.float64] = np.sqrt(self.squared[:, 0] / self.pixels)
        return rms


def nearest(
    images: Images, train: Images, *, k: int = 2, itself: Integers | None = None, title: str = "images"
) -> tuple[Integers, Integers]:
    """Return squared L2 distances to the k nearest training images and their indices: int64 (N, k), in order.

    images: uint8 (N, C, H, W); train: uint8 (M, C, H, W). Only blocks are in memory, less than 300 MB.
    itself: int64 (N,), for images that are training images: the index to leave out for each.
    Of training images at equal distance the lower index comes first.
    """
    pixels = int(np.prod(images.shape[1:]))
    rows, columns = (max(1, min(size, BYTES // pixels)) for size in (ROWS, COLUMNS))
    squared, index = np.empty((2, len(images), k), np.int64)
    for first in tqdm(range(0, len(images), rows), desc=f"nearest to {title}", unit="block", leave=False):
        here = slice(first, first + rows)
        x = np.asarray(images[here]).reshape(-1, pixels)
        own = None if itself is None else itself[here]
        squared[here], index[here] = _nearest_of_block(x, train, columns, k, own)
    return squared, index


def _nearest_of_block(
    x: Images, train: Images, columns: int, k: int, itself: Integers | None
) -> tuple[Integers, Integers]:
    """As `nearest`, for a few images (n, P), going through all training images."""
    best, index = np.empty((len(x), 0), np.int64), np.empty((len(x), 0), np.int64)
    for start in range(0, len(train), columns):
        distances = _relative_distances(x, np.asarray(train[start : start + columns]).reshape(-1, x.shape[1]))
        if itself is not None:
            own = np.flatnonzero((start <= itself) & (itself < start + distances.shape[1]))
            distances[own, itself[own] - start] = np.iinfo(distances.dtype).max
        found, where = _smallest(distances, min(k, distances.shape[1]))
        # Earlier finds have lower indices and come first, so the stable sort keeps them first among equals.
        best, index = np.hstack([best, found]), np.hstack([index, where + start])
        order = best.argsort(axis=1, kind="stable")[:, :k]
        best, index = np.take_along_axis(best, order, axis=1), np.take_along_axis(index, order, axis=1)
    return best + _squared_norms(x)[:, None], index


def _relative_distances(x: Images, y: Images) -> NDArray[np.signedinteger]:
    """Return (n, m) squared distances between x (n, P) and y (m, P) minus |x|^2, exact.

    They lie between -2^14 P and 3 * 2^14 P: int32 holds them for up to 2^15 pixels, at half the memory of
    int64.
    """
    distances = np.zeros((len(x), len(y)), np.int32 if x.shape[1] <= 2**15 else np.int64)
    distances += _squared_norms(y).astype(distances.dtype)
    for a, b in zip(_pieces(x), _pieces(y), strict=True):
        b *= -2  # even products, at most 2^25 in sum: exact
        distances += (a @ b.T).astype(distances.dtype)
    return distances


def _squared_norms(images: Images) -> Integers:
    """Return the squared norms (n,) of images (n, P) minus 128, exact."""
    norms = np.zeros(len(images), np.int64)
    for piece in _pieces(images):
        norms += np.einsum("ij,ij->i", piece, piece).astype(np.int64)
    return norms


def _pieces(images: Images) -> Iterator[NDArray[np.float32]]:
    """Yield images (n, P) minus 128, in pieces of PIXELS columns."""
    for start in range(0, images.shape[1], PIXELS):
        yield images[:, start : start + PIXELS].astype(np.float32) - 128


def _smallest(distances: NDArray[np.signedinteger], k: int) -> tuple[Integers, Integers]:
    """Return the k smallest numbers of each row and their columns, (n, k). Overwrites the numbers."""
    rows = np.arange(len(distances))
    found, where = np.empty((2, len(distances), k), np.int64)
    for place in range(k):
        column = distances.argmin(axis=1)  # numpy promises the first of equals; torch does not
        where[:, place], found[:, place] = column, distances[rows, column]
        distances[rows, column] = np.iinfo(distances.dtype).max
    return found, where


def memorisation(generated: Neighbourhood, test: Neighbourhood) -> dict[str, float]:
    """Compare the distances of generated images with those of real images that the model has not seen.

    duplicates: share equal to a training image in every pixel.
    copies: share whose nearest training image is less than a third as far as the second nearest (Yoon et al.
        2023), and all duplicates. A close but inexact copy of an image that is there twice does not count.
    authentic: share further from its nearest training image than that is from its own nearest neighbour in
        the training set (Alaa et al. 2022, "AuthPct"). A blurred or broken image is authentic too.
    distance: median of the root mean square difference to the nearest training image, grey levels (0 .. 255).
    ratio_to_test: this median over that of the test images; below 1: closer to the training images.
    mann_whitney_z: z of the Mann-Whitney U of the distances (Meehan et al. 2020, the test behind C_T).
        NEGATIVE: closer to the training images than unseen real images are (memorising); about 0 +- 1 for
        images from the distribution of the test images. Grows with the root of the number of images.

    Raises UserError if the two were measured against different training images, or half of the test images
    are training images.
    """
    if (generated.train, generated.pixels) != (test.train, test.pixels):
        found = f"{generated.train} of {generated.pixels} pixels and {test.train} of {test.pixels}"
        raise UserError(
            f"distances to different training images cannot be compared, got {found}: measure the test images"
            " again with `dvc repro -f reference`"
        )
    unseen = float(np.median(test.distance))
    if not unseen:
        raise UserError(
            "at least half of the test images are training images, pixel for pixel, so they cannot stand for"
            " unseen images: remove the duplicates from one of the splits"
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
    """Return Mann and Whitney's U of a (N,) against b (M,), standardised; negative: a is smaller.

    Normal approximation with the correction for ties, without one for continuity: exchanging a and b changes
    only the sign. scipy's test returns only p, which underflows where z is large.
    """
    n, m = len(a), len(b)
    ranks = rankdata(np.concatenate([a, b]))
    variance = tiecorrect(ranks) * n * m * (n + m + 1) / 12
    u = ranks[:n].sum() - n * (n + 1) / 2  # pairs in which a is the larger one
    return float((u - n * m / 2) / np.sqrt(variance)) if variance > 0 else 0.0


def closest(neighbourhood: Neighbourhood, n: int) -> list[dict[str, Any]]:
    """Return the n images that look most like copies, by the ratio of `copies`; of equals the lower row.

    index: the row of the image; nearest: the rows of its two nearest training images; ratio: see
    `Neighbourhood`.
    """
    ratio, index = neighbourhood.ratio, neighbourhood.index
    rows = ratio.argsort(kind="stable")[:n].tolist()
    return [{"index": row, "nearest": index[row].tolist(), "ratio": float(ratio[row])} for row in rows]


def save_neighbourhood(path: Path, neighbourhood: Neighbourhood) -> None:
    """Write atomically. The bytes depend only on the numbers."""
    arrays = {name: np.ascontiguousarray(getattr(neighbourhood, name)) for name in ARRAYS}
    sizes = {"train": neighbourhood.train, "pixels": neighbourhood.pixels}
    metadata = {"sizes": json.dumps(sizes)}  # one entry: the order of several is not fixed
    replace_file(path, safetensors.numpy.save(arrays, metadata))


def load_neighbourhood(path: Path) -> Neighbourhood:
    """Return the neighbourhood in the file. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `dvc repro reference`")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
            return Neighbourhood(**arrays, **json.loads(file.metadata()["sizes"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again with `dvc repro -f reference`") from None


def _check(images: Images, train: Images, title: str) -> None:
    for name, array in ((title, images), ("training images", train)):
        if array.dtype != np.uint8 or array.ndim != 4 or not array.size:
            found = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"the {name} must be a non-empty uint8 array [N, C, H, W], got {found}")
    if images.shape[1:] != train.shape[1:]:
        shapes = f"{list(images.shape[1:])} and {list(train.shape[1:])}"
        raise UserError(f"the {title} and the training images must have one shape [C, H, W], got {shapes}")
    if len(train) < LEAST:
        raise UserError(f"memorisation needs at least {LEAST} training images, got {len(train)}: take more")
