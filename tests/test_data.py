"""Published sets, splits, and image sets on disk.

The sources are tested with a tiny set of the published form; its hashes and archives are made here.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import shutil
import struct
import subprocess
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest

from rediffuse.images.image_set import ImageSet, load_images, save_images
from rediffuse.runtime.errors import UserError
from rediffuse.sources import fashion_mnist, published
from rediffuse.sources.fashion_mnist import CLASSES, load_fashion_mnist
from rediffuse.sources.published import load_cifar10, load_mnist
from rediffuse.sources.splits import describe, hold_out

datasets = pytest.importorskip("torchvision.datasets")


def some_images(n: int, seed: int = 0) -> ImageSet:
    random = np.random.RandomState(seed)
    labels = np.arange(n, dtype=np.int64) % len(CLASSES)
    return ImageSet(random.randint(0, 256, (n, 1, 28, 28)).astype(np.uint8), labels, CLASSES)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


TRAIN, TEST = some_images(30, seed=1), some_images(20, seed=2)
ARRAYS = TRAIN.images[:, 0], TRAIN.labels, TEST.images[:, 0], TEST.labels
CONTENT = {name: idx(array) for name, array in zip(fashion_mnist.FILES, ARRAYS, strict=True)}


def place(folder: Path) -> Path:
    """Write the four files of the tiny set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(gzip.compress(content))
    return folder


def assert_is_tiny(splits: dict[str, ImageSet]) -> None:
    for name, expected in (("train", TRAIN), ("test", TEST)):
        np.testing.assert_array_equal(splits[name].images, expected.images)
        np.testing.assert_array_equal(splits[name].labels, expected.labels)


def unreachable(*_: object, **__: object) -> Path:
    raise URLError("Name or service not known")


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """An empty checkout as the working directory, no source, and the tiny set for the published one."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    monkeypatch.setattr(fashion_mnist, "FILES", hashes)
    monkeypatch.setattr(published, "MNIST_FILES", hashes)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "usr/share/datasets/fashion-mnist")
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"no network": unreachable})
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")


# Fashion-MNIST and MNIST


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize(
    ("load", "folder"),
    [
        (load_fashion_mnist, "checkout/data/raw"),
        (load_fashion_mnist, "parent/data/raw"),  # of a temporary workspace
        (load_fashion_mnist, "usr/share/datasets/fashion-mnist"),
        (load_mnist, "parent/data/raw/MNIST/raw"),
    ],
)
def test_placed_files_are_found(tmp_path, monkeypatch, load, folder, unpacked):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "parent"))
    archive = place(tmp_path / folder) / "train-images-idx3-ubyte.gz"
    if unpacked:
        archive.unlink()
        archive.with_suffix("").write_bytes(CONTENT[archive.name])
    assert_is_tiny(load())


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """torchvision's mirror, on this machine."""
    files = place(tmp_path / "mirror")
    md5 = [(name, hashlib.md5((files / name).read_bytes()).hexdigest()) for name in CONTENT]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"torchvision": fashion_mnist._from_torchvision})
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for dataset in (datasets.MNIST, datasets.FashionMNIST):
            monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
            monkeypatch.setattr(dataset, "resources", md5)
        yield
        server.shutdown()


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize(
    ("load", "folder"), [(load_fashion_mnist, "data/raw"), (load_mnist, "data/raw/MNIST/raw")]
)
def test_a_download_is_kept_in_the_parent_checkout(tmp_path, monkeypatch, capsys, load, folder):
    (tmp_path / "parent").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "parent"))
    assert_is_tiny(load())
    assert "100%" in capsys.readouterr().err
    assert CONTENT.keys() <= {path.name for path in (tmp_path / "parent" / folder).iterdir()}
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    assert_is_tiny(load())


@pytest.mark.usefixtures("mirror")
def test_an_altered_download_is_not_kept(monkeypatch):
    monkeypatch.setitem(fashion_mnist.FILES, "t10k-labels-idx1-ubyte.gz", "0" * 64)
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz is not the published file"):
        load_fashion_mnist()
    assert [*Path("data/raw").iterdir()] == []


APT_GET = """\
#!/bin/sh
case "$*" in
    *Dir::State=*update) ;;
    *Dir::State=*download*) cp {package} dataset-fashion-mnist_1_all.deb ;;
    *) echo "E: Unable to locate package dataset-fashion-mnist" >&2; exit 100 ;;
esac
"""
CONTROL = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.x>\nDescription: x\n"


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb (Debian)")
def test_debian_archive_is_fetched_and_unpacked_without_root(tmp_path, monkeypatch):
    """A package made by the real dpkg-deb, and an apt-get that needs package lists of our own to find it."""
    place(tmp_path / "tree" / fashion_mnist.DEBIAN_FOLDER.relative_to("/"))
    (tmp_path / "tree/DEBIAN").mkdir()
    (tmp_path / "tree/DEBIAN/control").write_text(CONTROL)
    package, apt_get = tmp_path / "package.deb", tmp_path / "bin/apt-get"
    build = ["dpkg-deb", "--root-owner-group", "--build", tmp_path / "tree", package]
    subprocess.run(build, check=True, capture_output=True)
    apt_get.parent.mkdir()
    apt_get.write_text(APT_GET.format(package=package))
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt_get.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"Debian": fashion_mnist._from_debian_archive})
    assert_is_tiny(load_fashion_mnist())
    assert {path.name for path in Path("data/raw").iterdir()} == set(CONTENT)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (load_fashion_mnist, ["data/raw: nothing there", "no apt-get", "no network: ", *CONTENT]),
        (load_mnist, [*CONTENT, "data/raw/MNIST/raw"]),
        (load_cifar10, ["cifar-10-python.tar.gz into", "data/raw"]),
    ],
)
def test_without_any_source_the_place_for_the_files_is_named(monkeypatch, load, words):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setitem(fashion_mnist.FETCHERS, "the archive", fashion_mnist._from_debian_archive)
    with pytest.raises(UserError) as caught:
        load()
    assert all(word in str(caught.value) for word in ["by hand", *words])


@pytest.mark.parametrize("damage", ["truncated", "altered", "not gzip", "empty"])
def test_a_damaged_file_is_refused_with_its_hash_and_the_remedy(damage):
    name = "train-images-idx3-ubyte.gz"
    file = place(Path("data/raw")) / name
    altered = gzip.compress(CONTENT[name][:-1] + bytes([CONTENT[name][-1] ^ 1]))
    damaged = {"truncated": file.read_bytes()[:-100], "altered": altered, "not gzip": b"<html>", "empty": b""}
    file.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=rf"{file.stem}.*\n  {fashion_mnist.FILES[name]}.*\n.*\nDelete it"):
        load_fashion_mnist()


def test_the_classes_are_those_of_torchvision():
    assert list(CLASSES) == datasets.FashionMNIST.classes


def test_cifar10_as_torchvision_reads_it(monkeypatch):
    pixels = np.random.RandomState(0).randint(0, 256, (2, 10, 32, 32, 3)).astype(np.uint8)

    def cifar10(root, train, download):
        assert download and Path(root) == Path("data/raw").absolute()
        return SimpleNamespace(data=pixels[int(train)], targets=[0, 1] * 5, classes=["cat", "dog"])

    monkeypatch.setattr(datasets, "CIFAR10", cifar10)
    for name, split in load_cifar10().items():
        expected = pixels[int(name == "train")].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(split.images, expected)
        assert split.labels.tolist() == [0, 1] * 5 and split.classes == ("cat", "dog")


# Splits and manifest


def test_held_out_images_are_disjoint_complete_and_fixed_by_the_seed():
    images = some_images(100)
    parts = hold_out(images, 20, seed=1)
    assert [len(part) for part in parts] == [80, 20]
    pairs = [(x.tobytes(), y) for part in parts for x, y in zip(part.images, part.labels, strict=True)]
    assert set(pairs) == {(x.tobytes(), y) for x, y in zip(images.images, images.labels, strict=True)}
    again, other = hold_out(images, 20, seed=1)[1], hold_out(images, 20, seed=2)[1]
    np.testing.assert_array_equal(parts[1].images, again.images)
    assert not np.array_equal(parts[1].images, other.images)


def test_manifest_describes_the_splits():
    colour = np.zeros((10, 3, 4, 4), np.uint8)
    colour[:, 1] = 51
    colour[:5, 2] = 255
    test = some_images(25)
    manifest = describe({"train": ImageSet(colour), "test": test}, {"set": "some"})
    assert (manifest["set"], manifest["shape"]) == ("some", [3, 4, 4])
    assert manifest["mean"] == [0, 0.2, 0.5] and manifest["std"] == [0, 0, 0.5]
    assert manifest["splits"]["train"].keys() == {"count", "sha256"}  # it has no labels
    described = manifest["splits"]["test"]
    assert described["count"] == 25 == sum(described["per_class"].values())
    assert described["per_class"]["T-shirt/top"] == 3 and described["per_class"]["Ankle boot"] == 2
    assert described["sha256"]["images"] == hashlib.sha256(test.images.tobytes()).hexdigest()


# On disk

MANIFEST = {"classes": list(CLASSES), "text": "x" * 5000}


def test_saved_images_load_as_they_were_and_read_only(tmp_path):
    images = some_images(12)
    save_images(tmp_path / "set", {"train": images, "test": ImageSet(images.images)}, MANIFEST)
    loaded = load_images(tmp_path / "set", "train")
    np.testing.assert_array_equal(loaded.images, images.images)
    np.testing.assert_array_equal(loaded.labels, images.labels)
    assert isinstance(loaded.images, np.memmap) and not loaded.images.flags.writeable
    assert (loaded.shape, len(loaded), loaded.classes) == ((1, 28, 28), 12, CLASSES)
    assert load_images(tmp_path / "set", "test").labels is None


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "set"
    save_images(folder, {"train": some_images(5), "test": some_images(5)}, MANIFEST)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_images(folder, {"train": some_images(6)}, MANIFEST | {"mean": float("nan")})
    assert len(load_images(folder, "train")) == 5 and [*tmp_path.glob(".*")] == []
    save_images(folder, {"train": some_images(6)}, MANIFEST)
    assert len(load_images(folder, "train")) == 6 and not (folder / "test").exists()


@pytest.mark.parametrize("size", [None, 0, 50, 2000])  # None: missing
@pytest.mark.parametrize("file", ["train/images.npy", "manifest.json"])
def test_a_missing_or_damaged_set_names_the_command_that_makes_it(tmp_path, file, size):
    save_images(tmp_path / "set", {"train": some_images(400)}, MANIFEST)
    if size is None:
        (tmp_path / "set" / file).unlink()
    else:
        os.truncate(tmp_path / "set" / file, size)
    with pytest.raises(UserError, match=r"(missing|damaged).*dvc repro -f prepare"):
        load_images(tmp_path / "set", "train")


def test_a_label_without_a_class_is_damage(tmp_path):
    save_images(tmp_path / "set", {"train": some_images(20)}, MANIFEST | {"classes": ["only"]})
    with pytest.raises(UserError, match=r"damaged \(labels must be 0\.\.0, got 0\.\.9\)"):
        load_images(tmp_path / "set", "train")
