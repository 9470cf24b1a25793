"""Images from archives, NumPy's files and parquet files: what is found, and what is refused, in words."""

from __future__ import annotations

import io
import random
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from rediffuse.runtime.errors import UserError
from rediffuse.sources import parquet
from rediffuse.sources.archives import is_archive, unpack
from rediffuse.sources.arrays import find_arrays, is_arrays
from rediffuse.sources.found import Found
from rediffuse.sources.parquet import find_parquet, is_parquet


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def opened(found: Found) -> list[np.ndarray]:
    """Open all images in a thread pool, as `prepare` does."""
    with ThreadPoolExecutor(4) as pool:
        return [np.asarray(image) for image in pool.map(found.images.open, range(len(found.images)))]


# Archives

TARS = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def pack(path: Path, files: Mapping[str, bytes], *extra: tarfile.TarInfo | zipfile.ZipInfo) -> Path:
    """Write an archive of the kind that its name says.  extra: entries without content."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in files.items():
                zipped.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
            for entry in extra:
                zipped.writestr(entry, b"../outside")
        return path
    with tarfile.open(path, TARS["".join(path.suffixes)], format=tarfile.GNU_FORMAT) as tar:
        for entry in extra:
            tar.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()
    }


@pytest.mark.parametrize("suffix", [".zip", *TARS])
def test_an_archive_gives_its_files_whatever_its_name_is(tmp_path, suffix):
    images = {
        f"set/{label}/{i}.png": noise(500, seed=i).tobytes() for i, label in enumerate(["cat", "Hund ä"])
    }
    junk = {"__MACOSX/set/cat/._0.png": b"1", "set/.DS_Store": b"2", "set/cat/Thumbs.db": b"3"}
    archive = pack(tmp_path / f"set{suffix}", {**images, "./set/loose.png": b"4", **junk})
    nameless = archive.rename(tmp_path / "download")
    assert is_archive(nameless)
    assert unpack(nameless, tmp_path / "into") == []
    assert tree(tmp_path / "into") == {**images, "set/loose.png": b"4"}


def test_what_is_no_archive(tmp_path):
    (tmp_path / "text").write_text("no archive")
    np.savez(tmp_path / "arrays.npz", images=noise(2, 16, 16))
    assert not any(map(is_archive, [tmp_path, tmp_path / "text", tmp_path / "arrays.npz", tmp_path / "none"]))
    (tmp_path / "late.tar").write_bytes(b"")
    assert is_archive(tmp_path / "late.tar")  # so that `unpack` says what is wrong with it


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "{}/evil", "C:/evil", "a\\..\\evil"])
def test_names_that_lead_out_of_the_folder_are_refused_before_anything_is_written(tmp_path, name, suffix):
    name = name.format(tmp_path)
    archive = pack(tmp_path / f"set{suffix}", {"good.png": b"1", name: b"2"})
    with pytest.raises(UserError, match=r"(?s)evil.*pack it again"):
        unpack(archive, tmp_path / "deep" / "into")
    assert list(tree(tmp_path)) == [archive.name]


def test_links_and_devices_are_passed_over_and_counted(tmp_path):
    kinds = {b"1": "hard", b"2": "link", b"3": "character", b"4": "block", b"6": "fifo"}
    entries = [tarfile.TarInfo(name) for name in kinds.values()]
    for entry, kind in zip(entries, kinds, strict=True):
        entry.type, entry.linkname = kind, "../outside"
    tar = pack(tmp_path / "set.tar", {"link/evil.png": b"1"}, *entries)
    linked = zipfile.ZipInfo("link")
    linked.external_attr = (stat.S_IFLNK | 0o777) << 16
    zipped = pack(tmp_path / "set.zip", {"link/evil.png": b"1"}, linked)
    (tmp_path / "outside").mkdir()
    assert unpack(tar, tmp_path / "a") == ["warning: 5 links or devices in set.tar are passed over"]
    assert unpack(zipped, tmp_path / "b") == ["warning: 1 links or devices in set.zip are passed over"]
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == {"link/evil.png": b"1"}
    assert not any((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("second", ["set/1.png", "./set//1.png", "set", "set/1.png/2.png"])
def test_no_file_overwrites_another(tmp_path, second):
    archive = pack(tmp_path / "set.tar", {"set/1.png": b"1"})
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo(second))
    with pytest.raises(UserError, match=r"holds .* twice.*rename one"):
        unpack(archive, tmp_path / "into")
    assert tree(tmp_path / "into") == {"set/1.png": b"1"}


@pytest.mark.parametrize("suffix", [".zip", ".tar.xz"])
def test_a_bomb_is_refused_before_the_disk_fills(tmp_path, suffix, monkeypatch):
    archive = pack(tmp_path / f"set{suffix}", {f"{i}.png": bytes(10**6) for i in range(4)})
    assert archive.stat().st_size < 10_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 10**6))
    with pytest.raises(UserError, match=r"takes 0.003 GB or more, .* room for 0.003 GB: free some space"):
        unpack(archive, tmp_path / "into")
    assert tree(tmp_path / "into") == {}


def test_a_negative_size_does_not_send_tarfile_round_in_circles(tmp_path):
    first, second = tarfile.TarInfo("1.png"), tarfile.TarInfo("2.png")
    second.size = -512
    with pytest.raises(UserError, match=r"cannot be unpacked"):
        unpack(pack(tmp_path / "set.tar", {}, first, second), tmp_path / "into")


def test_a_bomb_whose_header_lies_writes_no_more_than_the_header_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("1.png", bytes(10**7))
        zipped.infolist()[0].file_size = 10  # goes into the directory at the end
    with pytest.raises(UserError, match=r"set.zip cannot be unpacked"):
        unpack(tmp_path / "set.zip", tmp_path / "into")
    assert len(tree(tmp_path / "into").get("1.png", b"")) <= 10


@pytest.mark.parametrize("suffix", [".zip", *TARS])
def test_a_truncated_archive_is_refused(tmp_path, suffix):
    archive = pack(tmp_path / f"set{suffix}", {f"{i}.png": noise(3000, seed=i).tobytes() for i in range(9)})
    content = archive.read_bytes()
    for length in (0, 100, len(content) // 2, 4 * (512 + 3072) if suffix == ".tar" else len(content) - 30):
        archive.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cannot be unpacked .*get it again.*data.path"):
            unpack(archive, tmp_path / "into")
        shutil.rmtree(tmp_path / "into")


def test_a_damaged_or_encrypted_archive_is_refused(tmp_path):
    files = {f"{i}.png": noise(3000, seed=i).tobytes() for i in range(3)}
    tar, zipped = pack(tmp_path / "set.tar", files), pack(tmp_path / "set.zip", files)
    for archive, place in ((tar, 512 + 3072 + 10), (zipped, 1000)):  # a header in the middle; pixels
        content = bytearray(archive.read_bytes())
        content[place] ^= 255
        archive.write_bytes(content)
        with pytest.raises(UserError, match="cannot be unpacked"):
            unpack(archive, tmp_path / "into")
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as secret:
        secret.writestr("1.png", b"1")
        secret.infolist()[0].flag_bits |= 1
    with pytest.raises(UserError, match=r"encrypted.*unpack it yourself"):
        unpack(tmp_path / "secret.zip", tmp_path / "other")


# Arrays


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((5, 17, 16), "L"),
        ((5, 17, 16, 1), "L"),
        ((5, 17, 16, 3), "RGB"),
        ((5, 17, 16, 4), "RGBA"),
        ((5, 1, 17, 16), "L"),
        ((5, 3, 17, 16), "RGB"),
    ],
)
def test_layouts_of_arrays(tmp_path, shape, mode, order):
    array = noise(*shape)
    np.save(tmp_path / "any.npy", np.asarray(array, order=order))
    found = find_arrays(tmp_path / "any.npy")
    channels_last = array.transpose(0, 2, 3, 1) if shape[1] in (1, 3) else array
    expected = channels_last.reshape(5, 17, 16, -1)
    assert found.labels is None and found.splits is None and found.classes == ()
    for image, pixels in zip(opened(found), expected, strict=True):
        np.testing.assert_array_equal(image.reshape(17, 16, -1), pixels)
    assert found.images.open(0).mode == mode and found.images.open(0).size == (16, 17)
    assert "any.npy, image 4" in found.images.name(4)


A, B, C = noise(2, 16, 16), noise(1, 16, 16, seed=1), noise(1, 16, 16, seed=2)
TRAIN_TEST = ["train", "train", "test"]
WAYS = {
    "plain": ({"images": A}, None, None, ()),
    "arr_0": ({"arr_0": A}, None, None, ()),
    "numbers": ({"x": A, "y": np.array([10, 9])}, None, [1, 0], ("9", "10")),
    "text": ({"X": A, "y": np.array(["b", "a"])}, None, [1, 0], ("a", "b")),
    "classes": (
        {"data": A, "targets": np.array([[2], [0]]), "classes": np.array(["c", "a", "b"])},
        *(None, [2, 0], ("c", "a", "b")),
    ),
    "keras": (
        {"x_test": B, "x_train": A, "y_train": np.array([7, -1]), "y_test": np.array([7], np.uint8)},
        *(TRAIN_TEST, [1, 0, 1], ("-1", "7")),
    ),
    "medmnist": (
        {f"{split}_images": images for split, images in (("train", A), ("val", B), ("test", C))}
        | {
            f"{split}_labels": np.full((n, 1), n, np.uint8)
            for split, n in (("train", 2), ("val", 1), ("test", 1))
        },
        *(["train", "train", "validation", "test"], [1, 1, 0, 0], ("1", "2")),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_keys_of_arrays(tmp_path, way, save):
    arrays, splits, labels, classes = WAYS[way]
    save(tmp_path / "set.npz", **arrays)
    found = find_arrays(tmp_path / "set.npz")
    assert (found.splits, found.labels, found.classes, found.notes) == (splits, labels, classes, [])
    images = [A, B, C] if way == "medmnist" else [A, B] if splits else [A]
    np.testing.assert_array_equal(np.stack(opened(found)), np.concatenate(images))


def test_a_folder_of_arrays(tmp_path):
    assert not is_arrays(tmp_path)
    np.save(tmp_path / "images.npy", A)
    assert is_arrays(tmp_path) and find_arrays(tmp_path).labels is None
    np.save(tmp_path / "labels.npy", np.array(["dog", "cat"]))
    found = find_arrays(tmp_path)
    assert (found.labels, found.classes) == ([1, 0], ("cat", "dog"))
    np.testing.assert_array_equal(np.stack(opened(found)), A)


def test_arrays_that_are_not_used_are_named(tmp_path):
    np.savez(tmp_path / "set.npz", A, np.array([1, 2]))
    assert find_arrays(tmp_path / "set.npz").notes == ["arrays that are not used: arr_1"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": A / 255}, r"images in .*float64: write \(images \* 255\).*\(\(images \+ 1\) \* 127.5\)"),
        ({"images": A.astype(np.uint16)}, r"uint16.*// 257"),
        ({"images": A > 1}, r"bool: write \(images \* 255\)"),
        ({"images": np.array(["1.png", "2.png"])}, "must be uint8.*<U5"),
        ({"images": noise(4, 3, 3, 3)}, r"\(4, 3, 3, 3\) can be read in two ways.*transpose"),
        ({"images": noise(28, 28, 3)}, r"\(28, 28, 3\) can be read in two ways"),
        ({"images": noise(9, 784)}, r"\(9, 784\) is none of these.*reshape"),
        ({"images": noise(9, 4, 28, 28)}, r"\(9, 4, 28, 28\) is none of these"),
        ({"images": noise(0, 28, 28)}, r"\(0, 28, 28\)"),
        ({"x": A, "data": B}, r"x \(2, 16, 16\) uint8, data \(1, 16, 16\) uint8: rename"),
        ({"x": A, "y": np.arange(2), "labels": np.arange(2)}, "y .*labels .*rename them, or leave some out"),
        ({"x": A, "x_train": A}, "each once"),
        ({"x_train": A, "train_images": A}, "each once"),
        ({"x_val": A, "x_valid": A, "x_train": A}, "each once"),
        ({"x_test": A}, "x_train.*Its arrays are x_test"),
        ({"x_train": A, "y_train": np.arange(2), "x_test": B}, "labels for all images or none"),
        ({"pixels": A}, r"must have the images as `images`.*pixels \(2, 16, 16\) uint8"),
        ({}, "Its arrays are none"),
        ({"x": A, "y": np.eye(2)}, r"y in .*one for each of the 2 images.*float64 \(2, 2\).*argmax"),
        ({"x": A, "y": np.eye(2, dtype=np.int64)}, r"int64 \(2, 2\).*argmax"),
        ({"x": A, "y": np.array([0.0, 1.0])}, r"float64 \(2,\).*astype\('int64'\)"),
        ({"x": A, "y": np.arange(3)}, r"2 images.*int64 \(3,\)"),
        ({"x": A, "y": np.array(["a", 1], object)}, r"astype\(str\).*pickle.* not loaded"),
        ({"x": A, "y": np.arange(2), "classes": np.array(["a"])}, "classes in .*indices from 0.* 0 to 1"),
        ({"x": A, "y": np.arange(2), "classes": np.array(["a", "a"])}, "all different"),
        (
            {"x_train": A, "y_train": np.array(["1", "2"]), "x_test": B, "y_test": np.array([1])},
            "integers in one split and text in another",
        ),
    ],
)
def test_arrays_that_cannot_be_told_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=f"(?s){words}"):
        find_arrays(tmp_path / "set.npz")


@pytest.mark.parametrize("name", ["set.npy", "set.npz"])
def test_damaged_arrays_are_refused(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        np.save(file, A) if name == "set.npy" else np.savez_compressed(file, images=A)
    content = (tmp_path / name).read_bytes()
    flipped = content[:150] + bytes([content[150] ^ 255]) + content[151:]
    for damaged in (b"", b"text", content[:300], *([flipped] if name == "set.npz" else [])):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read .*write it again"):
            find_arrays(tmp_path / name)


# Parquet

CLASSES = ["cat", "dog", "emu"]
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
# As the package datasets 5.2.0 writes it.
HUGGING_FACE = (
    '{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "emu"], "_type":'
    ' "ClassLabel"}}}}'
)
PIXELS = noise(10, 6, 7, 3)
LABELS = [2, 1, 1, 0, 2, 0, 1, 2, 0, 1]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = [png(pixels) for pixels in PIXELS]
STRUCTS = [{"bytes": content, "path": None} for content in PNGS]


def write(path: Path, columns: Mapping[str, Any], metadata: str | None = None, **options: Any) -> Path:
    """columns: values, or arrays of pyarrow; the column `image` is a struct as Hugging Face writes it."""
    arrays = {
        name: pa.array(values, IMAGE) if name == "image" and isinstance(values, list) else pa.array(values)
        for name, values in columns.items()
    }
    table = pa.table(arrays).replace_schema_metadata({"huggingface": metadata} if metadata else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_part(path: Path, part: slice, **options: Any) -> Path:
    return write(path, {"image": STRUCTS[part], "label": LABELS[part]}, HUGGING_FACE, **options)


def test_a_set_as_hugging_face_hosts_it(tmp_path):
    write_part(tmp_path / "data/train-00000-of-00002.parquet", slice(0, 5), row_group_size=2)
    write_part(tmp_path / "data/train-00001-of-00002.parquet", slice(5, 7))
    write_part(tmp_path / "data/validation-00000-of-00001.parquet", slice(7, 8))
    write_part(tmp_path / "data/test-00000-of-00001.parquet", slice(8, 10), row_group_size=1)
    (tmp_path / "README.md").write_text("---\n")
    write_part(tmp_path / ".cache/train-00000-of-00002.parquet", slice(0, 5))
    assert is_parquet(tmp_path) and not is_parquet(tmp_path / "README.md")
    found = find_parquet(tmp_path)
    order = [8, 9, *range(7), 7]
    np.testing.assert_array_equal(np.stack(opened(found)), PIXELS[order])
    assert found.labels == [LABELS[i] for i in order] and found.classes == tuple(CLASSES)
    assert found.splits == ["test"] * 2 + ["train"] * 7 + ["validation"] and found.notes == []
    assert found.images.name(5) == f"{tmp_path}/data/train-00000-of-00002.parquet, row 3"


@pytest.mark.parametrize(
    ("columns", "labels", "classes", "note"),
    [
        ({"image": STRUCTS, "label": LABELS}, LABELS, ("0", "1", "2"), None),
        (
            {"image": STRUCTS, "label": [10 - n for n in LABELS]},
            [2 - n for n in LABELS],
            ("8", "9", "10"),
            None,
        ),
        ({"img": PNGS, "class": [CLASSES[n] for n in LABELS]}, LABELS, tuple(CLASSES), None),
        (
            {"any": PNGS, "label": pa.array([CLASSES[n] for n in LABELS]).dictionary_encode()},
            *(LABELS, tuple(CLASSES), None),
        ),
        ({"file_name": [f"a/{i}.png" for i in range(10)], "label": LABELS}, LABELS, ("0", "1", "2"), None),
        (
            {"image": STRUCTS, "mask": PNGS, "target": LABELS, "label": LABELS},
            LABELS,
            ("0", "1", "2"),
            "mask, target",
        ),
        ({"image": STRUCTS, "text": ["a"] * 10, "id": LABELS}, None, (), "id, text"),
    ],
)
def test_columns_are_told_by_type_and_name(tmp_path, columns, labels, classes, note):
    for i, content in enumerate(PNGS):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / f"a/{i}.png").write_bytes(content)
    found = find_parquet(write(tmp_path / "test.parquet", columns))
    assert (found.labels, found.classes, found.splits) == (labels, classes, None)
    assert found.notes == ([f"columns that are not used: {note}"] if note else [])
    np.testing.assert_array_equal(np.stack(opened(found)), PIXELS)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["training.parquet", "dev.parquet", "testing.parquet"], ["validation", "test", "train"]),
        (["train/0.parquet", "valid/0.parquet", "test/0.parquet"], ["test", "train", "validation"]),
        (["my_test-set/train-0.parquet", "my_test-set/val_1.parquet"], ["train", "validation"]),
        (["contest.parquet", "trained.parquet"], None),
    ],
)
def test_splits_by_the_names_of_files_and_folders(tmp_path, names, splits):
    for name in names:
        write_part(tmp_path / name, slice(0, 1))
    assert find_parquet(tmp_path).splits == splits


def test_files_that_are_missing_are_named(tmp_path):
    write_part(tmp_path / "train-00001-of-00003-0123456789abcdef.parquet", slice(0, 1))
    assert find_parquet(tmp_path).notes == ["warning: of 3 numbered files train, only 1 are in data.path"]


def refused(path: Path, words: str) -> None:
    with pytest.raises(UserError, match=f"(?s){words}"):
        find_parquet(path)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"left": PNGS, "right": PNGS}, "2 columns.* left, right: rename .* to image, or drop"),
        ({"image": STRUCTS, "labels": LABELS, "class": LABELS}, "labels, class: rename .* to label"),
        ({"pixels": [[1, 2]], "label": [1]}, "pixels: list<.*label: int64.*feature Image"),
        ({"image": STRUCTS[:1], "label": [[1]]}, "column label must be integers or text.*list<.*drop it"),
        ({"image": STRUCTS[:1], "label": [0.5]}, "label must be integers or text.* is double"),
        ({"image": STRUCTS[:2], "label": ["a", None]}, "1 of 2 images in .* have no label.*drop the column"),
        ({"image": pa.array([], IMAGE)}, "no images"),
    ],
)
def test_columns_that_cannot_be_told_are_refused(tmp_path, columns, words):
    refused(write(tmp_path / "set.parquet", columns), words)


def test_two_columns_of_labels_with_names_are_refused(tmp_path):
    about = HUGGING_FACE.replace('"label": {', '"fine": {"names": ["a"], "_type": "ClassLabel"}, "coarse": {')
    columns = {"image": STRUCTS, "fine": [0] * 10, "coarse": LABELS}
    refused(write(tmp_path / "set.parquet", columns, about), "fine, coarse: rename")
    found = find_parquet(write(tmp_path / "set.parquet", {**columns, "label": LABELS}, about))
    assert found.classes == ("0", "1", "2")


def test_the_column_that_hugging_face_calls_images_is_taken(tmp_path):
    about = HUGGING_FACE.replace('"image": {', '"sound": {"_type": "Audio"}, "picture": {')
    columns = {"sound": PNGS[::-1], "picture": PNGS, "label": LABELS}
    found = find_parquet(write(tmp_path / "set.parquet", columns, about))
    np.testing.assert_array_equal(np.stack(opened(found)), PIXELS)
    assert found.classes == tuple(CLASSES)


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    write_part(tmp_path / "train.parquet", slice(0, 5))
    write(tmp_path / "test.parquet", {"image": STRUCTS[:1], "label": [-1]}, HUGGING_FACE)
    refused(tmp_path, "1 of 1 images in .*test.parquet have no label: keep the file out")
    write(tmp_path / "test.parquet", {"image": STRUCTS[:1], "label": [1]}, HUGGING_FACE.replace("emu", "elk"))
    refused(tmp_path, r"train.parquet and .*test.parquet differ \(classes\)")
    write(tmp_path / "test.parquet", {"image": STRUCTS[:1]})
    refused(tmp_path, r"differ \(label, kind, classes\)")
    write_part(tmp_path / "test.parquet", slice(0, 1))
    write_part(tmp_path / "extra.parquet", slice(0, 1))
    refused(tmp_path, "extra.parquet: unknown.*test.parquet: test")
    (tmp_path / "extra.parquet").unlink()
    (tmp_path / "train.parquet").unlink()
    refused(tmp_path, "must be of the split train and others")


def test_damaged_files_are_refused(tmp_path):
    path = write_part(tmp_path / "train.parquet", slice(0, 10))
    content = path.read_bytes()
    for damaged in (b"", b"text" * 10, content[: len(content) // 2]):
        path.write_bytes(damaged)
        refused(path, "train.parquet is no parquet file, or damaged .*get it again")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(path, "git lfs pull")


def test_a_row_without_an_image_is_named_and_hurts_no_other(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(PNGS[0])
    rows = [
        *(STRUCTS[0], None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}),
        *({"bytes": None, "path": "../secret.png"}, {"bytes": None, "path": str(outside)}),
        *({"bytes": b"text", "path": None}, {"bytes": None, "path": "none.png"}, STRUCTS[9]),
    ]
    images = find_parquet(write(tmp_path / "in/set.parquet", {"image": rows})).images
    for index in (1, 2, 3):
        with pytest.raises(ValueError, match="the row holds no image"):
            images.open(index)
    for index in (4, 5):
        with pytest.raises(ValueError, match=r"only the path of an image, .*secret.png"):
            images.open(index)
    with pytest.raises(UnidentifiedImageError):
        images.open(6)
    with pytest.raises(FileNotFoundError):
        images.open(7)
    assert images.name(7).endswith("set.parquet, row 7")
    for index, pixels in ((0, PIXELS[0]), (8, PIXELS[9])):
        np.testing.assert_array_equal(np.asarray(images.open(index)), pixels)


def test_a_damaged_row_group_hurts_no_other(tmp_path):
    path = write_part(tmp_path / "set.parquet", slice(0, 10), row_group_size=5, compression="snappy")
    place = pq.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 100] = bytes(100)
    path.write_bytes(content)
    images = find_parquet(path).images
    for index in range(5):
        with pytest.raises((OSError, ValueError)):
            images.open(index)
    np.testing.assert_array_equal(np.asarray(images.open(7)), PIXELS[7])


def test_images_in_any_order_more_than_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "WAITING", 200)  # bytes, about one image
    monkeypatch.setattr(parquet, "ROWS", 2)
    write_part(tmp_path / "a.parquet", slice(0, 6), row_group_size=4)
    write_part(tmp_path / "b.parquet", slice(6, 10))
    images = find_parquet(tmp_path).images
    order = [*range(10), *range(9, -1, -1), *random.Random(0).choices(range(10), k=50)]
    with ThreadPoolExecutor(8) as pool:
        for index, image in zip(order, pool.map(images.open, order), strict=True):
            np.testing.assert_array_equal(np.asarray(image), PIXELS[index])
    for index in [1, 3, 5, 5, 5, 7, 9]:
        images.open(index)
        assert images.size == sum(map(len, images.waiting.values())) <= 200 + 2 * max(map(len, PNGS))


def test_a_file_of_one_row_group_takes_constant_memory(tmp_path):
    content = [png(noise(60, 60, 3, seed=seed)) for seed in range(600)]
    options = {"row_group_size": 600, "write_batch_size": 8, "use_dictionary": False}
    path = write(
        tmp_path / "set.parquet", {"image": [{"bytes": each, "path": None} for each in content]}, **options
    )
    assert pq.ParquetFile(path).num_row_groups == 1 and path.stat().st_size > 6_000_000
    images = find_parquet(path).images
    before = pa.total_allocated_bytes()
    for index in range(1, 600):
        images.open(index)
        assert pa.total_allocated_bytes() - before < 4_000_000
    images.open(0)  # a thread that comes late does not make the others read again
    assert images.next == 600
