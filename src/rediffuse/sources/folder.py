"""Find the images of a folder, their classes and their splits.

Images in sub-folders: each sub-folder is a class, with all images below it.  Images in the folder itself: no
classes.  Sub-folders named train, test, validation and the like are splits, with the classes inside.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from rediffuse.images.image_set import Split
from rediffuse.runtime.errors import UserError
from rediffuse.sources.found import Found

# What Pillow reads without another program: PostScript, for example, would be run by Ghostscript.
FORMATS = (
    *("PNG", "JPEG", "JPEG2000", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "DIB", "PPM", "TGA", "QOI"),
    *("PCX", "SGI", "ICO", "PSD"),
)
SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What other programs leave in folders, besides hidden files.
JUNK = (
    *("thumbs.db", "desktop.ini", "__macosx", "@eadir", "@__thumb", "#recycle", "$recycle.bin"),
    *("lost+found", "system volume information"),
)
# Where other tools keep labels, which are not read.
LABELS = "metadata.csv", "metadata.jsonl", "metadata.parquet", "labels.csv", "dataset.json"
# Images all the same, which another program can convert.
CONVERT = ".heic", ".heif", ".svg", ".cr2", ".nef", ".arw", ".dng", ".jxl", ".eps", ".pdf"
SHOWN = 5  # kinds of files, or links, that a note names

# The parts of a path below the folder, without its name, and the path.
Place = tuple[tuple[str, ...], str]


class ImageFiles:
    """Files as `Images`.  The paths are text: 10 million take 1 GB, as Path objects 4 GB."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> Image.Image:
        return open_image(self.paths[index])


def open_image(path: str | Path) -> Image.Image:
    """Return the image as Pillow opens it.  Its content decides of which kind it is, not its name."""
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        with Path(path).open("rb") as file:
            head = file.read(30)
        if not head:
            raise ValueError("empty") from None
        if head.startswith(b"version https://git-lfs"):
            raise ValueError("a pointer of Git LFS: run `git lfs pull`") from None
        raise


def find_images(folder: Path, *, split_folders: bool = True) -> Found:
    """Find the images of a folder and its sub-folders, in the order of their names.

    split_folders: whether sub-folders named train, test, ... (`SPLIT_NAMES`) are splits, or classes.  A
    sub-folder that holds all images, as archives have it, is entered.  Hidden files are skipped, other kinds
    of files noted.  Raises UserError if there are no images, and where classes or splits cannot be told.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.path ({folder}) must be a folder of images, an archive of one (zip, tar), .npz, .npy or"
            " .parquet; there is none (params.yaml)"
        )
    walk = _Walk(folder)
    places = list(walk)
    notes = walk.notes()
    if not places:
        raise UserError(
            f"data.path ({folder}) holds no images: Pillow reads no file in it{_among(walk.others)}.  (In the"
            " temporary workspace of a queued experiment there is only what git or DVC tracks: `dvc add`"
            " the folder, or give its absolute path.)"
        )
    places, inside = _enter(places, split_folders=split_folders)
    if inside:
        notes.append(f"all images lie in the sub-folder {_printable(inside)}: it is the set, and no class")
    splits = _splits_of(places, folder) if split_folders else None
    if splits is not None:
        places = [(parts[1:], path) for parts, path in places]
    labels, classes = _labels(places, splits, folder)
    return Found(ImageFiles([path for _, path in places]), labels, classes, splits, notes)


class _Walk:
    """The places of all images below a folder.  Counts what it passes over."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.others, self.links = folder, Counter[str](), list[str]()
        self.empty, self.labels = list[str](), list[str]()

    def __iter__(self) -> Iterator[Place]:
        Image.init()
        known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
        for root, folders, files in self._folders():
            parts = Path(root).relative_to(self.folder).parts
            found = False
            for name in files:
                suffix, path = Path(name).suffix.lower(), f"{root}/{name}"
                if suffix in known or (not suffix and _is_image(path)):
                    found = True
                    yield parts, path
                elif name.lower() in LABELS:
                    self.labels.append(path)
                else:
                    self.others[suffix or "without a suffix"] += 1
            if not found and not folders:
                self.empty.append(root)

    def _folders(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield each folder, its sub-folders and files.  Links are followed; no folder is visited twice."""

        def refuse(error: OSError) -> None:
            raise UserError(f"data.path: {error.filename} cannot be read ({error.strerror}): permit it")

        top, seen = os.path.realpath(self.folder), set[tuple[int, int]]()
        for root, folders, files in os.walk(self.folder, onerror=refuse, followlinks=True):
            status = Path(root).stat()
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [name for name in _visible(folders) if self._is_new(f"{root}/{name}", top, seen)]
            yield root, folders, _visible(files)

    def _is_new(self, path: str, top: str, seen: set[tuple[int, int]]) -> bool:
        if not Path(path).is_symlink():
            return True
        target, status = os.path.realpath(path), Path(path).stat()
        # What a link to a folder inside this one leads to is found there, where it lies.
        if f"{target}/".startswith(f"{top}/") or f"{top}/".startswith(f"{target}/"):
            self.links.append(f"{path} leads back into {top}")
            return False
        if (status.st_dev, status.st_ino) in seen:
            self.links.append(f"{path} leads to {target} once more")
            return False
        seen.add((status.st_dev, status.st_ino))
        return True

    def notes(self) -> list[str]:
        """Return what was passed over, a line for each reason."""
        notes = []
        if self.links:
            notes.append(f"warning: links that are not followed: {_first(self.links)}")
        if self.empty:
            notes.append(f"warning: sub-folders without images: {_first(self.empty)}")
        if self.labels:
            notes.append(
                f"warning: labels are not read from {_first(self.labels)}: put the images of each class into"
                " a sub-folder"
            )
        if self.others:
            wanted = [suffix for suffix in self.others if suffix in CONVERT]
            remedy = f"; convert {' and '.join(sorted(wanted))} to PNG or JPEG to have them" if wanted else ""
            notes.append(f"warning: passed over, as Pillow does not read them{_among(self.others)}{remedy}")
        return notes


def _first(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return _printable("; ".join([*lines[:SHOWN], *more]))


def _printable(name: str) -> str:
    """Return a name that is not UTF-8 with question marks, as it can be printed."""
    return name.encode(errors="replace").decode()


def _among(others: Counter[str]) -> str:
    if not others:
        return ""
    kinds = [f"{n:,} {suffix}" for suffix, n in sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))]
    return ": " + ", ".join([*kinds[:SHOWN], *(["..."] if len(kinds) > SHOWN else [])])


def _visible(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith(".") and name.lower() not in JUNK)


def _is_image(path: str) -> bool:
    try:
        with open_image(path):
            return True
    except Exception:  # whatever Pillow raises for a foreign file
        return False


def _enter(places: list[Place], *, split_folders: bool) -> tuple[list[Place], str]:
    """Enter a sub-folder that holds all images, unless its name is that of a split.  Return its name too."""
    entered = list[str]()
    while True:
        [first, *more] = {parts[:1] for parts, _ in places}
        if more or not first or (split_folders and first[0].lower() in SPLIT_NAMES):
            return places, "/".join(entered)
        entered += first
        places = [(parts[1:], path) for parts, path in places]


def _splits_of(places: Sequence[Place], folder: Path) -> list[Split] | None:
    """Return the split of each image by its first sub-folder; None if no sub-folder is named like one."""
    tops = {parts[0] if parts else None for parts, _ in places}
    named = sorted(top for top in tops if top and top.lower() in SPLIT_NAMES)
    others = sorted(top for top in tops if top and top.lower() not in SPLIT_NAMES)
    if not named or None in tops:  # images beside sub-folders: `_labels` refuses them
        return None
    if others:
        raise UserError(
            f"data.path ({folder}) holds {', '.join(named)}, the name of a split, beside"
            f" {', '.join(others[:SHOWN])}: if all are classes, set data.split_folders to false"
            " (params.yaml), else put all images into splits"
        )
    splits = [SPLIT_NAMES[parts[0].lower()] for parts, _ in places]
    if "train" not in splits:
        raise UserError(
            f"data.path ({folder}) holds only {', '.join(named)}, and nothing to train on: add a sub-folder"
            " train, or set data.split_folders to false, which makes them classes (params.yaml)"
        )
    return splits


def _labels(
    places: Sequence[Place], splits: Sequence[Split] | None, folder: Path
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Return the label of each image, by its first sub-folder, and the classes.  None without sub-folders."""
    tops = [parts[0] if parts else None for parts, _ in places]
    loose = tops.count(None)
    if loose == len(tops):
        return None, ()
    if loose:
        handed: Sequence[Split | None] = splits or [None] * len(tops)
        where = {split for split, top in zip(handed, tops, strict=True) if split and top is None}
        inside = f" (in {', '.join(sorted(where))})" if where else ""
        raise UserError(
            f"data.path ({folder}) holds {loose} images{inside} beside sub-folders with"
            f" {len(tops) - loose} more: put all of them into sub-folders, one for each class, or none; or"
            " remove those whose class is unknown"
        )
    classes = tuple(sorted({top for top in tops if top is not None}))
    for name in classes:
        if name != _printable(name):
            raise UserError(f"the sub-folder {name!r} of data.path must have a name in UTF-8: rename it")
    index = {name: label for label, name in enumerate(classes)}
    return [index[top] for top in tops if top is not None], classes
