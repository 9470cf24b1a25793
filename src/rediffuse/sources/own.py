"""Images of your own -> train, validation and test as uint8 arrays.

`data.path` is a folder, an archive of one (zip, tar), arrays (.npy, .npz), or parquet files as Hugging Face
writes them.  Decoding is parallel and takes constant memory.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rediffuse.images.image_set import SPLITS, ImageAppender, Split
from rediffuse.params import Data
from rediffuse.runtime.errors import UserError
from rediffuse.sources.archives import is_archive, unpack
from rediffuse.sources.arrays import find_arrays, is_arrays
from rediffuse.sources.decode import decode
from rediffuse.sources.folder import find_images
from rediffuse.sources.found import Found
from rediffuse.sources.parquet import find_parquet, is_parquet
from rediffuse.sources.reading import read_all
from rediffuse.sources.splits import place_of, split_at
from rediffuse.sources.survey import Survey, survey

# Images of each split: the memorisation looks for two neighbours, and a neighbour of these.
LEAST: dict[Split, int] = {"train": 3, "validation": 1, "test": 1}
FEW = 1000  # below this many images a model memorises its training set
FEW_OF_CLASS = 20  # below this many training images a class is hardly learned
MANY = 100_000  # above this many images, validation and test cost more than they tell
SHOWN = 5  # classes named in a warning
DARK = 2**13  # above this value, of 16 bits, images are not of 12 bits


@contextmanager
def find_own(data: Data, scratch: Path) -> Iterator[Found]:
    """Find the images at `data.path`, whatever it is.  scratch: a folder for what an archive holds."""
    path = Path(data.path)
    if is_arrays(path):
        yield find_arrays(path)
    elif is_parquet(path):
        yield find_parquet(path)
    elif is_archive(path):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            notes, inside = unpack(path, scratch), scratch
            while inside.is_dir() and len(entries := list(inside.iterdir())) == 1:
                [inside] = entries  # a folder around all of it, or a file of arrays
            inside = inside if is_arrays(inside) else scratch
            with find_own(data.model_copy(update={"path": str(inside)}), scratch / "-") as found:
                yield replace(found, notes=[*notes, *found.notes])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    else:
        yield find_images(path, split_folders=data.split_folders)


@dataclass
class Tally:
    """What was counted while images were decoded: by split, by class and split, and how many are equal."""

    splits: Counter[Split] = field(default_factory=Counter)
    classes: Counter[tuple[int, Split]] = field(default_factory=Counter)
    seen: dict[int, tuple[Split, int | None]] = field(default_factory=dict)  # by content, the first
    shared: int = 0  # images that are equal to the first of another split
    contrary: int = 0  # images that are equal to the first of another class

    def add(self, place: int, split: Split, label: int | None) -> None:
        self.splits[split] += 1
        if label is not None:
            self.classes[label, split] += 1
        first = self.seen.setdefault(place, (split, label))
        self.shared += first[0] != split
        self.contrary += first[1] != label

    @property
    def total(self) -> int:
        return self.splits.total()

    @property
    def equal(self) -> int:
        """How many images are equal to another that was counted before."""
        return self.total - len(self.seen)


def divide(
    found: Found, looked: Survey, data: Data, problems: Path
) -> Iterator[tuple[NDArray[np.uint8], Split, int | None, int]]:
    """Decode all images: yield pixels, split, label, and a number by the content of each.

    An image keeps the split in which it was handed out; a split in which none was handed out takes its share
    of the others.  Raises UserError at the end for all that cannot be read; problems: where many are named.
    """
    handed = set(found.splits or ())
    shares = {
        name: 0.0 if name in handed else share
        for name, share in (("validation", data.validation_share), ("test", data.test_share))
    }
    decoded = partial(decode, shape=looked.shape, fit=data.fit, ground=looked.ground)
    for index, pixels in read_all(found.images, decoded, "decoding", problems):
        place = place_of(pixels, data.split_seed)
        given: Split = found.splits[index] if found.splits else "train"
        split = split_at(place, **shares) if given == "train" else given
        yield pixels, split, found.labels[index] if found.labels else None, place


def write_own(data: Data, target: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Write the splits of the images at `data.path` below `target`; return the classes and a description.

    Prints what was found.  Raises UserError if there are no images, for images that cannot be decoded, and
    for a split with too few.
    """
    with find_own(data, target.with_name(".unpacked")) as found:
        looked = survey(found, data)
        say([*found.notes, *describe_found(found), *describe_survey(looked, data)])
        tally = Tally()
        with ExitStack() as stack:
            labels = found.labels is not None
            files = {
                name: stack.enter_context(ImageAppender(target / name, looked.shape, labels=labels))
                for name in SPLITS
            }
            for pixels, split, label, place in divide(
                found, looked, data, target.with_name("unreadable.txt")
            ):
                files[split].append(pixels, label)
                tally.add(place, split, label)
        check_counts(tally)
        say(describe_tally(tally, found.classes, looked, data))
    channels, height, width = looked.shape
    fitted = {
        "crop": "largest part of this shape around the centre, Lanczos",
        "pad": f"whole, with {looked.ground} around it, Lanczos",
        "stretch": "stretched, Lanczos",
    }
    about = {
        "set": "folder",
        "description": f"{tally.total:,} images of a folder, {'grey' if channels == 1 else 'colour'},"
        f" {width}x{height}",
        "source": None,
        "citation": None,
        "licence": None,
        "resize": "none" if data.size == 0 else fitted[data.fit],
        "background": looked.ground,
    }
    return found.classes, about


def say(lines: Iterable[str]) -> None:
    """Print lines, warnings to stderr."""
    for line in lines:
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)


def check_counts(tally: Tally) -> None:
    """Raise UserError for a split with too few images."""
    if all(tally.splits[name] >= least for name, least in LEAST.items()):
        return
    found = ", ".join(f"{tally.splits[name]} in {name}" for name in LEAST)
    least = ", ".join(f"{least} in {name}" for name, least in LEAST.items())
    differ = f", of which {len(tally.seen)} differ," if tally.equal else ""
    raise UserError(
        f"the {tally.total} images in data.path{differ} fall to the splits by their content: {found}; there"
        f" must be at least {least}: set another data.split_seed, raise data.validation_share or"
        " data.test_share, or take more images that differ (params.yaml)"
    )


def describe_found(found: Found) -> list[str]:
    """Return the splits in which images were handed out, as a line, and how many are in each."""
    handed = Counter(found.splits or ())
    counts = ", ".join(f"{n:,} images in {split}" for split, n in handed.items())
    return [f"handed out in splits: {counts}"] if handed else []


def describe_survey(looked: Survey, data: Data) -> list[str]:
    """Return what the images are, and what becomes of them, a line each."""
    channels, height, width = looked.shape
    (narrow, low), (wide, high) = min(looked.sizes, default=(0, 0)), max(looked.sizes, default=(0, 0))
    sizes = f"{narrow}x{low}" if len(looked.sizes) == 1 else f"{narrow}x{low} to {wide}x{high}"
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in looked.kinds.most_common(8))
    lines = [
        f"{looked.kinds.total():,} images, {sizes} pixels: {kinds}",
        f"they become {'grey' if channels == 1 else 'colour'}, {width}x{height} pixels"
        + ("" if set(looked.sizes) == {(width, height)} else f" ({data.fit})"),
    ]
    if looked.transparent:
        lines.append(f"{looked.transparent:,} are partly transparent: laid on {looked.ground}")
    if looked.animated:
        lines.append(f"{looked.animated:,} have more than one frame or page: the first is taken")
    if 0 < looked.brightest < DARK:
        lines.append(
            f"warning: images of 16 bits have no value above {looked.brightest:,} of 65,535, and will be"
            " dark: scale them, perhaps from 12 bits"
        )
    if not looked.grey[None] and looked.grey[True] > looked.grey[False] > 0:
        lines.append(
            f"{looked.grey[True]:,} have no colour, {looked.grey[False]:,} have one: data.channels 1 makes"
            " all grey"
        )
    return lines


def describe_tally(tally: Tally, classes: Sequence[str], looked: Survey, data: Data) -> list[str]:
    """Return how many images fall to each split, and warnings of what is too few, too many, or equal."""
    n, splits = tally.total, tally.splits
    lines = [", ".join(f"{splits[name]:,} in {name}" for name in LEAST)]
    if tally.equal:
        other = "white" if looked.ground == "black" else "black"
        because = f", some perhaps only on {looked.ground}: try data.background {other}"
        lines.append(
            f"warning: {tally.equal:,} of {n:,} images are equal to another, {len(tally.seen):,} differ"
            + (because if looked.transparent else "")
        )
    if tally.shared:
        lines.append(
            f"warning: {tally.shared:,} images were handed out in more than one split: what is measured on"
            " test looks better than it is"
        )
    if tally.contrary:
        lines.append(f"warning: {tally.contrary:,} images are equal to one of another class")
    alike = Counter(unicodedata.normalize("NFKC", name).casefold().strip() for name in classes)
    if twins := [name for name, n in alike.items() if n > 1]:
        lines.append(f"warning: more than one class looks like {', '.join(map(repr, twins[:SHOWN]))}")
    small = [
        f"{name} ({tally.classes[label, 'train']:,} in train, {tally.classes[label, 'test']:,} in test)"
        for label, name in enumerate(classes)
        if tally.classes[label, "train"] < FEW_OF_CLASS
    ]
    if small:
        named = ", ".join([*small[:SHOWN], *(["..."] if len(small) > SHOWN else [])])
        lines.append(
            f"warning: {len(small)} of {len(classes)} classes have fewer than {FEW_OF_CLASS} training images,"
            f" too few to draw by label or to judge: {named}"
        )
    lines += [
        f"warning: {splits[name]:,} images are more than the split {name} needs: lower data.{name}_share, for"
        f" example to {10_000 / n:.1g}"
        for name in ("validation", "test")
        if splits[name] > MANY
    ]
    if n < FEW:
        lines.append(
            f"warning: {n} images are few: a model memorises them; see the memorisation in its evaluation"
        )
    return lines
