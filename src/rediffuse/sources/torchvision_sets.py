"""MNIST (LeCun et al. 1998) and CIFAR-10 (Krizhevsky 2009) by torchvision's data sets, which know the mirrors, formats and checksums.

Files are looked for in data/raw of the checkout, where a download is kept too.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import zlib
from pathlib import Path

import numpy as np

from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file

MNIST = {
    "set": "mnist",
    "description": "70,000 greyscale pictures of handwritten digits, 28x28, in 10 classes",
    "source": "http://yann.lecun.com/exdb/mnist",
    "citation": "LeCun, Bottou, Bengio and Haffner 1998, Gradient-Based Learning Applied to Document Recognition",
    "licence": "CC BY-SA 3.0",
}
CIFAR10 = {
    "set": "cifar10",
    "description": "60,000 colour photographs, 32x32, in 10 classes",
    "source": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "citation": "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
    "licence": None,  # none was ever stated
}
DIGITS = tuple("0123456789")
CONTENT = {  # SHA-256 of MNIST's files, decompressed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def load_mnist() -> dict[str, ImageSet]:
    """`train` (60,000 images) and `test` (10,000) as published: uint8 (N, 1, 28, 28), labels 0..9.

    Looked for in data/raw/MNIST/raw, compressed or not, and at torchvision's mirrors.  The content is verified, so that files from
    elsewhere do, compressed anew as they may be.  Raises UserError if they cannot be had, or are not the published ones.
    """
    from torchvision import datasets  # torch takes seconds to import, and most runs are of other sets

    root = _raw()
    folder, names = root / "MNIST/raw", [name for name, _ in datasets.MNIST.resources]
    for name in names:
        _unpack(folder / name)  # torchvision takes what is unpacked for right
    splits = {}
    for split in ("train", "test"):
        try:
            found = datasets.MNIST(str(root), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise _not_found("MNIST", f"{', '.join(names)} into {folder}", error) from None
        splits[split] = ImageSet(found.data.numpy()[:, None], found.targets.numpy().astype(np.int64), DIGITS)
    return splits


def load_cifar10() -> dict[str, ImageSet]:
    """`train` (50,000 images) and `test` (10,000) as published: uint8 (N, 3, 32, 32), labels 0..9.

    Raises UserError if the files are neither in data/raw/cifar-10-batches-py nor to be downloaded, or are not the published ones.
    """
    from torchvision import datasets

    root = _raw()
    splits = {}
    for split in ("train", "test"):
        try:
            found = datasets.CIFAR10(str(root), train=split == "train", download=True)  # verifies every file, also one placed by hand
        except (OSError, RuntimeError) as error:
            raise _not_found("CIFAR-10", f"{datasets.CIFAR10.filename} into {root}", error) from None
        images = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
        splits[split] = ImageSet(images, np.array(found.targets, np.int64), tuple(found.classes))
    return splits


def _unpack(archive: Path) -> None:
    """Have the file uncompressed beside its archive, if either is there.  Raises UserError for one that is not the published one."""
    plain = archive.with_suffix("")
    for path, content in ((plain, Path.read_bytes), (archive, lambda path: gzip.decompress(path.read_bytes()))):
        if not path.exists():
            continue
        try:
            found = content(path)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and run again") from None
        if (seen := hashlib.sha256(found).hexdigest()) != CONTENT[plain.name]:
            raise UserError(
                f"{path} is not the published file: the SHA-256 of its content is {seen[:12]}... and should be"
                f" {CONTENT[plain.name][:12]}...; delete it, and run again"
            )
        if path == archive and not plain.exists():
            replace_file(plain, found)


def _raw() -> Path:
    """data/raw of the checkout, which DVC names in DVC_ROOT: a stage may run in a temporary workspace."""
    return Path(os.environ.get("DVC_ROOT", "."), "data/raw").resolve()


def _not_found(title: str, place: str, error: Exception) -> UserError:
    print(f"{title}: {error}", file=sys.stderr)
    reason = " ".join(str(error).split())
    return UserError(f"{title} could not be downloaded ({reason}); place its files by hand: {place}, as they were published")
