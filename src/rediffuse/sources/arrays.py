"""Images in NumPy's files: .npz, .npy, or a folder with images.npy and, if there are labels, labels.npy."""

from __future__ import annotations

import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rediffuse.images.image_set import Split
from rediffuse.runtime.errors import UserError
from rediffuse.sources.folder import SPLIT_NAMES
from rediffuse.sources.found import Found

IMAGES = "images", "x", "X", "data", "arr_0"
LABELS = "labels", "y", "targets"
BY_SPLIT = ("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels")
KEYS = (
    "the images as `images`, `x`, `data` or `arr_0`, with their labels, if there are any, as `labels`, `y` or"
    " `targets`; or by split as `x_train`, `y_train`, `x_test`, `y_test`, or `train_images` and so on"
)
SHAPES = "(N, H, W), (N, H, W, C) with 1, 3 or 4 channels, or (N, C, H, W) with 1 or 3"
INTEGERS = "images.astype('uint8') if they are in 0..255, (images // 257).astype('uint8') if in 0..65535"
AS_UINT8 = {  # by the kind of a data type
    "b": "(images * 255).astype('uint8')",
    "f": "(images * 255).round().astype('uint8') if they are in [0, 1],"
    " ((images + 1) * 127.5).round().astype('uint8') if they are in [-1, 1]",
    "i": INTEGERS,
    "u": INTEGERS,
}


class ArrayImages:
    """Images of one or more arrays, each with its name: uint8 (N, H, W), or (N, H, W, 3 or 4)."""

    def __init__(self, arrays: Mapping[str, NDArray[np.uint8]]) -> None:
        self.names, self.arrays = list(arrays), list(arrays.values())
        self.ends = list(accumulate(map(len, self.arrays)))

    def __len__(self) -> int:
        return self.ends[-1]

    def name(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self.names[number]}, image {row}"

    def open(self, index: int) -> Image.Image:
        number, row = self._place(index)
        return Image.fromarray(np.array(self.arrays[number][row]))

    def _place(self, index: int) -> tuple[int, int]:
        number = bisect_right(self.ends, index)
        return number, index - self.ends[number] + len(self.arrays[number])


def is_arrays(path: Path) -> bool:
    """Return whether `find_arrays` is the way in."""
    return (path / "images.npy").is_file() or (path.is_file() and path.suffix.lower() in (".npy", ".npz"))


def find_arrays(path: Path) -> Found:
    """Return the images of a file or a folder, with labels, and with splits if its keys name them (see KEYS).

    .npy is mapped into memory, .npz is read whole.  `classes` may name the labels, which then are indices.
    Raises UserError for what is not uint8, and where keys, shapes or labels cannot be told.
    """
    try:
        arrays = _load(path)
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({error}): write it again with numpy.save or numpy.savez, text as"
            " array.astype(str); Python objects (pickle) are not loaded"
        ) from None
    parts = _parts(path, arrays)
    images = {f"{key} in {path}": _as_images(f"{key} in {path}", arrays[key]) for _, key, _ in parts}
    counts = [len(each) for each in images.values()]
    splits = [split for (split, *_), n in zip(parts, counts, strict=True) if split for _ in range(n)]
    labels = [
        _as_labels(f"{label} in {path}", arrays[label], n)
        for (*_, label), n in zip(parts, counts, strict=True)
        if label
    ]
    numbers, classes = _name_labels(path, labels, arrays.get("classes")) if labels else (None, ())
    unused = set(arrays) - {"classes", *(key for _, *keys in parts for key in keys)}
    notes = [f"arrays that are not used: {', '.join(sorted(unused))}"] if unused else []
    return Found(ArrayImages(images), numbers, classes, splits or None, notes)


def number_labels(values: NDArray[Any]) -> tuple[list[int], tuple[str, ...]]:
    """Return an index for each value, and the values as text, in their order as numbers or text."""
    names, labels = np.unique(values, return_inverse=True)
    return labels.tolist(), tuple(map(str, names.tolist()))


def _load(path: Path) -> dict[str, NDArray[Any]]:
    if path.is_dir():
        files = {key: path / f"{key}.npy" for key in ("images", "labels", "classes")}
        return {key: np.load(file, "r", allow_pickle=False) for key, file in files.items() if file.exists()}
    loaded = np.load(path, "r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {"images": loaded}
    with loaded:
        return {key: np.asarray(loaded[key]) for key in loaded}


def _parts(path: Path, arrays: Mapping[str, NDArray[Any]]) -> list[tuple[Split | None, str, str | None]]:
    """Return split, key of the images and key of the labels of each part.  Raises UserError if unclear."""
    labels: list[str | None] = [key for key in LABELS if key in arrays]
    parts = [(None, key, label) for key in IMAGES if key in arrays for label in labels or [None]]
    by_split = [
        (split, image.format(word), label.format(word) if label.format(word) in arrays else None)
        for word, split in SPLIT_NAMES.items()
        for image, label in BY_SPLIT
        if image.format(word) in arrays
    ]
    splits = [split for split, *_ in by_split]
    one_set = len(parts) == 1 and not splits
    one_each = "train" in splits and len(set(splits)) == len(splits) and not parts
    all_parts = [*parts, *by_split]
    if not (one_set or one_each) or len({label is None for *_, label in all_parts}) > 1:
        found = ", ".join(f"{key} {array.shape} {array.dtype}" for key, array in arrays.items()) or "none"
        raise UserError(
            f"{path} must have {KEYS}; each once, and labels for all images or none.  Its arrays are {found}:"
            " rename them, or leave some out"
        )
    return all_parts


def _as_images(title: str, array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a view (N, H, W) or (N, H, W, 3 or 4).  Raises UserError for other types and shapes."""
    shape, four = array.shape, array.ndim == 4
    if array.dtype != np.uint8:
        remedy = AS_UINT8.get(array.dtype.kind, "an array of pixels")
        raise UserError(f"{title} must be uint8, 0 to 255, and is {array.dtype}: write {remedy}")
    last, first = four and shape[3] in (1, 3, 4), four and shape[1] in (1, 3)
    one = array.ndim == 3 and shape[2] in (1, 3, 4)  # a single image in colour looks like (N, H, W)
    if one or 0 in shape or not (array.ndim == 3 or last != first):
        why = "can be read in two ways" if one or (last and first) else "is none of these"
        raise UserError(
            f"{title} must be {SHAPES}; its shape {shape} {why}: use array.reshape or array.transpose"
        )
    if first:
        array = array.transpose(0, 2, 3, 1)
    return array[..., 0] if four and array.shape[3] == 1 else array


def _as_labels(title: str, array: NDArray[Any], n: int) -> NDArray[Any]:
    """Return (N,), int64 or text.  Raises UserError for what is not one integer or text for each image."""
    if array.dtype.kind not in "iuU" or array.shape not in ((n,), (n, 1)):
        raise UserError(
            f"{title} must be integers or text, one for each of the {n} images, and is {array.dtype}"
            f" {array.shape}: write labels.argmax(axis=1) if they are one-hot, labels.astype('int64') if they"
            " are whole numbers, or leave them out"
        )
    return array.ravel() if array.dtype.kind == "U" else array.ravel().astype(np.int64)


def _name_labels(
    path: Path, labels: list[NDArray[Any]], names: NDArray[Any] | None
) -> tuple[list[int], tuple[str, ...]]:
    values = np.concatenate(labels)
    if len({each.dtype.kind for each in labels}) > 1:
        raise UserError(f"the labels in {path} are integers in one split and text in another: write one kind")
    if names is None:
        return number_labels(values)
    distinct = names.dtype.kind == "U" and names.ndim == 1 and len(np.unique(names)) == len(names)
    if not distinct or values.dtype.kind == "U" or values.min() < 0 or values.max() >= len(names):
        raise UserError(
            f"classes in {path} must be names, all different, and the labels their indices from 0; they are"
            f" {names.dtype} {names.shape}, and the labels {values.min()} to {values.max()}"
        )
    return values.tolist(), tuple(names.tolist())
