"""Folders of images, made in tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rediffuse.images.image_set import SPLITS, ImageSet, load_split
from rediffuse.params import Data
from rediffuse.sources.own import write_own


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
    data = settings(path=str(source), **shares | changes)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    classes, about = write_own(data, target)
    return {name: load_split(target, name, classes) for name in SPLITS}, about


def settings(**changes: Any) -> Data:
    """Parameters of a folder of images."""
    usual = {"size": 16, "fit": "crop", "channels": "auto", "background": "auto", "split_folders": True}
    usual |= {"path": "in", "validation_share": 0.2, "test_share": 0.3}
    return Data(set="folder", validation=1, split_seed=1, **usual | changes)
