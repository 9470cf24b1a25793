"""The published sets by name.  torchvision downloads them into data/raw, whose layout is torchvision's.

A set is here if its images are all of one size that `params.SIDES` allows, and its publishers divided it into
train and test.  Others are for `data.set: folder`: CelebA (178x218, Google Drive, no classes), EuroSAT and
Semeion (not divided), and Food-101, Flowers-102, GTSRB and most others (images of many sizes).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
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
DIGITS = tuple("0123456789")
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass(frozen=True)
class Source:
    """A set of torchvision.

    dataset: the class in torchvision.datasets.  licence: None if the publishers state none.
    by_name: whether the class takes the split by its name, instead of the flag `train`.
    classes: their names, where those of torchvision are missing or others.
    transposed: whether the images are stored with rows and columns exchanged.
    checked: whether torchvision compares every file that it reads with an MD5, not only what it downloads.
    """

    dataset: str
    description: str
    source: str
    citation: str
    licence: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    by_name: bool = False
    classes: tuple[str, ...] = ()
    transposed: bool = False
    checked: bool = False


_emnist = partial(
    Source,
    "EMNIST",
    source="https://www.nist.gov/itl/products-and-services/emnist-dataset",
    citation="Cohen, Afshar, Tapson and van Schaik 2017, EMNIST: an Extension of MNIST to Handwritten"
    " Letters, arXiv:1702.05373",
    transposed=True,
)
_cifar = partial(
    Source,
    source="https://www.cs.toronto.edu/~kriz/cifar.html",
    citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
    checked=True,
)
TORCHVISION = {
    "kmnist": Source(
        "KMNIST",
        "70,000 greyscale pictures of handwritten Japanese characters (Kuzushiji), 28x28, in 10 classes",
        source="https://github.com/rois-codh/kmnist",
        citation="Clanuwat, Bober-Irizar, Kitamoto, Lamb, Yamamoto and Ha 2018, Deep Learning for Classical"
        " Japanese Literature, arXiv:1812.01718",
        licence="CC BY-SA 4.0",
    ),
    "qmnist": Source(
        "QMNIST",
        "120,000 greyscale pictures of handwritten digits, 28x28, in 10 classes: MNIST with six times the"
        " test images",
        source="https://github.com/facebookresearch/qmnist",
        citation="Yadav and Bottou 2019, Cold Case: The Lost MNIST Digits, arXiv:1905.10498",
        licence="BSD 3-Clause",
        classes=DIGITS,
    ),
    "emnist-digits": _emnist(
        "280,000 greyscale pictures of handwritten digits, 28x28, in 10 classes", options={"split": "digits"}
    ),
    "emnist-letters": _emnist(
        "145,600 greyscale pictures of handwritten letters, small or capital, 28x28, in 26 classes",
        options={"split": "letters"},
    ),
    "emnist-balanced": _emnist(
        "131,600 greyscale pictures of handwritten digits and letters, 28x28, in 47 classes",
        options={"split": "balanced"},
    ),
    "usps": Source(
        "USPS",
        "9,298 greyscale pictures of handwritten digits, 16x16, in 10 classes",
        source="https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass.html",
        citation="Hull 1994, A Database for Handwritten Text Recognition Research",
        classes=DIGITS,
    ),
    "cifar10": _cifar("CIFAR10", "60,000 colour photographs, 32x32, in 10 classes"),
    "cifar100": _cifar("CIFAR100", "60,000 colour photographs, 32x32, in 100 classes"),
    "svhn": Source(
        "SVHN",
        "99,289 colour photographs of digits of house numbers, 32x32, in 10 classes",
        source="http://ufldl.stanford.edu/housenumbers",
        citation="Netzer, Wang, Coates, Bissacco, Wu and Ng 2011, Reading Digits in Natural Images with"
        " Unsupervised Feature Learning",
        licence="for non-commercial use only",
        by_name=True,
        classes=DIGITS,
        checked=True,
    ),
    "stl10": Source(
        "STL10",
        "13,000 colour photographs, 96x96, in 10 classes; without the 100,000 that have no label",
        source="https://cs.stanford.edu/~acoates/stl10",
        citation="Coates, Lee and Ng 2011, An Analysis of Single-Layer Networks in Unsupervised Feature"
        " Learning",
        by_name=True,
        # Not from class_names.txt, the only file of the set that torchvision does not check.
        classes=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        checked=True,
    ),
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
            raise _not_found("MNIST", MNIST_FILES, folder, error) from None
    return read_splits(folder, MNIST_FILES, DIGITS)


def load_from_torchvision(name: str) -> dict[str, ImageSet]:
    """Return `train` and `test` of a set of `TORCHVISION` as published: uint8 (N, C, H, W), labels from 0.

    Looked for in data/raw, then where torchvision downloads from.  Only files with the MD5 that torchvision
    knows are read.  Raises UserError if no source has the set.
    """
    from torchvision import datasets

    source = TORCHVISION[name]
    dataset = getattr(datasets, source.dataset)
    raw = dvc_root() / "data/raw"
    archives = _archives(dataset)
    found = {}
    try:
        with nullcontext(raw) if source.checked else _unpacking(raw, archives) as root:
            for split in ("train", "test"):
                chosen = {"split": split} if source.by_name else {"train": split == "train"}
                found[split] = dataset(str(root), download=True, **source.options, **chosen)
    except (OSError, RuntimeError, HTTPException) as error:
        note = f", as they are published (see {source.source}){_altered(archives, raw)}"
        raise _not_found(name, archives, raw, error, note) from None
    return {split: _image_set(each, source) for split, each in found.items()}


def _archives(dataset: Any) -> dict[str, str]:
    """Return the MD5 of every archive of a class of torchvision, by its path in data/raw."""
    if hasattr(dataset, "split_list"):  # SVHN, USPS
        return {name: md5 for _, name, md5 in map(dataset.split_list.get, ("train", "test"))}
    if hasattr(dataset, "tgz_md5"):  # CIFAR, STL-10
        return {dataset.filename: dataset.tgz_md5}
    if hasattr(dataset, "md5"):  # EMNIST
        resources = [(dataset.url, dataset.md5)]
    elif isinstance(dataset.resources, dict):  # QMNIST
        resources = dataset.resources["train"] + dataset.resources["test"]
    else:  # KMNIST
        resources = dataset.resources
    return {f"{dataset.__name__}/raw/{url.rpartition('/')[2]}": md5 for url, md5 in resources}


@contextmanager
def _unpacking(raw: Path, archives: Mapping[str, str]) -> Iterator[Path]:
    """Yield a temporary root for torchvision, which has the archives of data/raw; keep what is downloaded.

    torchvision would read unpacked files, and USPS even archives, without comparing them with anything: the
    root has no unpacked files, and of the archives only those with the right MD5.  EMNIST fills about 2 GB.
    """
    from torchvision.datasets.utils import check_integrity

    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw, prefix=".unpacking-") as folder:
        root = Path(folder)
        for path, md5 in archives.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if check_integrity(raw / path, md5):
                (root / path).symlink_to(raw / path)
        yield root
        for path in archives:
            if not (root / path).is_symlink():
                (raw / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(root / path, raw / path)


def _image_set(found: Any, source: Source) -> ImageSet:
    """Convert a dataset of torchvision, whose images are one array."""
    images = np.asarray(found.data)  # (N, H, W), (N, H, W, 3) or (N, 3, H, W)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] == 3:
        images = images.transpose(0, 3, 1, 2)
    if source.transposed:
        images = images.swapaxes(2, 3)
    labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels, np.int64)
    if labels.ndim == 2:  # QMNIST: the columns after the class tell who wrote the digit
        labels = labels[:, 0].copy()
    classes = source.classes or tuple(found.classes)
    if classes[0] == "N/A":  # EMNIST letters: the labels are 1..26
        labels, classes = labels - 1, classes[1:]
    return ImageSet(np.ascontiguousarray(images), labels, classes)


def _not_found(name: str, files: Iterable[str], root: Path, error: Exception, note: str = "") -> UserError:
    paths = [root / file for file in files]
    names = ", ".join(path.name for path in paths)
    reason = " ".join(str(error).split())
    return UserError(
        f"{name} could not be downloaded ({reason}); place its files by hand: {names} into {paths[0].parent}"
        + note
    )


def _altered(archives: Mapping[str, str], raw: Path) -> str:
    """Return a line on each archive in data/raw that is not the published one."""
    from torchvision.datasets.utils import check_integrity

    lines = [
        f"\n{raw / path} is there, but is not the published file, whose MD5 is {md5}: replace it"
        for path, md5 in archives.items()
        if (raw / path).exists() and not check_integrity(raw / path, md5)
    ]
    return "".join(lines)


def _about(name: str, source: Source) -> dict[str, Any]:
    keys = "description", "source", "citation", "licence"
    return {"set": name} | {key: getattr(source, key) for key in keys}


SETS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, ImageSet]]]] = {
    "fashion-mnist": (fashion_mnist.ABOUT, fashion_mnist.load_fashion_mnist),
    "mnist": (MNIST, load_mnist),
    **{
        name: (_about(name, source), partial(load_from_torchvision, name))
        for name, source in TORCHVISION.items()
    },
}


def load_published(name: str) -> tuple[dict[str, ImageSet], dict[str, Any]]:
    """Return `train` and `test`, and the description.  Raises UserError if the set cannot be had."""
    about, load = SETS[name]
    return load(), about
