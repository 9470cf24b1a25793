"""Published sets, splits, and image sets on disk.

The sources are tested with a tiny set of the published form; its hashes and archives are made here.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import pickle
import shutil
import struct
import subprocess
import tarfile
import threading
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path
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


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "data/raw").iterdir()}


# Fashion-MNIST and MNIST


@pytest.mark.parametrize(
    "folder", ["checkout/data/raw", "parent/data/raw", "usr/share/datasets/fashion-mnist"]
)
def test_fashion_mnist_is_found(tmp_path, monkeypatch, folder):
    """Also by a temporary workspace, in its parent checkout."""
    place(tmp_path / folder)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "parent"))
    assert_is_tiny(load_fashion_mnist())


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """torchvision's mirror, on this machine."""
    files = place(tmp_path / "mirror")
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(files)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    md5 = [(name, hashlib.md5((files / name).read_bytes()).hexdigest()) for name in CONTENT]
    for dataset in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(dataset, "resources", md5)
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"torchvision": fashion_mnist._from_torchvision})
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize(
    ("load", "folder"),
    [(load_fashion_mnist, "data/raw"), (load_mnist, "data/raw/MNIST/raw")],
    ids=["fashion", "mnist"],
)
def test_a_download_is_kept_in_the_parent_checkout(tmp_path, monkeypatch, capsys, load, folder):
    (tmp_path / "parent").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "parent"))
    assert_is_tiny(load())
    assert "100%" in capsys.readouterr().err
    assert CONTENT.keys() <= {path.name for path in (tmp_path / "parent" / folder).iterdir()}
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {})
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    assert_is_tiny(load())


@pytest.mark.usefixtures("mirror")
def test_an_altered_download_is_not_kept(monkeypatch):
    monkeypatch.setitem(fashion_mnist.FILES, "t10k-labels-idx1-ubyte.gz", "0" * 64)
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz is not the published file"):
        load_fashion_mnist()
    assert kept(Path()) == set()


APT_GET = """\
#!/bin/sh
echo "$*" >> {log}
case "$*" in
    *Dir::State=*update) ;;
    *Dir::State=*download*|*download*{lists}) cp {package} dataset-fashion-mnist_1_all.deb ;;
    *) echo "E: Unable to locate package dataset-fashion-mnist" >&2; exit 100 ;;
esac
"""


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb (Debian)")
@pytest.mark.parametrize("lists", [True, False], ids=["with package lists", "without package lists"])
def test_debian_archive_is_fetched_and_unpacked_without_root(tmp_path, monkeypatch, lists):
    """A package made by the real dpkg-deb, and an apt-get that delivers it, with or without package lists."""
    place(tmp_path / "tree" / fashion_mnist.DEBIAN_FOLDER.relative_to("/"))
    (tmp_path / "tree/DEBIAN").mkdir()
    (tmp_path / "tree/DEBIAN/control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.x>\nDescription:"
        " x\n"
    )
    package, apt_get = tmp_path / "package.deb", tmp_path / "bin/apt-get"
    build = ["dpkg-deb", "--root-owner-group", "--build", tmp_path / "tree", package]
    subprocess.run(build, check=True, capture_output=True)
    apt_get.parent.mkdir()
    apt_get.write_text(APT_GET.format(log=tmp_path / "log", package=package, lists="" if lists else "NONE"))
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt_get.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"Debian": fashion_mnist._from_debian_archive})
    assert_is_tiny(load_fashion_mnist())
    assert kept(Path()) == set(CONTENT)
    assert len((tmp_path / "log").read_text().splitlines()) == (1 if lists else 3)


def test_without_any_source_each_is_named_and_how_to_place_the_files(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(fashion_mnist.FETCHERS, "the archive", fashion_mnist._from_debian_archive)
    with pytest.raises(UserError) as caught:
        load_fashion_mnist()
    folders = [str(Path("data/raw").resolve()), str(fashion_mnist.DEBIAN_FOLDER)]
    for words in [*folders, *CONTENT, "no network: ", "the archive: no apt-get", "by hand"]:
        assert words in str(caught.value)
    assert kept(Path()) == set()


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (load_mnist, "MNIST .*train-images-idx3-ubyte.gz.* into .*data/raw/MNIST/raw"),
        (load_cifar10, "CIFAR-10 .*cifar-10-python.tar.gz into .*data/raw"),
    ],
    ids=["mnist", "cifar10"],
)
def test_without_network_the_place_for_the_files_is_named(monkeypatch, load, words):
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError, match=words):
        load()


@pytest.mark.parametrize("damage", ["truncated", "altered", "not gzip", "empty", "unpacked"])
def test_a_damaged_file_is_refused_with_its_hash_and_the_remedy(damage):
    name = "train-images-idx3-ubyte.gz"
    file = place(Path("data/raw")) / name
    whole, altered = file.read_bytes(), CONTENT[name][:-1] + bytes([CONTENT[name][-1] ^ 1])
    damaged = {"truncated": whole[:-100], "altered": gzip.compress(altered), "not gzip": b"<html>"}
    file.write_bytes(damaged.get(damage, b""))
    if damage == "unpacked":
        file.unlink()
        file.with_suffix("").write_bytes(altered)
    with pytest.raises(UserError, match=rf"{file.stem}.*\n  {fashion_mnist.FILES[name]}.*\n.*\nDelete it"):
        load_fashion_mnist()


def test_mnist_may_be_compressed_anew_or_not_at_all():
    folder = place(Path("data/raw/MNIST/raw"))
    for archive in sorted(folder.iterdir())[1:]:
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
        archive.unlink()
    assert_is_tiny(load_mnist())


def test_the_published_names_are_those_of_torchvision():
    assert list(CLASSES) == datasets.FashionMNIST.classes
    for dataset in (datasets.MNIST, datasets.FashionMNIST):
        assert list(CONTENT) == [name for name, _ in dataset.resources]


def test_cifar10_from_its_archive(monkeypatch):
    random = np.random.RandomState(0)
    pixels = {n: random.randint(0, 256, (10, 3072)).astype(np.uint8) for n in ("data_batch_1", "test_batch")}
    names = [f"class {i}" for i in range(10)]
    files = {name: pickle.dumps({"data": data, "labels": list(range(10))}) for name, data in pixels.items()}
    files["batches.meta"] = pickle.dumps({"label_names": names})
    raw = Path("data/raw")
    raw.mkdir(parents=True)
    with tarfile.open(raw / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    whole = hashlib.md5((raw / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", whole)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    splits = load_cifar10()
    for split, name in [("train", "data_batch_1"), ("test", "test_batch")]:
        np.testing.assert_array_equal(splits[split].images, pixels[name].reshape(10, 3, 32, 32))
        assert splits[split].labels.tolist() == list(range(10)) and splits[split].classes == tuple(names)
    unpacked = raw / "cifar-10-batches-py/test_batch"
    unpacked.write_bytes(unpacked.read_bytes()[:-1] + b"\x00")
    assert load_cifar10()["test"].images.shape == (10, 3, 32, 32)  # unpacked again from the archive


# Splits and manifest


def test_held_out_images_are_disjoint_complete_and_fixed_by_the_seed():
    images = some_images(100)
    label_of = {image.tobytes(): label for image, label in zip(images.images, images.labels, strict=True)}
    parts = hold_out(images, 20, seed=1)
    assert [len(part) for part in parts] == [80, 20]
    assert {image.tobytes() for part in parts for image in part.images} == set(label_of)
    for part in parts:
        assert [label_of[image.tobytes()] for image in part.images] == part.labels.tolist()
    again, other = hold_out(images, 20, seed=1)[1], hold_out(images, 20, seed=2)[1]
    np.testing.assert_array_equal(parts[1].images, again.images)
    assert not np.array_equal(parts[1].images, other.images)


def test_manifest_describes_the_splits():
    splits = {"train": some_images(40), "test": some_images(25, seed=5)}
    manifest = describe(splits, {"set": "some"})
    expected = {"set": "some", "shape": [1, 28, 28], "classes": list(CLASSES)}
    assert {key: manifest[key] for key in expected} == expected
    pixels = splits["train"].images.astype(np.float64) / 255
    np.testing.assert_allclose(manifest["mean"], [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(manifest["std"], [pixels.std()], rtol=1e-12)
    test = manifest["splits"]["test"]
    assert test["count"] == 25 == sum(test["per_class"].values())
    assert test["per_class"]["T-shirt/top"] == 3 and test["per_class"]["Ankle boot"] == 2
    assert test["sha256"]["images"] == hashlib.sha256(splits["test"].images.tobytes()).hexdigest()
    json.dumps(manifest, allow_nan=False)


def test_mean_and_std_are_by_channel():
    images = np.zeros((10, 3, 4, 4), np.uint8)
    images[:, 1] = 51
    images[:5, 2] = 255
    manifest = describe({"train": ImageSet(images)}, {})
    assert manifest["mean"] == [0, 0.2, 0.5] and manifest["std"] == [0, 0, 0.5]


# On disk

MANIFEST = {"classes": list(CLASSES), "text": "x" * 5000}


def test_saved_images_load_as_they_were_and_read_only(tmp_path):
    images = some_images(12)
    for name in "ab":
        save_images(tmp_path / name, {"train": images, "test": ImageSet(images.images)}, MANIFEST)
    loaded = load_images(tmp_path / "a", "train")
    np.testing.assert_array_equal(loaded.images, images.images)
    np.testing.assert_array_equal(loaded.labels, images.labels)
    assert isinstance(loaded.images, np.memmap) and not loaded.images.flags.writeable
    assert (loaded.shape, len(loaded), loaded.classes) == ((1, 28, 28), 12, CLASSES)
    assert load_images(tmp_path / "a", "test").labels is None
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "set"
    save_images(folder, {"train": some_images(5), "test": some_images(5)}, MANIFEST)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_images(folder, {"train": some_images(6)}, MANIFEST | {"mean": float("nan")})
    assert len(load_images(folder, "train")) == 5 and [*tmp_path.glob(".*")] == []
    save_images(folder, {"train": some_images(6)}, MANIFEST)
    assert len(load_images(folder, "train")) == 6 and not (folder / "test").exists()


FILES = ("train/images.npy", "manifest.json", "train/labels.npy")
DAMAGE = [(FILES[0], None), (FILES[1], None), *product(FILES, (0, 50, 2000))]  # None: missing


@pytest.mark.parametrize(("file", "size"), DAMAGE)
def test_a_missing_or_damaged_set_names_the_command_that_makes_it(tmp_path, file, size):
    save_images(tmp_path / "set", {"train": some_images(400)}, MANIFEST)
    if size is None:
        (tmp_path / "set" / file).unlink()
    else:
        os.truncate(tmp_path / "set" / file, size)
    with pytest.raises(UserError, match=r"(missing|damaged).*dvc repro -f prepare"):
        load_images(tmp_path / "set", "train")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 1, 4, 4), np.float64), None),
        (np.zeros((2, 4, 4), np.uint8), None),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, np.int64)),
        (np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 10])),
        (np.zeros((2, 1, 4, 4), np.uint8), np.array([0, -1])),
    ],
)
def test_image_set_refuses_arrays_of_another_form(images, labels):
    with pytest.raises(ValueError, match="must be"):
        ImageSet(images, labels, CLASSES)
