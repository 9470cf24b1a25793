"""Read many images in parallel, and name all that cannot be read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file
from rediffuse.sources.found import Images

AHEAD = 64  # images per thread that are read before they are needed
SHOWN = 20  # unreadable images named on the screen; more are named in a file

T = TypeVar("T")


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, and why."""

    name: str
    reason: str


def read_all(
    images: Images, work: Callable[[Image.Image], T], title: str, problems: Path, place: str = "data.path"
) -> Iterator[tuple[int, T]]:
    """Yield number and work(image) of each image that can be read, in order.

    Raises UserError at the end for all that cannot: each is named there, or in the file `problems`.  place:
    what the error calls the whole.
    """
    unreadable = list[Unreadable]()
    for index, result in enumerate(in_parallel(images, work, title)):
        if isinstance(result, Unreadable):
            unreadable.append(result)
        else:
            yield index, result
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(images)} images in {place} cannot be read; delete or repair them:"
            + "".join(f"\n  {line}" for line in _by_reason(unreadable, problems))
        )


def in_parallel(images: Images, work: Callable[[Image.Image], T], title: str) -> Iterator[T | Unreadable]:
    """Yield work(image) of each image, in order, or `Unreadable` in its place."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def attempt(index: int) -> T | Unreadable:
        try:
            with images.open(index) as image:
                return work(image)
        except Exception as error:  # Pillow has no base class of what it raises for a damaged file
            return Unreadable(images.name(index), _reason(error))

    n = len(images)
    bar = tqdm(total=n, desc=title, unit="image", leave=False)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool, bar:
        # Of large images and of damaged metadata; what cannot be read is named.
        warnings.simplefilter("ignore")
        for start in range(0, n, AHEAD * threads):
            for result in pool.map(attempt, range(start, min(n, start + AHEAD * threads))):
                bar.update()
                yield result


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image, or of a kind that Pillow does not read"
    if isinstance(error, FileNotFoundError):
        return "a link that leads nowhere"
    if isinstance(error, PermissionError):
        return "may not be read"
    if "truncated" in str(error).lower() or "broken data stream" in str(error):
        return "cut off"
    if "cannot load this image" in str(error):
        return "holds no pixels"
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _by_reason(unreadable: list[Unreadable], problems: Path) -> list[str]:
    """Return lines that name the images by reason; if they are many, one of each, and all in the file."""
    reasons: dict[str, list[str]] = {}
    for each in unreadable:
        reasons.setdefault(each.reason, []).append(each.name)
    lines = [f"{reason}: {name}" for reason, names in reasons.items() for name in names]
    if len(lines) <= SHOWN:
        return lines
    replace_file(problems, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))
    shown = [f"{reason}: {len(names)}, among them {names[0]}" for reason, names in reasons.items()]
    return [*shown, f"all are named in {problems}"]
