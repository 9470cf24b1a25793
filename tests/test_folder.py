"""Folders of your own images: what is found, how it is decoded, where it goes, and errors."""

from __future__ import annotations

import json
import os
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


def damaged(folder: Path, n: int) -> None:
    """Add n images that are cut off, and one that is not."""
    whole = (fill(folder, n + 1) / "0000.png").read_bytes()
    for i in range(n):
        (folder / f"{i:04}.png").write_bytes(whole[: len(whole) // 2])


MISTAKES = {
    "missing": (lambda folder: None, {}, "data.path .* must be a folder of images"),
    "empty": (lambda folder: folder.mkdir(), {}, "data.path .* holds no images.*dvc add"),
    "mixed": (lambda folder: (fill(folder, 2), fill(folder / "a", 3)), {}, "2 images beside .* with 3 more"),
    "name": (lambda folder: fill(folder / os.fsdecode(b"caf\xe9"), 2), {}, "data.path .*UTF-8: rename it"),
    "sizes": (
        lambda folder: (fill(folder, 2, width=28), fill(folder, 1, first=2, width=30)),
        {"size": 0},
        r"28x20 to 30x20: set data\.size",
    ),
    "large": (
        lambda folder: fill(folder, 2, width=300, height=200),
        {"size": 0},
        r"300x200, and must have 16 to 128 pixels a side: set data\.size",
    ),
    "damaged": (
        lambda folder: damaged(folder, 9),
        {},
        r"9 of 10 images in data\.path.*(\n  .*000\d.png.*){5}\n  and 4 more",
    ),
    "split": (
        lambda folder: fill(folder, 10),
        {"validation_share": 1e-9},
        r"0 in validation, 2 in test; .* data\.split_seed, raise data\.validation_share",
    ),
}


@pytest.mark.parametrize(("make", "changes", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, make, changes, words):
    make(tmp_path / "in")
    with pytest.raises(UserError, match=words):
        write(tmp_path / "in", tmp_path / "out", **changes)


# How it is decoded


def test_the_largest_square_around_the_centre_is_resized(tmp_path):
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))  # the square in the middle
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        turned.save(tmp_path / "a.png")
        assert (decode(tmp_path / "a.png", (3, 16, 16)) == np.array([0, 0, 255]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize(("code", "turn"), [(2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (6, "ROTATE_90")])
def test_the_exif_orientation_holds_for_pixels_and_survey(tmp_path, code, turn):
    upright, exif = picture(3, 32, 24), Image.Exif()
    exif[0x0112] = code
    upright.transpose(Image.Transpose[turn]).save(tmp_path / "a.png", exif=exif)
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


# Where it goes


def test_the_split_of_an_image_depends_only_on_its_pixels(tmp_path):
    """Images that are added, renamed or removed move no other, and a copy is in the same split."""

    def splits() -> set[tuple[bytes, str]]:
        found, _ = write(folder, tmp_path / "out")
        assert sum(map(len, found.values())) == len([*folder.iterdir()])
        return {(image.tobytes(), name) for name, split in found.items() for image in split.images}

    folder = fill(tmp_path / "in", 60)
    before = splits()
    fill(folder, 5, first=100)
    (folder / "0007.png").rename(folder / "zzz.png")
    (folder / "0008.png").unlink()
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / f"copy-{path.name}")
    after = splits()
    assert len(before) == 60 and len(after) == 64 and len(before - after) == 1


def test_shares_are_kept_and_another_seed_divides_anew():
    n, random = 20_000, np.random.RandomState(0)
    images = random.randint(0, 256, (n, 1, 4, 4)).astype(np.uint8)
    shares = {"validation": 0.1, "test": 0.25}
    found = [[split_of(image, seed=seed, **shares) for image in images] for seed in (1, 2)]
    for name, share in [("train", 0.65), *shares.items()]:
        assert abs(found[0].count(name) / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    both = sum(a == b == "test" for a, b in zip(*found, strict=True))
    assert abs(both / n - 0.0625) < 4 * (0.0625 * 0.9375 / n) ** 0.5  # independent


def test_the_files_are_those_of_a_set_in_memory_wherever_the_folder_is(tmp_path, capsys):
    for i, name in enumerate("ab"):
        fill(tmp_path / "in" / name, 20, first=100 * i, suffix=".jpg", width=50)
    splits, about = write(tmp_path / "in", tmp_path / "out")
    assert "warning: 40 images are few" in capsys.readouterr().err
    save_images(tmp_path / "saved", splits, {"classes": ["a", "b"]})
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    _, again = write(tmp_path / "elsewhere", tmp_path / "again")
    assert about == again and str(tmp_path) not in json.dumps(about)
    for path in (Path(name, file) for name in SPLITS for file in ("images.npy", "labels.npy")):
        saved = (tmp_path / "saved" / path).read_bytes()
        assert saved == (tmp_path / "out" / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


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
