"""A folder of your own images -> train, validation and test as uint8 arrays.

Images in sub-folders: each sub-folder is a class, with all images below it.  Images in the folder itself: no
classes.  Every image is turned as its EXIF orientation says, laid on white where it is transparent, cut to
the largest square around its centre and resized (Lanczos); of an animation, the first frame.  Decoding is
parallel and takes constant memory.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from rediffuse.images.image_set import ImageAppender, Split
from rediffuse.params import SIDES, Data
from rediffuse.runtime.errors import UserError
from rediffuse.sources.splits import split_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
GREY = "1", "L", "LA", "La"  # modes of Pillow; those that begin with I are grey too
# Images of each split: the memorisation looks for two neighbours, and a neighbour of these.
LEAST: dict[Split, int] = {"train": 3, "validation": 1, "test": 1}
FEW = 1000  # below this many images a model memorises its training set
MANY = 100_000  # above this many images, validation and test cost more than they tell
AHEAD = 64  # images per thread that are read before they are needed
SHOWN = 5  # damaged files named in an error

T = TypeVar("T")


def write_folder(data: Data, target: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Write the splits of the folder `data.path` below `target`; return the classes and a description.

    Raises UserError if there are no images, for images that cannot be decoded, and for a split with too few.
    """
    paths, labels, classes = find_images(Path(data.path))
    shape = survey(paths, data.size, data.channels)
    images = in_parallel(partial(decode, shape=shape), paths, "decoding")
    shares = {"validation": data.validation_share, "test": data.test_share}
    known: Sequence[int | None] = labels or [None] * len(paths)
    counts = Counter[str]()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(ImageAppender(target / name, shape, labels=labels is not None))
            for name in LEAST
        }
        for image, label in zip(images, known, strict=True):
            split = split_of(image, seed=data.split_seed, **shares)
            files[split].append(image, label)
            counts[split] += 1
    _check_counts(counts, len(paths))
    about = {
        "set": "folder",
        "description": f"{len(paths):,} images of a folder, {'grey' if shape[0] == 1 else 'colour'},"
        f" {shape[2]}x{shape[1]}",
        "source": None,
        "citation": None,
        "licence": None,
        "resize": "none" if data.size == 0 else "largest square around the centre, Lanczos",
    }
    return classes, about


def _check_counts(counts: Counter[str], n: int) -> None:
    """Raise UserError for a split with too few images; warn of few images, and of more than a split needs."""
    if any(counts[name] < least for name, least in LEAST.items()):
        found = ", ".join(f"{counts[name]} in {name}" for name in LEAST)
        least = ", ".join(f"{least} in {name}" for name, least in LEAST.items())
        raise UserError(
            f"the {n} images in data.path fall to the splits by their content: {found}; there must be at"
            f" least {least}: set another data.split_seed, raise data.validation_share or data.test_share,"
            " or take more images that differ (params.yaml)"
        )
    warnings = [
        f"{counts[name]:,} images are more than the split {name} needs: lower data.{name}_share, for example"
        f" to {10_000 / n:.1g}"
        for name in ("validation", "test")
        if counts[name] > MANY
    ]
    if n < FEW:
        warnings.append(f"{n} images are few: a model memorises them; see the memorisation in its evaluation")
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)


def find_images(folder: Path) -> tuple[list[str], list[int] | None, tuple[str, ...]]:
    """Return the images of a folder and its sub-folders, their labels (None without sub-folders), classes.

    Hidden files and other file types are skipped.  The paths are sorted, and text: 10 million take 1 GB, as
    Path objects 4 GB.
    """
    if not folder.is_dir():
        raise UserError(f"data.path ({folder}) must be a folder of images; there is none (params.yaml)")
    paths, labels, index = list[str](), list[int](), dict[str | None, int]()
    for top, path in _walk(folder):
        paths.append(path)
        labels.append(index.setdefault(top, len(index)))  # sub-folders are walked in the order of their names
    if not paths:
        raise UserError(
            f"data.path ({folder}) holds no images, files that end with {', '.join(SUFFIXES)}.  (In the"
            " temporary workspace of a queued experiment there is only what git or DVC tracks: `dvc add`"
            " the folder, or give its absolute path.)"
        )
    if None not in index:
        classes = tuple(name for name in index if name is not None)
        for name in classes:
            if name != name.encode(errors="replace").decode():
                raise UserError(f"the sub-folder {name!r} of data.path must have a name in UTF-8: rename it")
        return paths, labels, classes
    if len(index) > 1:
        loose = labels.count(index[None])
        raise UserError(
            f"data.path ({folder}) holds {loose} images beside sub-folders with {len(paths) - loose} more:"
            " put all of them into sub-folders, one for each class, or none"
        )
    return paths, None, ()


def survey(paths: Sequence[str], size: int, channels: Literal[1, 3, "auto"]) -> tuple[int, int, int]:
    """Return (C, H, W) of all images, from the heads of the files where the parameters leave it open.

    Raises UserError if size is 0 and they differ, or are out of SIDES.
    """
    if size and channels != "auto":
        return channels, size, size
    heads = Counter(in_parallel(_head, paths, "looking"))
    if channels == "auto":
        channels = 1 if all(grey for grey, _ in heads) else 3
    if size:
        return channels, size, size
    sizes = sorted({side for _, side in heads})
    (narrow, low), (wide, high) = sizes[0], sizes[-1]
    remedy = "set data.size, for example to 64 (params.yaml)"
    if len(sizes) > 1:
        raise UserError(
            "data.size is 0, so all images of data.path must have one size; they have"
            f" {len(sizes)}, from {narrow}x{low} to {wide}x{high}: {remedy}"
        )
    if not (SIDES[0] <= narrow <= SIDES[1] and SIDES[0] <= low <= SIDES[1]):
        raise UserError(
            f"the images of data.path are {narrow}x{low}, and must have {SIDES[0]} to {SIDES[1]} pixels a"
            f" side: {remedy}"
        )
    return channels, low, narrow


def decode(path: str | Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return uint8 (C, H, W) = shape, C = 1 or 3: the largest central part of this shape, resized."""
    channels, height, width = shape
    with Image.open(path) as image:
        flat = _on_white(_eight_bits(ImageOps.exif_transpose(image))).convert("L" if channels == 1 else "RGB")
    if flat.size != (width, height):
        scale = min(flat.width / width, flat.height / height)
        across, down = round(width * scale), round(height * scale)
        left, top = (flat.width - across) // 2, (flat.height - down) // 2
        flat = flat.crop((left, top, left + across, top + down))
        flat = flat.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(flat)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def in_parallel(work: Callable[[str], T], paths: Sequence[str], title: str) -> Iterator[T]:
    """Yield work(path) of each image, in order.  Raises UserError at the end for all images that fail."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    failed: list[str] = []

    def attempt(path: str) -> T | str:
        try:
            return work(path)
        # What Pillow raises for damaged files.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{path}: {' '.join(str(error).split())}"

    bar = tqdm(total=len(paths), desc=title, unit="image", leave=False)
    with ThreadPoolExecutor(threads) as pool, bar:
        for start in range(0, len(paths), AHEAD * threads):
            for result in pool.map(attempt, paths[start : start + AHEAD * threads]):
                bar.update()
                if isinstance(result, str):
                    failed.append(result)
                else:
                    yield result
    if failed:
        shown = [*failed[:SHOWN], *([f"and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else [])]
        raise UserError(
            f"{len(failed)} of {len(paths)} images in data.path cannot be read; delete or repair them:"
            + "".join(f"\n  {line}" for line in shown)
        )


def _walk(folder: Path) -> Iterator[tuple[str | None, str]]:
    """Yield sub-folder (None: the folder itself) and path of each image, in order, following links."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        top = next(iter(Path(root).relative_to(folder).parts), None)
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield top, f"{root}/{name}"


def _head(path: str) -> tuple[bool, tuple[int, int]]:
    """Return whether the file is grey, and its width and height after the EXIF rotation."""
    with Image.open(path) as image:
        width, height = image.size
        lies = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap width and height
        return image.mode in GREY or image.mode.startswith("I"), (height, width) if lies else (width, height)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits of grey to 8; Pillow would cut off what is above 255."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; convert it to 8 or 16 bits")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
