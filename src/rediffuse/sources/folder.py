"""A folder of images of one's own -> train, validation and test as uint8 arrays, decoded in parallel and in constant memory.

Images in sub-folders: each sub-folder is a class, of its own name, with all images below it.  Images in the folder itself: no classes.
Every image is turned as its EXIF orientation says, laid on white where it is transparent, cut to the largest square around its
centre and resized by Lanczos' filter; of an animation, the first frame.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from rediffuse.images.image_set import ImageAppender, Split, load_split
from rediffuse.params import SIDES
from rediffuse.runtime.errors import UserError
from rediffuse.sources.splits import split_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
GREY = "1", "L", "LA", "La"  # modes of Pillow; those that begin with I are grey too
LEAST = {"train": 3, "validation": 1, "test": 1}  # images; the memorisation looks for two neighbours, and a neighbour of these
FEW = 1000  # images, below which a model soon knows them by heart
MANY = 100_000  # images, above which a split to measure by costs more than it tells
SEEDS = 100  # data.split_seed that are tried for a set too small for the one that was chosen
AHEAD = 64  # images for each thread that are read before they are wanted
SHOWN = 5  # of the things that are wrong

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """The images of a folder in the order of their paths, and the class of each; no classes where they lie side by side."""

    paths: list[str]  # of 10 million images these take 1 GB, and as Path objects 4 GB
    labels: list[int] | None
    classes: tuple[str, ...]


def write_folder(
    source: Path, target: Path, *, size: int, channels: Literal[1, 3, "auto"], validation: float, test: float, seed: int
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Write the splits of the folder `source` below `target`, as `load_images` reads them; returns the classes and what the set is.

    size: pixels a side, SIDES; 0: as they are, which must be all alike.  channels: 1 grey, 3 colour; "auto": grey if all files are.
    validation, test: shares of the images, see `split_of`.  Raises UserError if there are no images, for images that cannot be
    decoded, and for a split that has none.
    """
    found = find_images(source)
    shape = survey(found.paths, size, channels) if size == 0 or channels == "auto" else (channels, size, size)

    def decoded(path: str) -> NDArray[np.uint8]:
        return decode(path, shape)

    splits: tuple[Split, ...] = ("train", "validation", "test")
    counts = Counter[str]()
    with ExitStack() as stack:
        files = {name: stack.enter_context(ImageAppender(target / name, shape, labels=found.labels is not None)) for name in splits}
        labels: Iterable[int | None] = [None] * len(found.paths) if found.labels is None else found.labels
        for image, label in zip(in_parallel(decoded, found.paths, "decoding"), labels, strict=True):
            split = split_of(image, seed=seed, validation=validation, test=test)
            files[split].append(image, label)
            counts[split] += 1
    if any(counts[name] < least for name, least in LEAST.items()):
        images = [image for name in splits if counts[name] for image in load_split(target, name, found.classes).images]
        raise _too_few(images, counts, validation=validation, test=test)
    for name in ("validation", "test"):
        if counts[name] > MANY:
            print(
                f"warning: {counts[name]:,} images are more than the split {name} needs, and each is measured again and again: lower"
                f" data.{name}_share, for example to {10_000 / len(found.paths):.1g}",
                file=sys.stderr,
            )
    if len(found.paths) < FEW:
        print(
            f"warning: {len(found.paths)} images are few: a model soon learns them by heart; see the memorisation in its evaluation",
            file=sys.stderr,
        )
    side = f"{shape[2]}x{shape[1]}"
    return found.classes, {
        "set": "folder",
        "description": f"{len(found.paths):,} images of a folder, {'grey' if shape[0] == 1 else 'colour'}, {side}",
        "source": None,
        "citation": None,
        "licence": None,
        "resize": "none" if size == 0 else "largest square around the centre, Lanczos",
    }


def _too_few(images: Sequence[NDArray[np.uint8]], counts: Mapping[str, int], *, validation: float, test: float) -> UserError:
    """What to say of splits with fewer images than LEAST.  A hash of the content promises none to any; but another seed may do."""

    def divided(seed: int) -> Counter[str]:
        return Counter(split_of(image, seed=seed, validation=validation, test=test) for image in images)

    found = ", ".join(f"{counts[name]} in {name}" for name in LEAST)
    wanted = ", ".join(f"{least} in {name}" for name, least in LEAST.items())
    for seed in range(1, SEEDS) if len(images) < FEW else ():
        if all((would := divided(seed))[name] >= least for name, least in LEAST.items()):
            remedy = f"set data.split_seed to {seed}, which gives {', '.join(str(would[name]) for name in LEAST)}"
            break
    else:
        remedy = (
            "raise data.validation_share or data.test_share where the images are missing, or take more images, of which no two are equal"
        )
    return UserError(
        f"the {len(images)} images in data.path fall to the splits by their content: {found}; there must be at least {wanted}: {remedy}"
        " (params.yaml)"
    )


def find_images(folder: Path) -> Found:
    """Those of the folder and its sub-folders; hidden files and files of other kinds are passed over."""
    if not folder.is_dir():
        raise UserError(f"data.path ({folder}) must be a folder of images; there is none (params.yaml)")
    paths, places, index = list[str](), list[int](), dict[str | None, int]()
    for top, path in _images(folder):
        paths.append(path)
        places.append(index.setdefault(top, len(index)))  # classes in the order of the walk, which is not that of their names
    if not paths:
        raise UserError(
            f"data.path ({folder}) holds no images, files that end with {', '.join(SUFFIXES)}.  (In the temporary workspace of a queued"
            " experiment there is only what git or DVC tracks: `dvc add` the folder, or give its absolute path.)"
        )
    classes = sorted(name for name in index if name is not None)
    if not classes:
        return Found(paths, None, ())
    if None in index:
        loose = places.count(index[None])
        raise UserError(
            f"data.path ({folder}) holds {loose} images beside sub-folders with {len(paths) - loose} more: put all of them into"
            " sub-folders, one for each class, or none"
        )
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"the name of the sub-folder {name!r} of data.path ({folder}) is not UTF-8: rename it") from None
    rank = {index[name]: i for i, name in enumerate(classes)}
    return Found(paths, [rank[place] for place in places], tuple(classes))


def survey(paths: Sequence[str], size: int, channels: Literal[1, 3, "auto"]) -> tuple[int, int, int]:
    """(C, H, W) of all images, by the heads of the files.  Raises UserError if size is 0 and they differ, or are out of SIDES."""
    heads = Counter(in_parallel(_head, paths, "looking"))
    if channels == "auto":
        channels = 1 if all(grey for grey, _ in heads) else 3
    if size:
        return channels, size, size
    sizes = sorted({side for _, side in heads})
    if len(sizes) > 1:
        (narrow, low), (wide, high) = sizes[0], sizes[-1]
        raise UserError(
            f"data.size is 0, so that the images of data.path must be of one size; they are of {len(sizes)}, from {narrow}x{low} to"
            f" {wide}x{high}: set data.size, for example to 64 (params.yaml)"
        )
    [(width, height)] = sizes
    if not all(SIDES[0] <= side <= SIDES[1] for side in (width, height)):
        raise UserError(
            f"the images of data.path are {width}x{height}, and must have {SIDES[0]} to {SIDES[1]} pixels a side: set data.size, for"
            " example to 64 (params.yaml)"
        )
    return channels, height, width


def decode(path: str | Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """uint8 (C, H, W) = shape, C = 1 or 3: the largest part around the centre that has this shape, resized."""
    channels, height, width = shape
    with Image.open(path) as image:
        flat = _on_white(_eight_bits(ImageOps.exif_transpose(image))).convert("L" if channels == 1 else "RGB")
    if flat.size != (width, height):
        scale = min(flat.width / width, flat.height / height)
        across, down = round(width * scale), round(height * scale)
        left, top = (flat.width - across) // 2, (flat.height - down) // 2
        flat = flat.crop((left, top, left + across, top + down)).resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(flat)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def in_parallel(work: Callable[[str], T], paths: Sequence[str], title: str) -> Iterator[T]:
    """What `work` makes of each image, in their order.  Raises UserError, at the end, for all images that it fails on."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    failed: list[str] = []

    def attempt(path: str) -> T | str:
        try:
            return work(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
            return f"{path}: {' '.join(str(error).split())}"

    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(paths), desc=title, unit="image", leave=False) as bar:
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
            f"{len(failed)} of {len(paths)} images in data.path cannot be read; delete or mend them:"
            + "".join(f"\n  {line}" for line in shown)
        )


def _images(folder: Path) -> Iterator[tuple[str | None, str]]:
    """Sub-folder (None: the folder itself) and path of all images that are not hidden, links followed, in the order of their paths."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        top = next(iter(Path(root).relative_to(folder).parts), None)
        yield from ((top, f"{root}/{name}") for name in sorted(files) if not name.startswith(".") and name.lower().endswith(SUFFIXES))


def _head(path: str) -> tuple[bool, tuple[int, int]]:
    """Whether the file is grey, and its width and height as it is to be looked at."""
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
        return image.mode in GREY or image.mode.startswith("I"), (height, width) if turned else (width, height)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey as 8: Pillow would cut off what is above 255."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows the range; convert it to 8 or 16 bits")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Without transparency."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
