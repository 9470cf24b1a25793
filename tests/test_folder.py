"""Folders of your own images: what is found, how it is decoded, where it goes, and errors."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from folders import fill, picture, settings, write
from PIL import Image

from rediffuse.cli import main
from rediffuse.images.image_set import SPLITS, save_images
from rediffuse.params import Params
from rediffuse.runtime.errors import UserError
from rediffuse.sources import own as module
from rediffuse.sources.decode import decode
from rediffuse.sources.folder import ImageFiles, find_images, open_image
from rediffuse.sources.found import Found
from rediffuse.sources.splits import place_of, split_at
from rediffuse.sources.survey import survey

ROOT = Path(__file__).parents[1]


def pixels_of(path: str | Path, shape: tuple[int, int, int], **more: Any) -> np.ndarray:
    with open_image(path) as image:
        return decode(image, shape, **more)


def names(folder: Path) -> list[str]:
    """The images that are found in the folder, by their path in it."""
    images = find_images(folder).images
    return [str(Path(images.name(i)).relative_to(folder)) for i in range(len(images))]


# What is found


def test_sub_folders_are_classes_and_a_flat_folder_has_none(tmp_path):
    label_of = {}
    for i, name in enumerate(["zebra", "Ant", "bee"]):
        folder = fill(tmp_path / "in" / name / "deeper", 20, first=100 * i)
        for path in folder.iterdir():
            label_of[pixels_of(path, (3, 16, 16)).tobytes()] = name
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
    assert names(folder) == ["0000.png", "0001.png", "link.png"]


@pytest.mark.parametrize(
    "suffix",
    [".png", ".jpg", ".JPEG", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".tif", ".gif", ".ppm", ".tga", ""],
)
def test_formats(tmp_path, suffix):
    fill(tmp_path / "in", 1, suffix=suffix or ".png")
    if not suffix:
        (tmp_path / "in/0000.png").rename(tmp_path / "in/0000")
    assert names(tmp_path / "in") == [f"0000{suffix}"]
    expected = np.asarray(picture(0)).transpose(2, 0, 1).astype(int)
    lossy = {
        ".jpg": 12,
        ".JPEG": 12,
        ".jfif": 12,
        ".webp": 20,
        ".avif": 20,
        ".gif": 24,
    }  # GIF has 256 colours
    found = pixels_of(tmp_path / f"in/0000{suffix}", (3, 20, 20)).astype(int)
    assert abs(found - expected).mean() <= lossy.get(suffix, 0)


def damaged(folder: Path, n: int) -> None:
    """Add n images that are cut off, and one that is not."""
    whole = (fill(folder, n + 1) / "0000.png").read_bytes()
    for i in range(n):
        (folder / f"{i:04}.png").write_bytes(whole[: len(whole) // 2])


MISTAKES = {
    "missing": (lambda folder: None, {}, "data.path .* must be a folder of images"),
    "empty": (lambda folder: folder.mkdir(), {}, "data.path .* holds no images.*dvc add"),
    "mixed": (lambda folder: (fill(folder, 2), fill(folder / "a", 3)), {}, "2 images beside .* with 3 more"),
    "name": (
        lambda folder: (fill(folder / os.fsdecode(b"caf\xe9"), 2), fill(folder / "b", 2)),
        {},
        "data.path .*UTF-8: rename it",
    ),
    "sizes": (
        lambda folder: (fill(folder, 2, width=28), fill(folder, 1, first=2, width=30)),
        {"size": 0},
        r"28x20 to 30x20: set data\.size",
    ),
    "large": (
        lambda folder: fill(folder, 2, width=300, height=200),
        {"size": 0},
        r"300x200, and must have 16 to 256 pixels a side: set data\.size",
    ),
    "damaged": (
        lambda folder: damaged(folder, 9),
        {},
        r"9 of 10 images in data\.path.*(\n  cut off: .*000\d.png){9}",
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
        assert (pixels_of(tmp_path / "a.png", (3, 16, 16)) == np.array([0, 0, 255]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize(("code", "turn"), [(2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (6, "ROTATE_90")])
def test_the_exif_orientation_holds_for_pixels_and_survey(tmp_path, code, turn):
    upright, exif = picture(3, 32, 24), Image.Exif()
    exif[0x0112] = code
    upright.transpose(Image.Transpose[turn]).save(tmp_path / "a.png", exif=exif)
    assert survey(find_images(tmp_path), settings(size=0)).shape == (3, 24, 32)
    expected = np.asarray(upright).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.png", (3, 24, 32)), expected)


def test_transparency_shows_the_ground(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("clear", "palette"):
        assert (pixels_of(tmp_path / f"{name}.png", (3, 16, 16)) == 255).all()
        assert (pixels_of(tmp_path / f"{name}.png", (3, 16, 16), ground="black") == 0).all()


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(pixels_of(tmp_path / "a.png", (1, 16, 16))[0], values / 257, atol=0.5)


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
    found = [[split_at(place_of(image, seed), **shares) for image in images] for seed in (1, 2)]
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

    def made(image, shape, **_):
        pixels = np.zeros(shape, np.uint8)
        pixels[0, 0, :3] = np.frombuffer(next(numbers).to_bytes(3, "big"), np.uint8)
        return pixels

    found = Found(ImageFiles([str(tmp_path / "in/0000.png")] * 6000))
    monkeypatch.setattr(module, "decode", made)
    monkeypatch.setattr(module, "find_images", lambda *_, **__: found)
    tracemalloc.start()
    splits, _ = write(tmp_path / "in", tmp_path / "out", size=128, channels=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, splits.values())) == 6000 and peak < 60 * 2**20


# Folders from real life


def test_folders_named_like_splits_are_splits(tmp_path, capsys):
    """As Hugging Face has it.  Validation, which was not handed out, takes its share of train."""
    for i, split in enumerate(["Train", "test"]):
        for j, name in enumerate(["cat", "dog"]):
            fill(tmp_path / "in" / split / name, 40 - 25 * i, first=100 * (2 * i + j))
    splits, _ = write(tmp_path / "in", tmp_path / "out")
    assert splits["test"].classes == ("cat", "dog") and np.bincount(splits["test"].labels).tolist() == [
        15,
        15,
    ]
    assert len(splits["train"]) + len(splits["validation"]) == 80 and 4 < len(splits["validation"]) < 30
    assert "80 images in train, 30 images in test" in capsys.readouterr().out
    as_classes, _ = write(tmp_path / "in", tmp_path / "out", split_folders=False)
    assert as_classes["train"].classes == ("Train", "test")
    (tmp_path / "in/Train").rename(tmp_path / "in/dev")
    with pytest.raises(UserError, match="holds only dev, test, and nothing to train on"):
        write(tmp_path / "in", tmp_path / "out")
    fill(tmp_path / "in/bus", 3)
    with pytest.raises(
        UserError, match=r"dev, test, the name of a split, beside bus: .* data\.split_folders"
    ):
        write(tmp_path / "in", tmp_path / "out")


def test_a_test_split_without_classes_is_refused(tmp_path):
    fill(tmp_path / "in/train/cat", 3)
    fill(tmp_path / "in/train/dog", 3, first=10)
    fill(tmp_path / "in/test", 4, first=20)
    with pytest.raises(UserError, match=r"holds 4 images \(in test\) beside sub-folders with 6 more"):
        write(tmp_path / "in", tmp_path / "out")


def test_a_folder_around_the_classes_or_splits_is_entered(tmp_path):
    for i, name in enumerate(["cat", "dog"]):
        fill(tmp_path / "in/pets" / name, 3, first=10 * i)
    found = find_images(tmp_path / "in")
    assert found.classes == ("cat", "dog") and "sub-folder pets" in found.notes[0]
    (tmp_path / "in/pets/cat").rename(tmp_path / "in/pets/train")
    (tmp_path / "in/pets/dog").rename(tmp_path / "in/pets/val")
    found = find_images(tmp_path / "in")
    assert found.classes == () and set(found.splits) == {"train", "validation"}


def test_other_files_are_counted_by_kind_and_leftovers_passed_over_in_silence(tmp_path):
    folder = fill(tmp_path / "in/a", 2).parent
    fill(folder / "b", 1, first=5)
    for i in range(3):
        (folder / f"a/{i}.heic").write_bytes(b"no image to Pillow")
    (folder / "a/labels").write_text("no image")
    for leftover in ("Thumbs.db", "__MACOSX/a/0000.png", ".ipynb_checkpoints/0000.png", "a/._0000.png"):
        (folder / leftover).parent.mkdir(parents=True, exist_ok=True)
        (folder / leftover).write_bytes(b"")
    found = find_images(folder)
    assert len(found.images) == 3 and found.classes == ("a", "b")
    [note] = found.notes
    assert "3 .heic, 1 without a suffix" in note and "convert .heic to PNG or JPEG" in note
    assert not any(word in note for word in ("Thumbs", "MACOSX", "db"))
    shutil.rmtree(folder / "a")
    shutil.rmtree(folder / "b")
    (folder / "b.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no images.*1 \.heic"):
        find_images(folder)


def test_links_are_followed_once_and_loops_named(tmp_path):
    folder = fill(tmp_path / "in/a", 2).parent
    outside = fill(tmp_path / "outside", 3, first=10)
    (folder / "a/loop").symlink_to(folder, target_is_directory=True)
    (folder / "b").symlink_to(outside, target_is_directory=True)
    (folder / "c").symlink_to(outside, target_is_directory=True)
    (outside / "up").symlink_to(tmp_path, target_is_directory=True)
    found = find_images(folder)
    assert found.classes == ("a", "b") and len(found.images) == 5
    [note] = found.notes
    assert "a/loop leads back" in note and "c leads to" in note and "b/up leads back" in note


def test_grey_photographs_stored_in_colour_are_grey(tmp_path):
    for i in range(30):
        folder = fill(tmp_path / "in", 1, first=i, mode="L")
        Image.open(folder / f"{i:04}.png").convert("RGB").save(folder / f"{i:04}.jpg", quality=80)
        (folder / f"{i:04}.png").unlink()
    assert write(tmp_path / "in", tmp_path / "out")[0]["train"].shape == (1, 16, 16)
    fill(tmp_path / "in", 1, first=50)  # one in colour
    assert write(tmp_path / "in", tmp_path / "out")[0]["train"].shape == (3, 16, 16)


def test_all_that_cannot_be_read_is_named_in_one_go_by_reason(tmp_path):
    folder = fill(tmp_path / "in", 30)
    whole = (fill(tmp_path / "jpeg", 1, suffix=".jpg", width=200, height=200) / "0000.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:-500])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "float.tif")
    (folder / "text.png").write_text("no image")
    (folder / "nowhere.png").symlink_to(tmp_path / "nothing")
    header = b"IHDR" + (12_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    chunks = [header, b"IEND"]
    ends = [len(each[4:]).to_bytes(4, "big") + each + crc32(each).to_bytes(4, "big") for each in chunks]
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(ends))
    (folder / "cut-in-its-head.png").write_bytes(b"\x89PNG\r\n\x1a\n" + ends[0][:-4])
    with pytest.raises(UserError, match=r"6 of 36 images in data\.path cannot be read") as error:
        write(tmp_path / "in", tmp_path / "out")
    text = str(error.value)
    for name, reason in {
        "cut.jpg": "cut off",
        "float.tif": "floating-point numbers",
        "text.png": "no image",
        "nowhere.png": "a link that leads nowhere",
        "huge.png": "holds no pixels",
        "cut-in-its-head.png": "",
    }.items():
        assert any(reason in line and name in line for line in text.splitlines()[1:]), name
    for i in range(30):
        (folder / f"{i:04}.png").write_bytes(whole[:-500])
    with pytest.raises(
        UserError, match=r"36 of 36.*\n  cut off: 31, among them .*\n(.*\n)*.*unreadable\.txt"
    ):
        write(tmp_path / "in", tmp_path / "out")
    assert len((tmp_path / "unreadable.txt").read_text().splitlines()) == 36


def drawing(seed: int, level: int) -> Image.Image:
    """A drawing of one grey level on transparent ground."""
    alpha = np.random.RandomState(seed).randint(0, 2, (16, 16)).astype(np.uint8) * 255
    return Image.merge("LA", [Image.new("L", (16, 16), level), Image.fromarray(alpha)])


@pytest.mark.parametrize(("level", "ground"), [(255, "black"), (0, "white")])
def test_drawings_on_transparent_ground_are_seen(tmp_path, capsys, level, ground):
    (tmp_path / "in").mkdir()
    for i in range(40):
        drawing(i, level).save(tmp_path / f"in/{i}.png")
    splits, about = write(tmp_path / "in", tmp_path / "out")
    assert about["background"] == ground and len(np.unique(splits["train"].images, axis=0)) > 10
    assert "equal" not in capsys.readouterr().err
    other = "white" if ground == "black" else "black"
    with pytest.raises(UserError, match="of which 1 differ"):
        write(tmp_path / "in", tmp_path / "out", background=other)
    fill(tmp_path / "in", 20)
    write(tmp_path / "in", tmp_path / "out", background=other)
    expected = (
        f"39 of 60 images are equal to another, 21 differ, some perhaps only on {other}: try data.background"
    )
    assert f"{expected} {ground}" in capsys.readouterr().err


def test_equal_images_are_counted(tmp_path, capsys):
    folder = fill(tmp_path / "in", 3)
    for i in range(47):
        shutil.copy(folder / "0000.png", folder / f"copy{i}.png")
    with pytest.raises(
        UserError, match=r"the 50 images in data\.path, of which 3 differ, fall to the splits"
    ):
        write(folder, tmp_path / "out")
    fill(tmp_path / "two/train", 30)
    fill(tmp_path / "two/test", 5, first=25)
    write(tmp_path / "two", tmp_path / "out")
    warned = capsys.readouterr().err
    assert (
        "5 of 35 images are equal to another" in warned
        and "5 images were handed out in more than one" in warned
    )


def test_classes_too_small_to_learn_are_named(tmp_path, capsys):
    fill(tmp_path / "in/many", 80)
    fill(tmp_path / "in/one", 1, first=100)
    write(tmp_path / "in", tmp_path / "out")
    assert "1 of 2 classes have fewer than 20 training images" in (warned := capsys.readouterr().err)
    assert "one (1 in train, 0 in test)" in warned or "one (0 in train, " in warned


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fits(tmp_path, fit):
    """A red image with blue ends, 60 wide and 20 high, as 16 wide and 32 high."""
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (0, 0, 10, 20))
    image.paste("blue", (50, 0, 60, 20))
    image.save(tmp_path / "a.png")
    shape = survey(find_images(tmp_path), settings(size=[32, 16])).shape
    found = pixels_of(tmp_path / "a.png", shape, fit=fit, ground="black").transpose(1, 2, 0)
    assert found.shape == (32, 16, 3)
    corner, middle, end = found[0, 0].tolist(), found[16, 8].tolist(), found[16, 0].tolist()
    assert middle[0] > 240 and middle[2] < 15
    black, blue, red = [0, 0, 0], [0, 0, 255], [255, 0, 0]
    expected = {"crop": (red, red), "pad": (black, blue), "stretch": (blue, blue)}[fit]
    assert np.abs(np.array([corner, end]) - expected).max() <= 6  # Lanczos rings


def test_arrays_in_an_archive_are_found(tmp_path):
    images = np.random.RandomState(1).randint(0, 256, (30, 16, 16)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(30) % 2)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.write(tmp_path / "a.npz", "top/a.npz")
    splits, _ = write(tmp_path / "in.zip", tmp_path / "out")
    assert sum(map(len, splits.values())) == 30 and splits["train"].classes == ("0", "1")
    assert not (tmp_path / ".unpacked").exists()


# A look before


def test_inspect_suggests_parameters_that_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["cat", "dog"]):
        fill(tmp_path / "in" / name, 200, first=1000 * i, width=60, height=40)
    done = CliRunner().invoke(main, ["inspect", "in"])
    assert not done.exit_code, done.output
    for words in ("400 images, 60x40 pixels: 400 PNG RGB", "colour, 32x32", "2 classes: cat, dog"):
        assert words in done.output
    assert "instrument efficientnet-lite0: needs 2,560 test images" in done.output
    with Image.open("contact-sheet.png") as sheet:
        assert sheet.width > 10 * 32
    suggested = yaml.safe_load(done.output.split("Parameters that fit")[1].split(":\n", 1)[1])
    assert suggested["data"]["path"] == "in" and suggested["vae"] == {"likelihood": "gaussian"}
    recipe = yaml.safe_load((ROOT / "recipes/folder-small.yaml").read_text())
    for group, values in suggested.items():
        recipe[group] |= values
    params = Params.model_validate(recipe)
    own = {name: value for name, value in suggested["data"].items() if name not in ("set", "path")}
    splits, _ = write(tmp_path / "in", tmp_path / "out", **own)
    assert params.reference.instruments[0] == "classifier" and len(splits["test"]) >= 128
