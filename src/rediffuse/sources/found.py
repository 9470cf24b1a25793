"""Images as they were found, not yet read: what every way in (a folder, arrays, a parquet file) gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from rediffuse.images.image_set import Split


class Images(Protocol):
    """Images that can be opened by their number, from several threads at once."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return how an error calls the image: its path, or where in which file it is."""
        ...

    def open(self, index: int) -> Image.Image:
        """Return the image, as Pillow opens it.  Raises what Pillow raises for what is no image."""
        ...


@dataclass(frozen=True)
class Found:
    """Images in a fixed order.

    labels: an index into `classes` for each image, or None.  splits: the split in which each was handed out,
    or None where none was; a split in which none was handed out gets its share of `train`, by content.
    notes: what a user should know of how they were found, a line each.
    """

    images: Images
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    splits: Sequence[Split] | None = None
    notes: list[str] = field(default_factory=list)
