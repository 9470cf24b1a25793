"""Folders that went wrong in other tools, by their public bug reports: the table in docs/data.md."""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import fill, picture, write
from PIL import Image

from rediffuse.runtime.errors import UserError

PAGE = Path(__file__).parents[1] / "docs/data.md"


@dataclass
class Case:
    """What is brought, made in a new folder, and what a user needs to see.

    made: fills the folder, or packs it into a zip beside it.  classes: those found.  says, refuses: patterns
    of what is printed, of the error.  level: the mean of all pixels.
    """

    made: Callable[[Path], object]
    n: int = 30
    classes: tuple[str, ...] = ()
    shape: tuple[int, int, int] = (3, 16, 16)
    test: int | None = None
    says: str = ""
    refuses: str = ""
    level: tuple[float, float] = (60, 200)
    changes: dict[str, Any] = field(default_factory=dict)


Made = Callable[[Path], object]


def pictures(n: int, place: str = "", **more: Any) -> Made:
    """n images in the sub-folder."""
    return lambda folder: fill(folder / place, n, **more)


def files(*names: str, content: bytes = b"\0\5\x16\7" * 20) -> Made:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return make


def all_of(*parts: Made) -> Made:
    return lambda folder: [part(folder) for part in parts]


def two_classes(*parts: Made, suffix: str = ".png") -> Made:
    """Classes a and b of 15 images, and more."""
    return all_of(pictures(15, "a"), pictures(15, "b", first=100, suffix=suffix), *parts)


def in_formats(**formats: str) -> Made:
    """30 images, of which some have this name ("__" for the dot) and format."""

    def make(folder: Path) -> None:
        fill(folder, 30 - len(formats))
        for i, (name, kind) in enumerate(formats.items()):
            picture(500 + i).save(folder / name.replace("__", "."), kind)

    return make


def converted(convert: Callable[[Image.Image], Image.Image], suffix: str = ".png") -> Made:
    def make(folder: Path) -> None:
        folder.mkdir()
        for i in range(30):
            convert(picture(i)).save(folder / f"{i}{suffix}")

    return make


def grey_of(dtype: type, scale: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: Image.fromarray((np.asarray(image.convert("L"), np.int64) * scale).astype(dtype))


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder.with_name("in.zip"), "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder.parent))


def modes(folder: Path) -> None:
    fill(folder, 24)
    of = {"L": "png", "LA": "png", "RGBA": "png", "P": "png", "1": "png", "CMYK": "jpg"}
    for i, (mode, suffix) in enumerate(of.items()):
        picture(600 + i).convert(mode).save(folder / f"{mode}.{suffix}")


def turned(folder: Path, *, exif: bytes | Image.Exif | None = None) -> None:
    """The upper half is white; stored on its side, by EXIF."""
    if exif is None:
        exif = Image.Exif()
        exif[0x0112] = 6
    folder.mkdir()
    for i in range(30):
        upright = picture(i, 16, 32)
        upright.paste("white", (0, 0, 16, 16))
        upright.transpose(Image.Transpose.ROTATE_90).save(folder / f"{i}.png", exif=exif)


def odd_metadata(folder: Path) -> None:
    """As `turned`, with a first entry of a kind that Pillow cannot write back."""
    odd = struct.pack(">HHII", 0x0100, 8, 1, 0xFFFF0000)
    turn = struct.pack(">HHIHHI", 0x0112, 3, 1, 6, 0, 0)
    turned(folder, exif=b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + odd + turn)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def clear(folder: Path) -> None:
    """The upper half is transparent, over red."""
    folder.mkdir()
    for i in range(30):
        image = picture(i, 16, 16, "RGBA")
        image.paste((255, 0, 0, 0), (0, 0, 16, 8))
        image.save(folder / f"{i}.png")


def looped(folder: Path) -> None:
    (folder / "a/again").symlink_to(folder, target_is_directory=True)


def copied(folder: Path) -> None:
    for i in range(4):
        shutil.copy(folder / f"train/{i:04}.png", folder / f"test/copy{i}.png")


def empty_class(folder: Path) -> None:
    (folder / "c").mkdir()


def animated(folder: Path) -> None:
    picture(100).save(folder / "x.gif", save_all=True, append_images=[picture(101)])


def chinese(folder: Path) -> None:
    for path in list(folder.rglob("*.png")):
        path.rename(path.with_name(f"图{path.name}"))


BOTH = ("a", "b")
SOME = pictures(30)
LONG_TEXT = png_of(16, chunk(b"zTXt", b"x\0\0" + zlib.compress(b"x" * 2**21)))
REPORTS: dict[str, Case] = {
    # Classes and splits
    "huggingface/datasets#7880": Case(
        all_of(pictures(20, "train"), pictures(10, "test", first=100)), test=10, says="10 images in test"
    ),
    "fastai/fastai#1552": Case(
        all_of(pictures(9, "train/ok"), pictures(9, "train/bad", first=20), pictures(9, "test", first=40)),
        refuses=r"9 images \(in test\) beside sub-folders with 18 more",
    ),
    "huggingface/datasets#5153": Case(pictures(30, "photos"), says="is the set, and no class"),
    "dome272/Diffusion-Models-pytorch#43": Case(SOME),
    "pytorch/vision#4925": Case(two_classes(empty_class), classes=BOTH, says="without images: .*/c"),
    "huggingface/datasets#5532": Case(
        all_of(pictures(60, "a"), pictures(1, "b", first=90)),
        n=61,
        classes=BOTH,
        says=r"1 of 2 classes have fewer than 20 training images.*b \(",
    ),
    "huggingface/datasets#6442": Case(
        all_of(SOME, files("metadata.jsonl")), says=r"labels are not read from .*metadata\.jsonl"
    ),
    "sergeywong/cp-vton#42": Case(
        all_of(pictures(25, "train"), pictures(5, "test", first=100), copied),
        n=34,
        test=9,
        says="4 images were handed out in more than one split",
    ),
    "keras-team/keras#23202": Case(
        pictures(10), refuses="0 in validation", changes={"validation_share": 0.001}
    ),
    # What is found
    "pytorch/vision#2831": Case(
        two_classes(files(".ipynb_checkpoints/a.png", "a/.ipynb_checkpoints/b.png")), classes=BOTH
    ),
    "Linaqruf/kohya-trainer#300": Case(
        two_classes(files("__MACOSX/a/._0000.png", "a/._0000.png"), zipped), classes=BOTH
    ),
    "python-pillow/Pillow#4807": Case(two_classes(files("a/._0000.png", "b/._0100.png")), classes=BOTH),
    "d8ahazard/sd_dreambooth_extension#64": Case(
        two_classes(files("Thumbs.db", "a/Thumbs.db", "b/.DS_Store")), classes=BOTH
    ),
    "bmaltais/kohya_ss#2698": Case(
        two_classes(files("$RECYCLE.BIN/x.png", "System Volume Information/x", "lost+found/y.png")),
        classes=BOTH,
    ),
    "catalyst-team/classification#38": Case(two_classes(suffix=".webp"), classes=BOTH),
    "replicate/lora-training#9": Case(
        all_of(in_formats(**{f"IMG_{i}.JPG": "JPEG" for i in range(30)}), zipped), says="sub-folder in"
    ),
    "FlyMyAI/flymyai-lora-trainer#72": Case(in_formats(a__jpeg="JPEG", b__webp="WEBP", c__PNG="PNG")),
    "towhee-io/towhee#95": Case(in_formats(a="PNG", b="JPEG")),
    "replicate/dreambooth#23": Case(
        all_of(SOME, files("1.heic", "2.HEIC")), says=r"2 \.heic; convert \.heic to PNG or JPEG"
    ),
    "bmaltais/kohya_ss#1718": Case(in_formats(a__png="JPEG", b__jpg="WEBP")),
    "bmaltais/kohya_ss#2660": Case(files("x.txt"), refuses=r"holds no images.*1 \.txt"),
    "mindspore-lab/mindocr#538": Case(two_classes(looped), classes=BOTH, says="a/again leads back"),
    "deepfakes/faceswap#734": Case(
        all_of(pictures(15, "猫"), pictures(15, "狗", first=100), chinese), classes=("狗", "猫")
    ),
    # Damaged files
    "liujiaheng/compression#30": Case(
        all_of(SOME, files("x.png", content=LONG_TEXT)), refuses=r"1 of 31 .*\n  .*too large.*: .*x\.png"
    ),
    "lucidrains/lightweight-gan#109": Case(
        all_of(SOME, files("x.jpg", content=b"\xff\xd8\xff\xe0 broken")), refuses=r"1 of 31 .*\n  .*x\.jpg"
    ),
    "bchao1/Anime-Face-Dataset#3": Case(
        all_of(SOME, files("x.jpg", "y.jpg", content=b"")), refuses=r"2 of 32 .*(\n  empty: .*[xy]\.jpg){2}"
    ),
    "jinnovation/rainy-image-dataset#3": Case(
        all_of(SOME, files("x.png", content=b"version https://git-lfs.github.com/spec/v1\noid sha256:0")),
        refuses="git lfs pull",
    ),
    "lyuwenyu/RT-DETR#337": Case(
        all_of(SOME, files("x.png", content=png_of(20_000))), refuses=r"1 of 31 .*\n  Decompression.*x\.png"
    ),
    # Pixels
    "huggingface/diffusers#10677": Case(
        converted(lambda image: image.convert("L").convert("RGB"), ".jpg"), shape=(1, 16, 16)
    ),
    "lucidrains/denoising-diffusion-pytorch#89": Case(all_of(pictures(20), pictures(10, first=20, mode="L"))),
    "lucidrains/stylegan2-pytorch#108": Case(all_of(pictures(25), pictures(5, first=25, mode="LA"))),
    "NVlabs/stylegan2-ada-pytorch#46": Case(modes),
    "junyanz/pytorch-CycleGAN-and-pix2pix#321": Case(converted(grey_of(np.uint16, 257)), shape=(1, 16, 16)),
    "mr7495/COVID-CTset#3": Case(
        converted(grey_of(np.uint16, 16), ".tif"),
        shape=(1, 16, 16),
        level=(0, 20),
        says="images of 16 bits have no value above .* will be dark: scale them",
    ),
    "thunder-project/thunder#58": Case(
        converted(grey_of(np.float32, 1), ".tif"),
        refuses="30 of 30 .*\n.*floating-point numbers of unknown range",
    ),
    "kohya-ss/sd-scripts#1316": Case(turned, shape=(3, 32, 16), level=(150, 230), changes={"size": [32, 16]}),
    "python-pillow/Pillow#8605": Case(
        odd_metadata, shape=(3, 32, 16), level=(150, 230), changes={"size": [32, 16]}
    ),
    "kohya-ss/sd-scripts#1223": Case(
        clear,
        says="30 are partly transparent: laid on black",
        level=(30, 100),
        changes={"background": "black"},
    ),
    "taki0112/StyleGAN-Tensorflow#16": Case(
        all_of(pictures(29), animated), says="1 have more than one frame or page: the first is taken"
    ),
    # Sizes and numbers
    "lucidrains/denoising-diffusion-pytorch#97": Case(
        all_of(pictures(29, width=32, height=32), pictures(1, first=40, mode="L")), shape=(3, 16, 16)
    ),
    "lucidrains/denoising-diffusion-pytorch#183": Case(
        pictures(30, width=64, height=128), shape=(3, 128, 64), changes={"size": [128, 64]}
    ),
    "lucidrains/denoising-diffusion-pytorch#232": Case(
        pictures(30, width=100, height=100), shape=(3, 100, 100), changes={"size": 0}
    ),
    "phillipi/pix2pix#14": Case(pictures(30, width=40, height=20), says=r"16x16 pixels \(crop\)"),
    "lucidrains/denoising-diffusion-pytorch#45": Case(
        pictures(100), n=100, says="100 images are few: a model memorises them"
    ),
}


@pytest.mark.parametrize("report", REPORTS)
def test_what_was_reported_of_others(tmp_path, capsys, report):
    case = REPORTS[report]
    case.made(tmp_path / "in")
    path = tmp_path / "in.zip" if (tmp_path / "in.zip").exists() else tmp_path / "in"
    if case.refuses:
        with pytest.raises(UserError, match=case.refuses):
            write(path, tmp_path / "out", **case.changes)
        return
    found, _ = write(path, tmp_path / "out", **case.changes)
    images = np.concatenate([split.images for split in found.values()])
    assert images.shape == (case.n, *case.shape) and found["train"].classes == case.classes
    assert case.level[0] < images.mean() < case.level[1]
    assert case.test in (None, len(found["test"]))
    printed = "".join(capsys.readouterr())
    assert re.search(case.says, printed)
    if not case.says:
        usual = "30 images are few|classes have fewer than 20 training images"
        assert all(re.search(usual, line) for line in printed.splitlines() if "warning" in line)


def test_the_page_has_a_row_for_each_report():
    rows = re.findall(r"^\| `([\w./-]+#\d+)` \|.*\|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(REPORTS)
