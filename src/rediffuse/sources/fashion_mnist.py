"""Fashion-MNIST (Xiao et al. 2017): where its four files are looked for, how they are fetched and verified.

The content is verified, not the archive: Debian's package holds the published bytes, compressed anew.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

ABOUT = {
    "set": "fashion-mnist",
    "description": "70,000 greyscale pictures of fashion articles, 28x28, in 10 classes",
    "source": "https://github.com/zalandoresearch/fashion-mnist",
    "citation": "Xiao, Rasul and Vollgraf 2017, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms,"
    " arXiv:1708.07747",
    "licence": "MIT",
}
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

# SHA-256 of the decompressed files.
FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
RAW = Path("data/raw")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
CONNECT_SECONDS = 10


def load_fashion_mnist() -> dict[str, ImageSet]:
    """`train` (60,000 images) and `test` (10,000) as published: uint8 (N, 1, 28, 28), labels 0..9.

    Looked for in data/raw, in Debian's package, at torchvision's mirrors, in the Debian archive.  What was fetched is kept in data/raw
    of the checkout (`$DVC_ROOT`, which DVC sets: a stage may run in a temporary workspace).  Raises UserError if no source has it, or
    a file is not the published one.
    """
    content = _content()
    splits = {}
    for split, prefix in [("train", "train"), ("test", "t10k")]:
        images = _parse_idx(content[f"{prefix}-images-idx3-ubyte.gz"])
        labels = _parse_idx(content[f"{prefix}-labels-idx1-ubyte.gz"])
        splits[split] = ImageSet(images[:, None], labels.astype(np.int64), CLASSES)
    return splits


def _content() -> dict[str, bytes]:
    keep = Path(os.environ.get("DVC_ROOT", "."), RAW).resolve()
    tried = []
    for folder in dict.fromkeys([RAW.resolve(), keep, DEBIAN_FOLDER]):
        missing = [name for name in FILES if not (folder / name).is_file()]
        if not missing:
            _log(f"Fashion-MNIST: read from {folder}")
            return _read(folder)
        tried.append(f"{folder}: {'nothing' if len(missing) == len(FILES) else ', '.join(missing) + ' not'} there")
    for source, fetch in FETCHERS.items():
        _log(f"Fashion-MNIST: trying {source}")
        try:
            return _fetch(fetch, keep)
        except (UserError, OSError, RuntimeError, HTTPException) as error:
            tried.append(f"{source}: {' '.join(str(error).split())}")
    raise UserError(
        "Fashion-MNIST could not be found.  Tried, in this order:\n"
        + "".join(f"  - {reason}\n" for reason in tried)
        + f"Place its four files by hand: {', '.join(FILES)}\nfrom {ABOUT['source']} (or another machine's data/raw) into {keep}"
    )


def _fetch(fetch: Callable[[Path], Path], keep: Path) -> dict[str, bytes]:
    """Fetch into a folder beside the kept files, verify, then move: `keep` never holds a file that is not whole and right."""
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=keep, prefix=".incoming-") as incoming:
        folder = fetch(Path(incoming))
        content = _read(folder)
        for name in FILES:
            os.replace(folder / name, keep / name)
    _log(f"Fashion-MNIST: kept in {keep}")
    return content


def _from_torchvision(folder: Path) -> Path:
    """The download of torchvision, which knows the mirrors and shows its progress."""
    from torchvision.datasets import FashionMNIST  # here, because most runs find the files on disk, and torch takes a second to import

    with _connect_timeout(CONNECT_SECONDS):
        return Path(FashionMNIST(str(folder), download=True).raw_folder)


def _from_debian_archive(folder: Path) -> Path:
    """Debian's package, downloaded and unpacked without root.  Where the machine's package lists are missing or old, we fetch our own."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError("no apt-get and dpkg-deb here (not Debian or Ubuntu)")
    try:
        _apt(folder, "download", DEBIAN_PACKAGE)
    except UserError:
        (folder / "state/lists/partial").mkdir(parents=True)
        (folder / "cache/archives/partial").mkdir(parents=True)
        private = ["-o", f"Dir::State={folder}/state", "-o", f"Dir::Cache={folder}/cache", "-o", "Acquire::Languages=none"]
        _apt(folder, *private, "update")
        _apt(folder, *private, "download", DEBIAN_PACKAGE)
    [package] = folder.glob(f"{DEBIAN_PACKAGE}_*.deb")
    _run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], folder)
    return folder / "unpacked" / DEBIAN_FOLDER.relative_to("/")


FETCHERS = {
    "torchvision's download": _from_torchvision,
    f"the Debian archive (apt-get download {DEBIAN_PACKAGE})": _from_debian_archive,
}


def _apt(folder: Path, *arguments: str) -> None:
    patience = [f"Acquire::http::Timeout={CONNECT_SECONDS}", f"Acquire::https::Timeout={CONNECT_SECONDS}", "Acquire::Retries=1"]
    # A root's apt-get would give up its rights, and with them the access to our folder.
    options = [word for option in [*patience, "APT::Sandbox::User=root"] for word in ("-o", option)]
    _run(["apt-get", *options, *arguments], folder)


def _run(command: list[str], folder: Path) -> None:
    """Run a program in the folder; its progress goes to our stderr (file descriptor 2), its complaints into the UserError."""
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip() or f"{command[0]} failed with exit status {done.returncode}")


@contextmanager
def _connect_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read(folder: Path) -> dict[str, bytes]:
    return {name: _verified(folder / name, sha256) for name, sha256 in FILES.items()}


def _verified(path: Path, expected: str) -> bytes:
    """The decompressed content.  Raises UserError if it is not the published one."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found = f"nothing that can be decompressed ({error})"
    else:
        found = hashlib.sha256(content).hexdigest()
        if found == expected:
            return content
    raise UserError(
        f"{path} is not the published file: the SHA-256 of its decompressed content must be\n  {expected}, found\n  {found}\n"
        "Delete it, or replace it by the published one, and run again."
    )


def _parse_idx(content: bytes) -> NDArray[np.uint8]:
    """The array in an IDX file of bytes: magic 0, 0, 8, number of dimensions; big-endian dimensions; values."""
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
