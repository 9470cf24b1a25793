"""The format of MNIST and Fashion-MNIST: four IDX files, gzip-compressed or not.

The decompressed content is verified, not the archive: Debian's package, for example, compresses it anew.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

Hashes = Mapping[str, str]  # name of each file, with .gz -> SHA-256 of its decompressed content


def missing_files(folder: Path, hashes: Hashes) -> list[str]:
    """Return the names of the files that the folder lacks."""
    return [name for name in hashes if not _find(folder / name).is_file()]


def read_splits(folder: Path, hashes: Hashes, classes: Sequence[str]) -> dict[str, ImageSet]:
    """Return `train` and `test`.  Raises UserError if the content of a file is not the published one."""
    content = {name: _verified(_find(folder / name), sha256) for name, sha256 in hashes.items()}
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _parse(content[f"{prefix}-images-idx3-ubyte.gz"])
        labels = _parse(content[f"{prefix}-labels-idx1-ubyte.gz"])
        splits[split] = ImageSet(images[:, None], labels.astype(np.int64), tuple(classes))
    return splits


def _find(archive: Path) -> Path:
    """Return the path of the archive, or of its unpacked content if only that exists."""
    plain = archive.with_suffix("")
    return plain if plain.is_file() and not archive.is_file() else archive


def _verified(path: Path, expected: str) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found = f"nothing that can be decompressed ({error})"
    else:
        found = hashlib.sha256(content).hexdigest()
        if found == expected:
            return content
    raise UserError(
        f"{path} is not the published file: the SHA-256 of its decompressed content must be\n  {expected}"
        f", found\n  {found}\nDelete it, or replace it by the published one, and run again."
    )


def _parse(content: bytes) -> NDArray[np.uint8]:
    """Return the array of an IDX file: magic 0, 0, 8, number of dimensions; big-endian dimensions; bytes."""
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
