"""MNIST and CIFAR-10 from files placed by hand, tiny ones in the published formats, and what is said where there are none."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import tarfile
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from rediffuse.runtime.errors import UserError
from rediffuse.sources.torchvision_sets import CONTENT, DIGITS, load_cifar10, load_mnist

datasets = pytest.importorskip("torchvision.datasets")
random = np.random.RandomState(0)
DIGIT_ARRAYS = {
    "train-images-idx3-ubyte.gz": random.randint(0, 256, (30, 28, 28)).astype(np.uint8),
    "train-labels-idx1-ubyte.gz": (np.arange(30) % 10).astype(np.uint8),
    "t10k-images-idx3-ubyte.gz": random.randint(0, 256, (20, 28, 28)).astype(np.uint8),
    "t10k-labels-idx1-ubyte.gz": (np.arange(20)[::-1] % 10).astype(np.uint8),
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty checkout, and mirrors that are not there."""

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", unreachable)


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data/raw/MNIST/raw"
    folder.mkdir(parents=True)
    resources = []
    for name, array in DIGIT_ARRAYS.items():
        content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        (folder / name).write_bytes(gzip.compress(content))
        resources.append((name, hashlib.md5((folder / name).read_bytes()).hexdigest()))
        monkeypatch.setitem(CONTENT, name.removesuffix(".gz"), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    return folder


def assert_is_mnist() -> None:
    splits = load_mnist()
    for split, prefix in [("train", "train"), ("test", "t10k")]:
        np.testing.assert_array_equal(splits[split].images[:, 0], DIGIT_ARRAYS[f"{prefix}-images-idx3-ubyte.gz"])
        np.testing.assert_array_equal(splits[split].labels, DIGIT_ARRAYS[f"{prefix}-labels-idx1-ubyte.gz"])
        assert splits[split].classes == DIGITS


@pytest.mark.usefixtures("mnist")
def test_mnist_placed_by_hand_is_read() -> None:
    assert_is_mnist()


def test_mnist_is_found_from_a_temporary_workspace(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "workspace").mkdir()
    monkeypatch.chdir(tmp_path / "workspace")
    assert_is_mnist()


def test_mnist_compressed_anew_or_not_at_all_is_read(mnist: Path) -> None:
    first, *others = sorted(mnist.iterdir())
    first.write_bytes(gzip.compress(gzip.decompress(first.read_bytes()), 1))
    for path in others:
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert_is_mnist()


def test_what_is_unpacked_is_not_trusted(mnist: Path) -> None:
    assert_is_mnist()
    unpacked = mnist / "train-labels-idx1-ubyte"
    unpacked.write_bytes(unpacked.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte is not the published file.*delete it, and run again"):
        load_mnist()
    unpacked.unlink()
    assert_is_mnist()


@pytest.mark.parametrize(
    ("content", "words"),
    [(gzip.compress(b"something else"), "is not the published file"), (b"\x1f\x8bsomething", "is damaged")],
    ids=["other", "damaged"],
)
def test_an_altered_mnist_is_refused(mnist: Path, content: bytes, words: str) -> None:
    (mnist / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match=rf"t10k-labels-idx1-ubyte.gz {words}"):
        load_mnist()


@pytest.mark.parametrize(
    ("load", "words"),
    [(load_mnist, ["MNIST", "train-images-idx3-ubyte.gz", "data/raw/MNIST/raw"]), (load_cifar10, ["CIFAR-10", "cifar-10-python.tar.gz"])],
    ids=["mnist", "cifar10"],
)
def test_without_files_and_network_the_place_for_them_is_named(load: object, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load()  # type: ignore[operator]
    assert all(word in str(error.value) for word in [*words, "place its files by hand"])


def test_cifar10_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = {name: random.randint(0, 256, (10, 3072)).astype(np.uint8) for name in ("data_batch_1", "test_batch")}
    names = [f"class {i}" for i in range(10)]
    files = {name: pickle.dumps({"data": data, "labels": list(range(10))}) for name, data in pixels.items()}
    files["batches.meta"] = pickle.dumps({"label_names": names})
    (tmp_path / "data/raw").mkdir(parents=True)
    with tarfile.open(tmp_path / "data/raw/cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    cifar = datasets.CIFAR10
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5((tmp_path / "data/raw/cifar-10-python.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    splits = load_cifar10()
    for split, name in [("train", "data_batch_1"), ("test", "test_batch")]:
        np.testing.assert_array_equal(splits[split].images, pixels[name].reshape(10, 3, 32, 32))
        assert splits[split].labels is not None and splits[split].labels.tolist() == list(range(10))
        assert splits[split].classes == tuple(names)
    unpacked = tmp_path / "data/raw/cifar-10-batches-py/test_batch"
    unpacked.write_bytes(unpacked.read_bytes()[:-1] + b"\x00")
    assert load_cifar10()["test"].images.shape == (10, 3, 32, 32)  # unpacked anew from the archive that is right
