"""Folders of one's own images: what is found, how it is decoded, where it goes, and what is said of what is wrong."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rediffuse.images.image_set import ImageSet, load_images, load_split, save_images
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
    settings: dict[str, Any] = {"size": 16, "channels": "auto", "validation": 0.2, "test": 0.3, "seed": 1}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    classes, about = write_folder(source, target, **settings | changes)
    return {name: load_split(target, name, classes) for name in SPLITS}, about


def where(splits: dict[str, ImageSet]) -> dict[bytes, str]:
    """The split of each image."""
    return {image.tobytes(): name for name, split in splits.items() for image in split.images}


# What is found


def test_sub_folders_are_classes_and_a_flat_folder_has_none(tmp_path: Path) -> None:
    for i, name in enumerate(["zebra", "Ant", "bee"]):
        fill(tmp_path / "in" / name / "deeper", 20, first=100 * i)
    splits, _ = write(tmp_path / "in", tmp_path / "out")
    assert splits["train"].classes == ("Ant", "bee", "zebra")
    for split in splits.values():
        for image, label in zip(split.images, split.labels if split.labels is not None else [], strict=True):
            originals = [decode(tmp_path / f"in/{split.classes[label]}/deeper/{i:04}.png", (3, 16, 16)) for i in numbers(label)]
            assert any((image == original).all() for original in originals)
    flat, _ = write(fill(tmp_path / "flat", 30), tmp_path / "out")
    assert flat["train"].labels is None and flat["train"].classes == () and sum(map(len, flat.values())) == 30


def numbers(label: int) -> range:
    first = {0: 100, 1: 200, 2: 0}[label]  # Ant, bee, zebra
    return range(first, first + 20)


def test_hidden_and_other_files_are_passed_over_and_links_followed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 3)
    (folder / "notes.txt").write_text("no image")
    picture(1).save(folder / ".hidden.png")
    fill(folder / ".thumbnails", 2)
    (folder / "link.png").symlink_to(folder / "0000.png")
    assert [Path(path).name for path in find_images(folder).paths] == ["0000.png", "0001.png", "0002.png", "link.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp", ".tif", ".tiff", ".gif"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    [path] = find_images(fill(tmp_path / "in", 1, suffix=suffix)).paths
    expected = np.asarray(picture(0)).transpose(2, 0, 1).astype(int)
    tolerance = {".jpg": 12, ".JPEG": 12, ".webp": 20, ".gif": 24}.get(suffix, 0)  # of the mean; GIF has 256 colours
    assert abs(decode(path, (3, 20, 20)).astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, ["data.path", "must be a folder of images"]),
        (lambda folder: folder.mkdir(), ["holds no images", ".png", "dvc add"]),
        (lambda folder: (fill(folder, 2), fill(folder / "a", 3)), ["2 images beside sub-folders with 3 more"]),
    ],
    ids=["missing", "empty", "mixed"],
)
def test_a_folder_that_cannot_be_meant(tmp_path: Path, make: Any, words: list[str]) -> None:
    make(tmp_path / "in")
    with pytest.raises(UserError) as error:
        find_images(tmp_path / "in")
    assert all(word in str(error.value) for word in words)


# How it is decoded


def test_the_largest_square_around_the_centre_is_resized(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))  # the square in the middle
    image.save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", (3, 16, 16)) == np.array([0, 0, 255]).reshape(3, 1, 1)).all()
    tall = image.transpose(Image.Transpose.ROTATE_90)
    tall.save(tmp_path / "b.png")
    assert (decode(tmp_path / "b.png", (3, 16, 16)) == np.array([0, 0, 255]).reshape(3, 1, 1)).all()


def test_an_image_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (24, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode(tmp_path / "a.png", (3, 24, 24)), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_heeded_by_pixels_and_by_the_survey(tmp_path: Path, orientation: int) -> None:
    upright = picture(3, 32, 24)
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if stored is None else upright.transpose(stored)).save(tmp_path / "a.png", exif=exif)
    assert module.survey([str(tmp_path / "a.png")], 0, "auto") == (3, 24, 32)
    np.testing.assert_array_equal(decode(tmp_path / "a.png", (3, 24, 32)), np.asarray(upright).transpose(2, 0, 1))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode(tmp_path / "clear.png", (3, 16, 16)) == 255).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (decode(tmp_path / "palette.png", (3, 16, 16)) == 255).all()


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(decode(tmp_path / "a.png", (1, 16, 16))[0], values / 257, atol=0.5)


def test_grey_files_stay_grey_unless_told_otherwise(tmp_path: Path) -> None:
    grey = fill(tmp_path / "grey", 30, mode="L")
    assert write(grey, tmp_path / "out")[0]["train"].shape == (1, 16, 16)
    assert write(grey, tmp_path / "out", channels=3)[0]["train"].shape == (3, 16, 16)
    fill(grey, 1, first=50)
    assert write(grey, tmp_path / "out")[0]["train"].shape == (3, 16, 16)
    assert write(grey, tmp_path / "out", channels=1)[0]["train"].shape == (1, 16, 16)


def test_images_of_one_size_can_stay_as_they_are(tmp_path: Path) -> None:
    splits, about = write(fill(tmp_path / "in", 30, width=28, height=24), tmp_path / "out", size=0)
    assert splits["train"].shape == (3, 24, 28)
    assert about["resize"] == "none"


@pytest.mark.parametrize(("more", "words"), [((30, 20), "from 20x20 to 30x20: set data.size"), ((20, 20), "")])
def test_images_of_several_sizes_need_one(tmp_path: Path, more: tuple[int, int], words: str) -> None:
    folder = fill(fill(tmp_path / "in", 30), 1, first=40, width=more[0], height=more[1])
    if not words:
        write(folder, tmp_path / "out", size=0)
        return
    with pytest.raises(UserError, match=words):
        write(folder, tmp_path / "out", size=0)


def test_images_out_of_range_need_a_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"300x200, and must have 16 to 128 pixels a side: set data\.size"):
        write(fill(tmp_path / "in", 2, width=300, height=200), tmp_path / "out", size=0)


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 10)
    whole = (folder / "0003.png").read_bytes()
    (folder / "0003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "0007.png").write_bytes(b"not an image")
    with pytest.raises(UserError) as error:
        write(folder, tmp_path / "out")
    assert "2 of 10 images" in str(error.value) and "0003.png" in str(error.value) and "0007.png" in str(error.value)


def test_many_damaged_files_are_counted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 3)
    for i in range(9):
        (folder / f"bad{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="9 of 12 images") as error:
        write(folder, tmp_path / "out")
    assert str(error.value).count("\n  ") == module.SHOWN + 1 and "and 4 more" in str(error.value)


# Where it goes


def test_the_files_are_those_of_a_set_in_memory(tmp_path: Path) -> None:
    """Byte for byte, headers too: whether a set was written image by image makes no difference."""
    for i, name in enumerate("ab"):
        fill(tmp_path / "in" / name, 20, first=100 * i)
    splits, _ = write(tmp_path / "in", tmp_path / "out")
    save_images(tmp_path / "saved", splits, {"classes": ["a", "b"]})
    for name in SPLITS:
        for file in ("images.npy", "labels.npy"):
            assert (tmp_path / "out" / name / file).read_bytes() == (tmp_path / "saved" / name / file).read_bytes()
    assert load_images(tmp_path / "saved", "train").shape == (3, 16, 16)


def test_an_image_that_is_added_moves_no_other_whatever_its_name(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 60)
    before = where(write(folder, tmp_path / "out")[0])
    fill(folder, 5, first=100)
    (folder / "0007.png").rename(folder / "zzz.png")
    (folder / "0008.png").unlink()
    after = where(write(folder, tmp_path / "out")[0])
    assert len(before) == 60 and len(after) == 64
    assert all(before[image] == split for image, split in after.items() if image in before)


def test_equal_images_are_never_in_two_splits(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 40)
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / f"copy-{path.name}")
    splits, _ = write(folder, tmp_path / "out")
    assert sum(map(len, splits.values())) == 80
    assert len({(image.tobytes(), name) for name, split in splits.items() for image in split.images}) == 40


def test_shares_are_kept_and_another_seed_divides_anew() -> None:
    n, random = 20_000, np.random.RandomState(0)
    images = random.randint(0, 256, (n, 1, 4, 4)).astype(np.uint8)
    found = {seed: [split_of(image, seed=seed, validation=0.1, test=0.25) for image in images] for seed in (1, 2)}
    for name, share in [("train", 0.65), ("validation", 0.1), ("test", 0.25)]:
        assert abs(found[1].count(name) / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    both = sum(a == b == "test" for a, b in zip(found[1], found[2], strict=True))
    assert abs(both / n - 0.0625) < 4 * (0.0625 * 0.9375 / n) ** 0.5  # independent


def test_an_empty_split_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 in validation, 2 in test; there must be at least .* raise data\.validation_share"):
        write(fill(tmp_path / "in", 10), tmp_path / "out", validation=1e-9)


def test_the_seed_that_an_empty_split_is_mended_by_does(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 10)
    with pytest.raises(UserError, match=r"set data\.split_seed to") as error:
        write(folder, tmp_path / "out", validation=0.1, test=0.1, seed=1)
    [seed, *counts] = re.findall(r"\d+", str(error.value).partition("set data.split_seed to ")[2])
    splits, _ = write(folder, tmp_path / "out", validation=0.1, test=0.1, seed=int(seed))
    assert [len(splits[name]) for name in SPLITS] == [int(count) for count in counts] and min(map(len, splits.values())) > 0


def test_equal_images_alone_cannot_be_divided(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 1)
    for i in range(1, 10):
        shutil.copy(folder / "0000.png", folder / f"{i}.png")
    with pytest.raises(UserError, match="of which no two are equal"):
        write(folder, tmp_path / "out")


def test_few_images_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(fill(tmp_path / "in", 30), tmp_path / "out")
    said = capsys.readouterr().err
    assert "30 images are few" in said and "memorisation" in said


def test_the_same_folder_gives_the_same_bytes_and_no_path(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 40, suffix=".jpg", width=50)
    _, about = write(folder, tmp_path / "one")
    moved = folder.rename(tmp_path / "elsewhere")
    _, again = write(moved, tmp_path / "two")
    assert about == again and str(tmp_path) not in json.dumps(about)
    for name in SPLITS:
        assert (tmp_path / "one" / name / "images.npy").read_bytes() == (tmp_path / "two" / name / "images.npy").read_bytes()


def test_memory_does_not_grow_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 MB of pixels, from one file under many names, in a few."""
    fill(tmp_path / "in", 1)
    pixels = np.zeros((3, 128, 128), np.uint8)
    numbers = iter(range(10**6))

    def made(path: str, shape: tuple[int, int, int]) -> np.ndarray:
        pixels[0, 0, :3] = np.frombuffer(next(numbers).to_bytes(3, "big"), np.uint8)
        return pixels.copy()

    monkeypatch.setattr(module, "decode", made)
    monkeypatch.setattr(module, "find_images", lambda folder: module.Found([str(tmp_path / "in/0000.png")] * 6000, None, ()))
    tracemalloc.start()
    splits, _ = write(tmp_path / "in", tmp_path / "out", size=128, channels=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, splits.values())) == 6000
    assert peak < 60 * 2**20
