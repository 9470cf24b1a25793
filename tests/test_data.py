"""Published sets, splits, and image sets on disk.

The sources are tested with a tiny set of the published form; its hashes and archives are made here.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import get_args
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io

from rediffuse.images.image_set import ImageSet, load_images, save_images
from rediffuse.params import SIDES, Data
from rediffuse.runtime.errors import UserError
from rediffuse.sources import fashion_mnist, published
from rediffuse.sources.fashion_mnist import CLASSES, load_fashion_mnist
from rediffuse.sources.published import SETS, TORCHVISION, load_mnist, load_published
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
        for dataset in (datasets.MNIST, datasets.FashionMNIST, datasets.KMNIST):
            monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
            monkeypatch.setattr(dataset, "resources", md5)
        yield
        server.shutdown()


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize(
    ("load", "folder"),
    [
        (load_fashion_mnist, "data/raw"),
        (load_mnist, "data/raw/MNIST/raw"),
        (SETS["kmnist"][1], "data/raw/KMNIST/raw"),
    ],
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
        (load_mnist, ["MNIST could", "not known", *CONTENT, "data/raw/MNIST/raw"]),
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


# The sets of torchvision: tiny, in the format in which they are published


def tiny(name: str, n: int, seed: int) -> ImageSet:
    """Return images of the shape of the set, of no symmetry, and every label at least once."""
    side = {"usps": 16, "stl10": 96, "svhn": 32, "cifar10": 32, "cifar100": 32}.get(name, 28)
    classes = CLASSES_OF.get(name, tuple("0123456789"))
    shape = (n, 3 if side in (32, 96) else 1, side, side)
    labels = np.random.RandomState(seed).permutation(np.arange(n) % len(classes))
    return ImageSet(np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8), labels, classes)


CLASSES_OF = {
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "emnist-letters": tuple("abcdefghijklmnopqrstuvwxyz"),
    "emnist-balanced": tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
    "cifar10": ("cat", "dog"),  # these two sets name their classes themselves
    "cifar100": ("apple", "aquarium_fish", "baby"),
    "stl10": ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
}


def tar(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def mnist_files(dataset, splits):
    names = [url.rpartition("/")[2] for url, _ in dataset.resources]
    arrays = [array for split in splits.values() for array in (split.images[:, 0], split.labels)]
    content = {name: gzip.compress(idx(array)) for name, array in zip(names, arrays, strict=True)}
    return content, {"resources": [(name, md5(each)) for name, each in content.items()]}


def qmnist_files(dataset, splits):
    content, resources = {}, {}
    for split, images in splits.items():
        table = np.full((len(images), 8), 77, ">i4")  # of the writer and others
        table[:, 0] = images.labels
        labels = struct.pack(">BBBB2I", 0, 0, 12, 2, *table.shape) + table.tobytes()
        files = [gzip.compress(idx(images.images[:, 0])), gzip.compress(labels)]
        names = [url.rpartition("/")[2] for url, _ in dataset.resources[split]]
        content |= dict(zip(names, files, strict=True))
        resources[split] = [(f"http://nowhere/{name}", md5(content[name])) for name in names]
    return content, {"resources": resources}


def emnist_files(part, dataset, splits):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for split, images in splits.items():
            lying = idx(images.images[:, 0].transpose(0, 2, 1))
            labels = idx(images.labels + (part == "letters"))
            archive.writestr(f"gzip/emnist-{part}-{split}-images-idx3-ubyte.gz", gzip.compress(lying))
            archive.writestr(f"gzip/emnist-{part}-{split}-labels-idx1-ubyte.gz", gzip.compress(labels))
    content = {"gzip.zip": buffer.getvalue()}
    return content, {"md5": md5(content["gzip.zip"])}


def cifar_files(key, dataset, splits):
    batches = [name for name, _ in dataset.train_list], [name for name, _ in dataset.test_list]
    members, lists = {}, []
    for names, images in zip(batches, splits.values(), strict=True):
        for name, chosen in zip(names, np.array_split(np.arange(len(images)), len(names)), strict=True):
            rows, labels = images.images[chosen].reshape(len(chosen), -1), images.labels[chosen].tolist()
            members[name] = pickle.dumps({"data": rows, key: labels, "coarse_labels": [7] * len(rows)})
        lists.append([[name, md5(members[name])] for name in names])
    meta = pickle.dumps({dataset.meta["key"]: list(images.classes), "coarse_label_names": ["fish"]})
    members[dataset.meta["filename"]] = meta
    archive = tar({f"{dataset.base_folder}/{name}": each for name, each in members.items()})
    patches = {"train_list": lists[0], "test_list": lists[1], "meta": dataset.meta | {"md5": md5(meta)}}
    return {dataset.filename: archive}, patches | {"tgz_md5": md5(archive)}


def svhn_files(dataset, splits):
    content = {}
    for split, images in splits.items():
        buffer = io.BytesIO()
        digits = np.where(images.labels == 0, 10, images.labels).astype(np.uint8)[:, None]
        scipy.io.savemat(buffer, {"X": images.images.transpose(2, 3, 1, 0), "y": digits})
        content[f"{split}_32x32.mat"] = buffer.getvalue()
    return content, listed(dataset, content)


def stl10_files(dataset, splits):
    members = {"unlabeled_X.bin": bytes(3 * 96 * 96)}
    for split, images in splits.items():
        members[f"{split}_X.bin"] = images.images.transpose(0, 1, 3, 2).tobytes()
        members[f"{split}_y.bin"] = (images.labels + 1).astype(np.uint8).tobytes()
    archive = tar({f"stl10_binary/{name}": content for name, content in members.items()})
    patches = {
        files: [[name, md5(members[name])] for name, _ in getattr(dataset, files)]
        for files in ("train_list", "test_list")
    }
    return {dataset.filename: archive}, patches | {"tgz_md5": md5(archive)}


def usps_files(dataset, splits):
    content = {}
    for images, name in zip(splits.values(), ("usps.bz2", "usps.t.bz2"), strict=True):
        values = (images.images.reshape(len(images), -1) + 0.5) / 127.5 - 1  # torchvision rounds down
        lines = [
            f"{label + 1} " + " ".join(f"{i}:{value:.6f}" for i, value in enumerate(row, 1))
            for label, row in zip(images.labels, values, strict=True)
        ]
        content[name] = bz2.compress("\n".join(lines).encode())
    return content, listed(dataset, content)


def listed(dataset, content):
    files = zip(("train", "test"), content.items(), strict=True)
    return {"split_list": {split: ["http://nowhere", name, md5(each)] for split, (name, each) in files}}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


FILES_OF = {
    "kmnist": mnist_files,
    "qmnist": qmnist_files,
    "emnist-digits": partial(emnist_files, "digits"),
    "emnist-letters": partial(emnist_files, "letters"),
    "emnist-balanced": partial(emnist_files, "balanced"),
    "usps": usps_files,
    "cifar10": partial(cifar_files, "labels"),
    "cifar100": partial(cifar_files, "fine_labels"),
    "svhn": svhn_files,
    "stl10": stl10_files,
}


def publish_tiny(name: str, seed: int) -> tuple[dict[str, ImageSet], dict[str, bytes], dict[str, object]]:
    """Return a tiny set, its archives, and what torchvision's class must know to accept them."""
    splits = {"train": tiny(name, 60, seed), "test": tiny(name, 50, seed + 1)}
    return splits, *FILES_OF[name](getattr(datasets, TORCHVISION[name].dataset), splits)


def place_tiny(name: str, monkeypatch) -> tuple[dict[str, ImageSet], list[Path]]:
    """Write the archives of a tiny set into data/raw, tell torchvision their MD5, and cut the network."""
    dataset = getattr(datasets, TORCHVISION[name].dataset)
    splits, content, patches = publish_tiny(name, seed=1)
    for attribute, value in patches.items():
        monkeypatch.setattr(dataset, attribute, value)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    folder = Path("data/raw") / (f"{dataset.__name__}/raw" if "mnist" in name else "")
    folder.mkdir(parents=True, exist_ok=True)
    for file, each in content.items():
        (folder / file).write_bytes(each)
    return splits, [folder / file for file in content]


def assert_equal(splits: Mapping[str, ImageSet], expected: Mapping[str, ImageSet]) -> None:
    assert splits.keys() == expected.keys()
    for name, split in splits.items():
        np.testing.assert_array_equal(split.images, expected[name].images)
        np.testing.assert_array_equal(split.labels, expected[name].labels)
        assert split.classes == expected[name].classes
        assert split.images.flags.c_contiguous and SIDES[0] <= split.shape[1] <= SIDES[1]


@pytest.mark.parametrize("name", TORCHVISION)
def test_placed_archives_are_read_as_published(monkeypatch, name):
    """Upright, as uint8 (N, C, H, W), with labels from 0 that all have a name; and again the second time."""
    expected, _ = place_tiny(name, monkeypatch)
    for _ in range(2):
        splits, about = load_published(name)
        assert_equal(splits, expected)
    assert list(about) == ["set", "description", "source", "citation", "licence"] and about["set"] == name
    assert [*Path("data/raw").glob(".*")] == []


@pytest.mark.parametrize("name", TORCHVISION)
def test_an_altered_archive_is_neither_read_nor_touched(monkeypatch, name):
    _, files = place_tiny(name, monkeypatch)
    altered = publish_tiny(name, seed=5)[1][files[-1].name]  # other images, in the right format
    files[-1].write_bytes(altered)
    with pytest.raises(
        UserError, match=rf"{name} could not .*\n.*{files[-1]} is there, but is not the published"
    ):
        load_published(name)
    assert files[-1].read_bytes() == altered


@pytest.mark.parametrize(
    ("name", "unpacked"),
    [
        ("kmnist", "t10k-images-idx3-ubyte"),
        ("emnist-digits", "emnist-digits-test-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/test_batch"),
        ("cifar100", "cifar-100-python/test"),
        ("stl10", "stl10_binary/test_X.bin"),
    ],
)
def test_altered_unpacked_files_are_not_read(monkeypatch, name, unpacked):
    expected, [archive, *_] = place_tiny(name, monkeypatch)
    load_published(name)  # leaves the unpacked files of some sets
    for file in (archive.parent / unpacked, archive.parent / unpacked.replace("images-idx3", "labels-idx1")):
        file.write_bytes(idx(np.zeros((50, 28, 28) if "images" in unpacked else 50)))
    assert_equal(load_published(name)[0], expected)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_an_unpacked_set_needs_no_archive(monkeypatch, name):
    expected, [archive] = place_tiny(name, monkeypatch)
    shutil.unpack_archive(archive, archive.parent)
    archive.unlink()
    assert_equal(load_published(name)[0], expected)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("kmnist", r"train-images-idx3-ubyte\.gz, .*t10k-labels-.* into .*/data/raw/KMNIST/raw"),
        ("qmnist", r"qmnist-train-images-idx3-ubyte\.gz, .*qmnist-test-.* into .*/data/raw/QMNIST/raw"),
        ("emnist-letters", r"gzip\.zip into .*/data/raw/EMNIST/raw"),
        ("usps", r"usps\.bz2, usps\.t\.bz2 into .*/data/raw"),
        ("cifar10", r"cifar-10-python\.tar\.gz into .*/data/raw"),
        ("cifar100", r"cifar-100-python\.tar\.gz into .*/data/raw"),
        ("svhn", r"train_32x32\.mat, test_32x32\.mat into .*/data/raw"),
        ("stl10", r"stl10_binary\.tar\.gz into .*/data/raw"),
    ],
)
def test_without_a_network_the_files_of_a_set_and_their_place_are_named(monkeypatch, name, place):
    """With the real names and MD5 that torchvision has."""
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    source = SETS[name][0]["source"]
    with pytest.raises(UserError, match=rf"{name} could .*not known.*by hand: {place}, .*see {source}\)$"):
        load_published(name)
    assert [path for path in Path("data/raw").rglob("*") if path.is_file()] == []


def test_every_published_set_can_be_chosen():
    assert get_args(Data.model_fields["set"].annotation)[: len(SETS)] == tuple(SETS)


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
