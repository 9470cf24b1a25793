"""Image sets on disk, the splits, and Fashion-MNIST's sources: tried in order, verified, kept whole or not at all.

The sources are tested with a tiny set of the published form; its hashes and archives are made here.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rediffuse.images.image_set import ImageSet, load_images, save_images
from rediffuse.runtime.errors import UserError
from rediffuse.sources import fashion_mnist
from rediffuse.sources.fashion_mnist import load_fashion_mnist
from rediffuse.sources.splits import describe, hold_out

CLASSES = fashion_mnist.CLASSES


def some_images(n: int, seed: int = 0) -> ImageSet:
    random = np.random.RandomState(seed)
    labels = np.arange(n, dtype=np.int64) % len(CLASSES)
    return ImageSet(random.randint(0, 256, (n, 1, 28, 28)).astype(np.uint8), labels, CLASSES)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four small files under the published names; the code takes their content for the published one.

    The working directory is empty, no source works: each test opens the ones it needs.
    """
    folder = tmp_path / "published"
    folder.mkdir()
    train, test = some_images(30, seed=1), some_images(20, seed=2)
    hashes = {}
    for name, array in zip(fashion_mnist.FILES, (train.images[:, 0], train.labels, test.images[:, 0], test.labels), strict=True):
        assert array is not None
        (folder / name).write_bytes(gzip.compress(idx(array)))
        hashes[name] = hashlib.sha256(idx(array)).hexdigest()
    monkeypatch.setattr(fashion_mnist, "FILES", hashes)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "usr/share/datasets/fashion-mnist")
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"no network": unreachable})
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    return folder


def unreachable(folder: Path) -> Path:
    (folder / "half-written").touch()
    raise OSError("Name or service not known")


def assert_is_tiny(splits: dict[str, ImageSet]) -> None:
    for name, expected in [("train", some_images(30, seed=1)), ("test", some_images(20, seed=2))]:
        np.testing.assert_array_equal(splits[name].images, expected.images)
        np.testing.assert_array_equal(splits[name].labels, expected.labels)
        assert splits[name].classes == CLASSES


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "data/raw").iterdir()}


# The sources


def test_files_in_data_raw_come_first(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tiny / "never")
    shutil.copytree(tiny, "data/raw")
    assert_is_tiny(load_fashion_mnist())


def test_temporary_workspace_reads_data_raw_of_its_parent_checkout(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny, tmp_path / "parent/data/raw")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "parent"))
    assert_is_tiny(load_fashion_mnist())


def test_debian_package_is_read_where_it_is_installed(tiny: Path) -> None:
    shutil.copytree(tiny, fashion_mnist.DEBIAN_FOLDER)
    assert_is_tiny(load_fashion_mnist())
    assert not Path("data").exists()


@pytest.fixture
def mirror(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchvision's mirror, on this machine."""
    torchvision = pytest.importorskip("torchvision.datasets")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tiny)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    md5 = [(name, hashlib.md5((tiny / name).read_bytes()).hexdigest()) for name in fashion_mnist.FILES]
    monkeypatch.setattr(torchvision.FashionMNIST, "resources", md5)
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"torchvision": fashion_mnist._from_torchvision})
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("mirror")
def test_download_shows_progress_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parent").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "parent"))
    assert_is_tiny(load_fashion_mnist())
    assert "100%" in capsys.readouterr().err
    assert kept(tmp_path / "parent") == set(fashion_mnist.FILES)
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {})
    assert_is_tiny(load_fashion_mnist())  # offline


@pytest.mark.usefixtures("mirror")
def test_altered_download_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
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


def debian_archive(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: bool) -> Path:
    """A package made by the real dpkg-deb, and an apt-get that delivers it, with or without package lists.  Returns apt-get's log."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb (Debian)")
    tree = tmp_path / "tree"
    shutil.copytree(tiny, tree / fashion_mnist.DEBIAN_FOLDER.relative_to("/"))
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.x>\nDescription: x\n"
    )
    package, log, apt_get = tmp_path / "package.deb", tmp_path / "log", tmp_path / "bin/apt-get"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, package], check=True, capture_output=True)
    apt_get.parent.mkdir()
    apt_get.write_text(APT_GET.format(log=log, package=package, lists="" if lists else "NONE"))
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt_get.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(fashion_mnist, "FETCHERS", {"the Debian archive": fashion_mnist._from_debian_archive})
    return log


@pytest.mark.parametrize("lists", [True, False], ids=["with package lists", "without package lists"])
def test_debian_archive_is_fetched_and_unpacked_without_root(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: bool
) -> None:
    log = debian_archive(tiny, tmp_path, monkeypatch, lists)
    assert_is_tiny(load_fashion_mnist())
    assert kept(Path()) == set(fashion_mnist.FILES)
    actions = [" ".join(word for word in line.split() if word in ("update", "download")) for line in log.read_text().splitlines()]
    assert actions == (["download"] if lists else ["download", "update", "download"])


def test_no_source_names_every_one_tried_and_how_to_place_the_files_by_hand(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(fashion_mnist.FETCHERS, "the Debian archive", fashion_mnist._from_debian_archive)
    with pytest.raises(UserError) as caught:
        load_fashion_mnist()
    message = str(caught.value)
    for words in [
        str(Path("data/raw").resolve()),
        str(fashion_mnist.DEBIAN_FOLDER),
        "no network: Name or service",
        "the Debian archive: no apt-get",
    ]:
        assert words in message
    assert "by hand" in message and all(name in message for name in fashion_mnist.FILES)
    assert kept(Path()) == set()


@pytest.mark.parametrize("damage", ["truncated", "altered", "not gzip", "empty"])
def test_damaged_file_is_refused_with_both_hashes_and_the_remedy(tiny: Path, damage: str) -> None:
    shutil.copytree(tiny, "data/raw")
    name = "train-images-idx3-ubyte.gz"
    file = Path("data/raw", name)
    whole = file.read_bytes()
    content = bytearray(gzip.decompress(whole))
    content[-1] ^= 1
    file.write_bytes({"truncated": whole[:-100], "altered": gzip.compress(bytes(content)), "not gzip": b"<html>", "empty": b""}[damage])
    with pytest.raises(UserError) as caught:
        load_fashion_mnist()
    message = str(caught.value)
    assert str(file.resolve()) in message and fashion_mnist.FILES[name] in message and "Delete it, or replace it" in message
    if damage == "altered":
        assert hashlib.sha256(content).hexdigest() in message


def test_classes_are_those_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision.datasets")
    assert list(CLASSES) == torchvision.FashionMNIST.classes
    assert list(fashion_mnist.FILES) == [name for name, _ in torchvision.FashionMNIST.resources]


# Splits and manifest


def test_held_out_images_are_disjoint_complete_and_fixed_by_the_seed() -> None:
    images = some_images(100)
    train, validation = hold_out(images, 20, seed=1)
    assert (len(train), len(validation)) == (80, 20)
    together = {image.tobytes() for image in np.concatenate([train.images, validation.images])}
    assert together == {image.tobytes() for image in images.images}
    again, other = hold_out(images, 20, seed=1)[1], hold_out(images, 20, seed=2)[1]
    np.testing.assert_array_equal(validation.images, again.images)
    assert not np.array_equal(validation.images, other.images)


def test_labels_stay_with_their_images() -> None:
    images = some_images(50)
    label_of = {image.tobytes(): label for image, label in zip(images.images, images.labels, strict=True)}  # type: ignore[arg-type]
    for part in hold_out(images, 20, seed=1):
        assert part.labels is not None
        assert [label_of[image.tobytes()] for image in part.images] == part.labels.tolist()


def test_manifest_describes_the_splits() -> None:
    splits = {"train": some_images(40), "test": some_images(25, seed=5)}
    manifest = describe(splits, {"set": "some", "licence": "MIT"})
    assert (manifest["set"], manifest["licence"], manifest["shape"], manifest["classes"]) == ("some", "MIT", [1, 28, 28], list(CLASSES))
    pixels = splits["train"].images.astype(np.float64) / 255
    np.testing.assert_allclose(manifest["mean"], [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(manifest["std"], [pixels.std()], rtol=1e-12)
    test = manifest["splits"]["test"]
    assert test["count"] == 25 == sum(test["per_class"].values())
    assert test["per_class"]["T-shirt/top"] == 3 and test["per_class"]["Ankle boot"] == 2
    assert test["sha256"]["images"] == hashlib.sha256(splits["test"].images.tobytes()).hexdigest()
    json.dumps(manifest, allow_nan=False)


def test_mean_and_std_are_by_channel() -> None:
    images = np.zeros((10, 3, 4, 4), np.uint8)
    images[:, 1] = 51
    images[:5, 2] = 255
    manifest = describe({"train": ImageSet(images)}, {})
    assert manifest["mean"] == [0, 0.2, 0.5] and manifest["std"] == [0, 0, 0.5]


# On disk


def test_saved_images_load_as_they_were_and_read_only(tmp_path: Path) -> None:
    images = some_images(12)
    save_images(tmp_path / "set", {"train": images}, {"classes": list(CLASSES)})
    loaded = load_images(tmp_path / "set", "train")
    np.testing.assert_array_equal(loaded.images, images.images)
    np.testing.assert_array_equal(loaded.labels, images.labels)
    assert isinstance(loaded.images, np.memmap) and not loaded.images.flags.writeable
    assert (loaded.shape, len(loaded), loaded.classes) == ((1, 28, 28), 12, CLASSES)


def test_images_without_labels(tmp_path: Path) -> None:
    save_images(tmp_path / "set", {"train": ImageSet(np.zeros((3, 3, 8, 8), np.uint8))}, {"classes": []})
    loaded = load_images(tmp_path / "set", "train")
    assert loaded.labels is None and loaded.classes == () and loaded.shape == (3, 8, 8)


def test_same_images_are_the_same_bytes_on_disk(tmp_path: Path) -> None:
    for name in "ab":
        save_images(tmp_path / name, {"train": some_images(5)}, {"classes": list(CLASSES)})
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_failed_save_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    save_images(tmp_path / "set", {"train": some_images(5)}, {"classes": list(CLASSES)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_images(tmp_path / "set", {"train": some_images(6)}, {"classes": list(CLASSES), "mean": float("nan")})
    assert len(load_images(tmp_path / "set", "train")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_saving_again_leaves_nothing_of_the_old_set(tmp_path: Path) -> None:
    save_images(tmp_path / "set", {"train": some_images(5), "test": some_images(5)}, {"classes": list(CLASSES)})
    save_images(tmp_path / "set", {"train": some_images(6)}, {"classes": list(CLASSES)})
    assert not (tmp_path / "set/test").exists()


def test_missing_set_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json is missing: make it with `dvc repro prepare`"):
        load_images(tmp_path, "train")
    save_images(tmp_path / "set", {"train": some_images(5)}, {"classes": list(CLASSES)})
    with pytest.raises(UserError, match=r"images.npy is missing: make it with `dvc repro prepare`"):
        load_images(tmp_path / "set", "test")


@pytest.mark.parametrize("size", [0, 50, 2000])
@pytest.mark.parametrize("file", ["train/images.npy", "train/labels.npy", "manifest.json"])
def test_damaged_set_names_the_command_that_mends_it(tmp_path: Path, file: str, size: int) -> None:
    folder = tmp_path / "set"
    save_images(folder, {"train": some_images(400)}, {"classes": list(CLASSES), "text": "x" * 5000})
    os.truncate(folder / file, size)
    with pytest.raises(UserError, match=r"is damaged .*dvc repro -f prepare"):
        load_images(folder, "train")


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
def test_image_set_refuses_arrays_of_another_form(images: np.ndarray, labels: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        ImageSet(images, labels, CLASSES)
