"""Folders of your own images: what is found, how it is decoded, where it goes, and errors."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rediffuse.images.image_set import ImageSet, load_split, save_images
from rediffuse.params import Data
from rediffuse.runtime.errors import UserError
from rediffuse.sources import folder as module
from rediffuse.sources.folder import decode, find_images, write_folder
from rediffuse.sources.splits import split_of

SPLITS = ("train", "validation", "test")


def picture(seed: int, width: int = 20, height: int = 20, mode: str = "RGB") -> Image.Image:
    """Smooth, so that a lossy format keeps it nearly."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (4, 4, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def fill(folder: Path, n: int, *, suffix: str = ".png", first: int = 0, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        picture(i, **more).save(folder / f"{i:04}{suffix}")
    return folder


def write(source: Path, target: Path, **changes: Any) -> tuple[dict[str, ImageSet], dict[str, Any]]:
    shares = {"validation_share": 0.2, "test_share": 0.3}
    settings = {"path": str(source), "size": 16, "channels": "auto"} | shares | changes
    data = Data(set="folder", validation=1, split_seed=1, **settings)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    classes, about = write_folder(data, target)
    return {name: load_split(target, name, classes) for name in SPLITS}, about


def where(splits: dict[str, ImageSet]) -> dict[bytes, str]:
    """The split of each image."""
    return {image.tobytes(): name for name, split in splits.items() for image in split.images}


# What is found


def test_sub_folders_are_classes_and_a_flat_folder_has_none(tmp_path):
    label_of = {}
    for i, name in enumerate(["zebra", "Ant", "bee"]):
        folder = fill(tmp_path / "in" / name / "deeper", 20, first=100 * i)
        for path in folder.iterdir():
            label_of[decode(path, (3, 16, 16)).tobytes()] = name
    splits, _ = write(tmp_path / "in", tmp_path / "out")
    assert splits["train"].classes == ("Ant", "bee", "zebra")
    for split in splits.values():
        for image, label in zip(split.images, split.labels, strict=True):
            assert label_of[image.tobytes()] == split.classes[label]
    flat, _ = write(fill(tmp_path / "flat", 30), tmp_path / "out")
    assert flat["train"].labels is None and flat["train"].classes == () and sum(map(len, flat.values())) == 30


def test_hidden_and_other_files_are_skipped_and_links_followed(tmp_path):
    folder = fill(tmp_path / "in", 2)
    (folder / "notes.txt").write_text("no image")
    picture(1).save(folder / ".hidden.png")
    fill(folder / ".thumbnails", 2)
    (folder / "link.png").symlink_to(folder / "0000.png")
    assert [Path(path).name for path in find_images(folder)[0]] == ["0000.png", "0001.png", "link.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp", ".tif", ".tiff", ".gif"])
def test_formats(tmp_path, suffix):
    [path] = find_images(fill(tmp_path / "in", 1, suffix=suffix))[0]
    expected = np.asarray(picture(0)).transpose(2, 0, 1).astype(int)
    tolerance = {".jpg": 12, ".JPEG": 12, ".webp": 20, ".gif": 24}.get(suffix, 0)  # GIF has 256 colours
    assert abs(decode(path, (3, 20, 20)).astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "data.path .* must be a folder of images"),
        (lambda folder: folder.mkdir(), "data.path .* holds no images.*dvc add"),
        (lambda folder: (fill(folder, 2), fill(folder / "a", 3)), "2 images beside sub-folders with 3 more"),
    ],
    ids=["missing", "empty", "mixed"],
)
def test_a_folder_that_cannot_be_meant_is_refused(tmp_path, make, words):
    make(tmp_path / "in")
    with pytest.raises(UserError, match=words):
        find_images(tmp_path / "in")


# How it is decoded


@pytest.mark.parametrize("turn", [None, Image.Transpose.ROTATE_90])
def test_the_largest_square_around_the_centre_is_resized(tmp_path, turn):
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))  # the square in the middle
    (image if turn is None else image.transpose(turn)).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", (3, 16, 16)) == np.array([0, 0, 255]).reshape(3, 1, 1)).all()


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (24, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode(tmp_path / "a.png", (3, 24, 24)), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_holds_for_pixels_and_survey(tmp_path, orientation):
    upright, turn = picture(3, 32, 24), Image.Transpose
    stored = [
        *(None, None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM),
        *(turn.TRANSPOSE, turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270),
    ][orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if stored is None else upright.transpose(stored)).save(tmp_path / "a.png", exif=exif)
    assert module.survey([str(tmp_path / "a.png")], 0, "auto") == (3, 24, 32)
    expected = np.asarray(upright).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(tmp_path / "a.png", (3, 24, 32)), expected)


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("clear", "palette"):
        assert (decode(tmp_path / f"{name}.png", (3, 16, 16)) == 255).all()


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(decode(tmp_path / "a.png", (1, 16, 16))[0], values / 257, atol=0.5)


def test_grey_files_stay_grey_unless_channels_says_otherwise(tmp_path):
    grey = fill(tmp_path / "grey", 30, mode="L")
    assert write(grey, tmp_path / "out")[0]["train"].shape == (1, 16, 16)
    assert write(grey, tmp_path / "out", channels=3)[0]["train"].shape == (3, 16, 16)
    fill(grey, 1, first=50)
    assert write(grey, tmp_path / "out")[0]["train"].shape == (3, 16, 16)
    assert write(grey, tmp_path / "out", channels=1)[0]["train"].shape == (1, 16, 16)


def test_images_of_one_size_can_keep_it(tmp_path):
    folder = fill(tmp_path / "in", 30, width=28, height=24)
    splits, about = write(folder, tmp_path / "out", size=0)
    assert splits["train"].shape == (3, 24, 28) and about["resize"] == "none"
    fill(folder, 1, first=40, width=30)
    with pytest.raises(UserError, match=r"28x24 to 30x20: set data\.size"):
        write(folder, tmp_path / "out", size=0)
    with pytest.raises(UserError, match=r"300x200, and must have 16 to 128 pixels a side: set data\.size"):
        write(fill(tmp_path / "large", 2, width=300, height=200), tmp_path / "out", size=0)


def test_damaged_files_are_counted_and_named(tmp_path):
    folder = fill(tmp_path / "in", 3)
    whole = (folder / "0001.png").read_bytes()
    (folder / "0001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"1 of 3 images.*\n.*0001.png"):
        write(folder, tmp_path / "out")
    for i in range(8):
        (folder / f"bad{i}.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"9 of 11 images.*(\n  .*(0001|bad\d).png.*){5}\n  and 4 more"):
        write(folder, tmp_path / "out")


# Where it goes


def test_the_files_are_those_of_a_set_in_memory(tmp_path):
    for i, name in enumerate("ab"):
        fill(tmp_path / "in" / name, 20, first=100 * i)
    splits, _ = write(tmp_path / "in", tmp_path / "out")
    save_images(tmp_path / "saved", splits, {"classes": ["a", "b"]})
    for name in SPLITS:
        for file in ("images.npy", "labels.npy"):
            path = Path(name, file)
            assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "saved" / path).read_bytes()


def test_an_image_that_is_added_moves_no_other(tmp_path):
    folder = fill(tmp_path / "in", 60)
    before = where(write(folder, tmp_path / "out")[0])
    fill(folder, 5, first=100)
    (folder / "0007.png").rename(folder / "zzz.png")
    (folder / "0008.png").unlink()
    after = where(write(folder, tmp_path / "out")[0])
    assert len(before) == 60 and len(after) == 64
    assert all(before[image] == split for image, split in after.items() if image in before)


def test_equal_images_are_never_in_two_splits(tmp_path):
    folder = fill(tmp_path / "in", 40)
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / f"copy-{path.name}")
    splits, _ = write(folder, tmp_path / "out")
    assert sum(map(len, splits.values())) == 80
    assert len({(image.tobytes(), name) for name, split in splits.items() for image in split.images}) == 40


def test_shares_are_kept_and_another_seed_divides_anew():
    n, random = 20_000, np.random.RandomState(0)
    images = random.randint(0, 256, (n, 1, 4, 4)).astype(np.uint8)
    shares = {"validation": 0.1, "test": 0.25}
    found = [[split_of(image, seed=seed, **shares) for image in images] for seed in (1, 2)]
    for name, share in [("train", 0.65), *shares.items()]:
        assert abs(found[0].count(name) / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    both = sum(a == b == "test" for a, b in zip(*found, strict=True))
    assert abs(both / n - 0.0625) < 4 * (0.0625 * 0.9375 / n) ** 0.5  # independent


def test_an_empty_split_is_refused(tmp_path):
    words = r"0 in validation, 2 in test; .*at least.* data\.split_seed, raise data\.validation_share"
    with pytest.raises(UserError, match=words):
        write(fill(tmp_path / "in", 10), tmp_path / "out", validation_share=1e-9)


def test_few_images_and_large_splits_are_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MANY", 5)
    write(fill(tmp_path / "in", 30), tmp_path / "out")
    warnings = capsys.readouterr().err
    assert "warning: 30 images are few" in warnings and "lower data.test_share" in warnings


def test_the_same_folder_gives_the_same_bytes_and_no_path(tmp_path):
    folder = fill(tmp_path / "in", 40, suffix=".jpg", width=50)
    _, about = write(folder, tmp_path / "one")
    _, again = write(folder.rename(tmp_path / "elsewhere"), tmp_path / "two")
    assert about == again and str(tmp_path) not in json.dumps(about)
    for name in SPLITS:
        one, two = (tmp_path / run / name / "images.npy" for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch):
    """300 MB of pixels, from one file under many names."""
    fill(tmp_path / "in", 1)
    numbers = iter(range(10**6))

    def made(path, shape):
        pixels = np.zeros(shape, np.uint8)
        pixels[0, 0, :3] = np.frombuffer(next(numbers).to_bytes(3, "big"), np.uint8)
        return pixels

    found = [str(tmp_path / "in/0000.png")] * 6000, None, ()
    monkeypatch.setattr(module, "decode", made)
    monkeypatch.setattr(module, "find_images", lambda folder: found)
    tracemalloc.start()
    splits, _ = write(tmp_path / "in", tmp_path / "out", size=128, channels=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, splits.values())) == 6000 and peak < 60 * 2**20


def test_a_path_takes_little_memory(tmp_path):
    """10 million images of 150 bytes each are 1.5 GB."""
    for i in range(4000):
        place = tmp_path / f"class {i % 10}" / f"{i:08}.png"
        place.parent.mkdir(exist_ok=True)
        place.touch()
    tracemalloc.start()
    paths, _, classes = find_images(tmp_path)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(paths) == 4000 and len(classes) == 10 and taken / 4000 < 150 + len(str(tmp_path))
