"""An image set on disk: `images.npy` and `labels.npy` for each split, and a `manifest.json`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rediffuse.images.files import load_npy
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import read_json

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = "train", "validation", "test"

REMEDY = "make it again with `dvc repro -f prepare`"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and what they show.  Arrays from `load_images` are memory-mapped and read-only.

    images: uint8 (N, C, H, W), 0..255, or float32, latents of a VAE.
    labels: int64 (N,), each an index into `classes`, or None.
    classes: the names of the labels, empty if there are none.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype not in (np.uint8, np.float32) or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 or float32 (N, C, H, W), got {images.dtype} {images.shape}"
            )
        if labels is None:
            return
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise ValueError(f"labels must be int64 ({len(images)},), got {labels.dtype} {labels.shape}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(f"labels must be 0..{len(self.classes) - 1}, got {labels.min()}..{labels.max()}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, indices: NDArray[np.int64]) -> ImageSet:
        """Return the images at these indices, in this order, copied into memory."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageSet(self.images[indices], labels, self.classes)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder that replaces `folder` at the end of the block, unless there is an error."""
    folder = Path(folder)
    incoming = folder.with_name(f".{folder.name}.incoming")
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    try:
        yield incoming
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(incoming, folder)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def save_images(folder: str | Path, splits: Mapping[str, ImageSet], manifest: Mapping[str, Any]) -> None:
    """Write the splits and their manifest.  The folder is replaced as a whole and never seen half-written."""
    with replacing(folder) as incoming:
        for name, split in splits.items():
            save_arrays(incoming / name, split.images, split.labels)
        save_manifest(incoming, manifest)


def save_arrays(folder: Path, images: NDArray[Any], labels: NDArray[np.int64] | None) -> None:
    """Write `images.npy` and, if there are labels, `labels.npy`."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images)
    if labels is not None:
        np.save(folder / "labels.npy", labels)


def save_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n")


class ImageAppender:
    """A context in which a split is written image by image, in constant memory, as `save_images` writes it.

    shape: (C, H, W) of all images.  labels: whether each has one.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, labels: bool) -> None:
        folder.mkdir(parents=True)
        self.folder, self.shape, self.count = folder, shape, 0
        self.labels: list[int] | None = [] if labels else None
        self.file = (folder / "images.npy").open("wb")

    def __enter__(self) -> ImageAppender:
        self._write_header()
        return self

    def __exit__(self, *_: object) -> None:
        with self.file:
            self.file.seek(0)
            self._write_header()  # of the same length: numpy leaves room for the first axis to grow
        if self.labels is not None:
            np.save(self.folder / "labels.npy", np.array(self.labels, np.int64))

    def append(self, image: NDArray[np.uint8], label: int | None) -> None:
        """image: (C, H, W)."""
        if image.shape != self.shape or image.dtype != np.uint8:
            raise ValueError(f"image must be uint8 {self.shape}, got {image.dtype} {image.shape}")
        self.file.write(image.tobytes())
        self.count += 1
        if self.labels is not None:
            assert label is not None
            self.labels.append(label)

    def _write_header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)


def load_images(folder: str | Path, split: Split) -> ImageSet:
    """Map one split into memory.  Raises UserError if it is missing or damaged."""
    return load_split(Path(folder), split, load_manifest(folder).get("classes", ()))


def load_split(folder: Path, split: Split, classes: Sequence[str]) -> ImageSet:
    """Map one split into memory when the classes are known and the manifest is not written yet."""
    path = folder / split / "labels.npy"
    images = load_npy(folder / split / "images.npy", REMEDY, mmap_mode="r")
    labels = load_npy(path, REMEDY, mmap_mode="r") if path.exists() else None
    try:
        return ImageSet(images, labels, tuple(classes))
    except ValueError as error:
        raise UserError(f"{folder / split} is damaged ({error}): {REMEDY}") from None


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """Return `manifest.json`: source, licence, classes, shape, mean, std, counts and hashes."""
    return read_json(Path(folder) / "manifest.json", REMEDY)


def check_images(images: NDArray[np.uint8], shape: tuple[int, ...], title: str) -> None:
    """Raise UserError unless images are at least one uint8 array of this (C, H, W)."""
    if images.dtype != np.uint8:
        raise UserError(
            f"{title}: the images must be uint8 (0..255), got {images.dtype}: round and convert them once,"
            " when they are drawn"
        )
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not len(images):
        wanted = ", ".join(map(str, shape))
        raise UserError(
            f"{title}: the images must be an array [N, {wanted}] as the instrument takes them,"
            f" got {list(images.shape)}"
        )
