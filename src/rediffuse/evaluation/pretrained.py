"""What the instruments trained on ImageNet share.

Their weights are other people's files.  The SHA-256 is pinned in the module of the instrument and compared before anything is unpickled.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from rediffuse.evaluation.instrument_record import Record
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

BATCH = 16  # images in one pass: what fits a processor's cache is measured faster, and takes less memory
OTHERS = "take another instrument: classifier, random-conv-v1 or pixel-pca-v1 (reference.instruments in params.yaml)"


def check_channels(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images have 1 or 3 channels."""
    if images.shape[0] not in (1, 3):
        raise UserError(
            f"reference.instruments names {name}, which measures images of 1 or 3 channels, and the images of data.set are"
            f" {list(images.shape)}: use other images (params.yaml)"
        )


def check_pinned(record: Record, sha256: str, folder: Path) -> None:
    """Raise UserError if the record in the folder names other weights than those pinned now."""
    if record["sha256"] != sha256:
        raise UserError(f"{folder} was made with other weights of {record['id']} than rediffuse uses now: run `dvc repro reference`")


def verify(data: bytes, expected: str, title: str, remedy: str) -> bytes:
    """Return the bytes.  Raises UserError unless their SHA-256 is the expected one: a pickle can run any program."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(f"{title} is not the original file: its SHA-256 must be\n  {expected}, found\n  {found}\n{remedy}")
    return data


def to_rgb(images: Tensor) -> Tensor:
    """Repeat grey images (B, 1, H, W) to three channels; leave colour images as they are."""
    return images.expand(-1, 3, -1, -1)
