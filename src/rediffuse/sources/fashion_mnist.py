"""Fashion-MNIST (Xiao et al. 2017): where its four files are looked for, and how they are fetched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import dvc_root
from rediffuse.sources.idx import missing_files, read_splits

ABOUT = {
    "set": "fashion-mnist",
    "description": "70,000 greyscale pictures of fashion articles, 28x28, in 10 classes",
    "source": "https://github.com/zalandoresearch/fashion-mnist",
    "citation": "Xiao, Rasul and Vollgraf 2017, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine"
    " Learning Algorithms, arXiv:1708.07747",
    "licence": "MIT",
}
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
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
    """Return `train` (60,000 images) and `test` (10,000) as published: uint8 (N, 1, 28, 28), labels 0..9.

    Sources, in this order: data/raw, Debian's package, torchvision's mirrors, the Debian archive.  Downloads
    are kept in data/raw of the checkout.  Raises UserError if no source has the set, or a file is not the
    published one.
    """
    keep = dvc_root() / RAW
    tried = []
    for folder in dict.fromkeys([RAW.absolute(), keep, DEBIAN_FOLDER]):
        missing = missing_files(folder, FILES)
        if not missing:
            _log(f"Fashion-MNIST: read from {folder}")
            return read_splits(folder, FILES, CLASSES)
        found = "nothing" if len(missing) == len(FILES) else f"{', '.join(missing)} not"
        tried.append(f"{folder}: {found} there")
    for source, fetch in FETCHERS.items():
        _log(f"Fashion-MNIST: trying {source}")
        try:
            return _fetch(fetch, keep)
        except (UserError, OSError, RuntimeError, HTTPException) as error:
            tried.append(f"{source}: {' '.join(str(error).split())}")
    raise UserError(
        "Fashion-MNIST could not be found.  Tried, in this order:\n"
        + "".join(f"  - {reason}\n" for reason in tried)
        + f"Place its four files by hand: {', '.join(FILES)}\n"
        f"from {ABOUT['source']} (or another machine's data/raw) into {keep}"
    )


def _fetch(fetch: Callable[[Path], Path], keep: Path) -> dict[str, ImageSet]:
    """Fetch into a temporary folder, verify, then move: `keep` never holds a partial or wrong file."""
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=keep, prefix=".incoming-") as incoming:
        folder = fetch(Path(incoming))
        splits = read_splits(folder, FILES, CLASSES)
        for name in FILES:
            os.replace(folder / name, keep / name)
    _log(f"Fashion-MNIST: kept in {keep}")
    return splits


def _from_torchvision(folder: Path) -> Path:
    """Download with torchvision, which knows the mirrors and shows its progress."""
    from torchvision.datasets import FashionMNIST  # here: importing torch takes seconds, most runs need none

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        return Path(FashionMNIST(str(folder), download=True).raw_folder)
    finally:
        socket.setdefaulttimeout(before)


def _from_debian_archive(folder: Path) -> Path:
    """Download and unpack Debian's package without root, with our own package lists if need be."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError("no apt-get and dpkg-deb here (not Debian or Ubuntu)")
    try:
        _apt(folder, "download", DEBIAN_PACKAGE)
    except UserError:
        (folder / "state/lists/partial").mkdir(parents=True)
        (folder / "cache/archives/partial").mkdir(parents=True)
        own = f"-oDir::State={folder}/state", f"-oDir::Cache={folder}/cache", "-oAcquire::Languages=none"
        _apt(folder, *own, "update")
        _apt(folder, *own, "download", DEBIAN_PACKAGE)
    [package] = folder.glob(f"{DEBIAN_PACKAGE}_*.deb")
    _run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], folder)
    return folder / "unpacked" / DEBIAN_FOLDER.relative_to("/")


FETCHERS = {
    "torchvision's download": _from_torchvision,
    f"the Debian archive (apt-get download {DEBIAN_PACKAGE})": _from_debian_archive,
}


def _apt(folder: Path, *arguments: str) -> None:
    options = [f"-oAcquire::{scheme}::Timeout={CONNECT_SECONDS}" for scheme in ("http", "https")]
    # As root, apt-get would switch to another user, who cannot write to our folder.
    _run(["apt-get", *options, "-oAcquire::Retries=1", "-oAPT::Sandbox::User=root", *arguments], folder)


def _run(command: list[str], folder: Path) -> None:
    """Run a program in the folder.  Its output goes to our stderr; raises UserError with its own stderr."""
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UserError(done.stderr.strip() or f"{command[0]} failed with exit status {done.returncode}")


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
