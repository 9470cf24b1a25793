"""The published sets by name; MNIST and CIFAR-10, downloaded by torchvision into data/raw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import dvc_root
from rediffuse.sources import fashion_mnist
from rediffuse.sources.idx import missing_files, read_splits

MNIST = {
    "set": "mnist",
    "description": "70,000 greyscale pictures of handwritten digits, 28x28, in 10 classes",
    "source": "http://yann.lecun.com/exdb/mnist",
    "citation": "LeCun, Bottou, Bengio and Haffner 1998, Gradient-Based Learning Applied to Document"
    " Recognition",
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
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def load_mnist() -> dict[str, ImageSet]:
    """Return `train` (60,000 images) and `test` (10,000) as published: uint8 (N, 1, 28, 28), labels 0..9.

    Looked for in data/raw/MNIST/raw, then at torchvision's mirrors.  Raises UserError if no source has the
    set, or a file is not the published one.
    """
    root = dvc_root() / "data/raw"
    folder = root / "MNIST/raw"
    if missing_files(folder, MNIST_FILES):
        from torchvision import datasets  # here: importing torch takes seconds

        try:
            datasets.MNIST(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise _not_found("MNIST", f"{', '.join(MNIST_FILES)} into {folder}", error) from None
    return read_splits(folder, MNIST_FILES, DIGITS)


def load_cifar10() -> dict[str, ImageSet]:
    """Return `train` (50,000 images) and `test` (10,000) as published: uint8 (N, 3, 32, 32), labels 0..9.

    Looked for in data/raw, then at torchvision's mirror.  Raises UserError if no source has the set.
    """
    from torchvision import datasets

    root = dvc_root() / "data/raw"
    splits = {}
    for split in ("train", "test"):
        try:  # torchvision verifies every file, also one placed by hand
            found = datasets.CIFAR10(str(root), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise _not_found("CIFAR-10", f"{datasets.CIFAR10.filename} into {root}", error) from None
        images = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
        splits[split] = ImageSet(images, np.array(found.targets, np.int64), tuple(found.classes))
    return splits


def _not_found(title: str, place: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{title} could not be downloaded ({reason}); place its files by hand: {place}")


SETS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, ImageSet]]]] = {
    "fashion-mnist": (fashion_mnist.ABOUT, fashion_mnist.load_fashion_mnist),
    "mnist": (MNIST, load_mnist),
    "cifar10": (CIFAR10, load_cifar10),
}


def load_published(name: str) -> tuple[dict[str, ImageSet], dict[str, Any]]:
    """Return `train` and `test`, and the description.  Raises UserError if the set cannot be had."""
    about, load = SETS[name]
    return load(), about
