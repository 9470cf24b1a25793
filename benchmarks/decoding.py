"""Making an image set of a folder: images a second, and memory, beside what one would take instead.

The folder holds JPEGs of made-up photographs (smooth colours with noise; 256 to 512 pixels a side, 75 is the quality), in ten
sub-folders.  Each contender makes of it uint8 arrays of 64x64 pixels, the largest square around the centre resized: ours as the stage
prepare, with splits by content hash, written as they come; torchvision's ImageFolder with a DataLoader of as many workers as there are
cores, all images in memory in the end, as its users do; and Pillow in a plain loop, the library that does the decoding in both.
Memory: of the process at its peak, without a DataLoader's workers, for a folder and for one of four times as many images.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.report import RATIO, Cell, Settings, Table, cores
from benchmarks.workers import Result, Turn, Workers, ratio, spread

N, N_QUICK = 1000, 100
TIMES = 4
SIZE, CLASSES = 64, 10
OURS = "rediffuse"


def measure(settings: Settings) -> list[Table]:
    n = N_QUICK if settings.quick else N
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        make_photographs(small, n)
        make_photographs(large, TIMES * n)
        rates, peaks = of_folder(small, n, settings.turns)
        _, more = of_folder(large, TIMES * n, 1)
    rows: list[list[Cell]] = [
        [name, *(_middle(rates[name]), f"{spread(rates[name]):.0%}"), peaks[name], more[name], ratio(rates[OURS], rates[name])]
        for name in CONTENDERS
    ]
    columns = ["contender", "images/s", "spread", f"MiB, {n:,} images", f"MiB, {TIMES * n:,}", RATIO]
    return [Table("A folder of JPEGs becomes an image set", columns, rows, f"Median of {settings.turns} turns; ratio: images/s.")]


def of_folder(folder: Path, n: int, turns: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    with Workers({name: functools.partial(turn_of, name, folder, n) for name in CONTENDERS}) as workers:
        rates = {name: [float(rate) for rate in found if isinstance(rate, float)] for name, found in workers.turns(turns).items()}
        return rates, workers.peaks()


def make_photographs(folder: Path, n: int) -> None:
    """n JPEGs, the same for the same n."""
    from PIL import Image

    random = np.random.RandomState(1)
    for i in range(n):
        width, height = random.randint(256, 513, 2)
        colours = random.randint(0, 256, (6, 8, 3)).astype(np.uint8)
        image = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (image + random.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)
        path = folder / f"class {i % CLASSES}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=75)


def turn_of(name: str, folder: Path, n: int) -> Turn:
    work = CONTENDERS[name]
    work(folder)  # imports, and the files into the system's cache

    def turn() -> Result:
        begin = time.perf_counter()
        made = work(folder)
        seconds = time.perf_counter() - begin
        if made != n:
            raise ValueError(f"{name} made {made} images of {n}")
        return n / seconds

    return turn


def ours(folder: Path) -> int:
    from rediffuse.images.image_set import load_split
    from rediffuse.sources.folder import write_folder

    with tempfile.TemporaryDirectory() as made:
        classes, _ = write_folder(folder, Path(made), size=SIZE, channels=3, validation=0.1, test=0.2, seed=1)
        return sum(len(load_split(Path(made), split, classes)) for split in ("train", "validation", "test"))


def torchvisions(folder: Path) -> int:
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    square = transforms.Lambda(_centre_square)
    resize = transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.LANCZOS)
    images = ImageFolder(str(folder), transforms.Compose([square, resize, transforms.PILToTensor()]), loader=Image.open)
    # Forked, as is the rule on Linux: a contender was spawned itself, and its workers would be, and import torch anew in each turn.
    loader = DataLoader(images, batch_size=64, num_workers=cores(), multiprocessing_context="fork")
    return len(torch.cat([batch for batch, _ in loader]))


def pillows(folder: Path) -> int:
    from PIL import Image

    made = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            made.append(np.asarray(_centre_square(image.convert("RGB")).resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    return len(np.stack(made))


CONTENDERS: dict[str, Callable[[Path], int]] = {
    OURS: ours,
    "torchvision, ImageFolder and DataLoader": torchvisions,
    "Pillow, one after the other": pillows,
}


def _centre_square(image):  # type: ignore[no-untyped-def]  # of Pillow, which a worker imports late
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def _middle(values: list[float]) -> float:
    return float(np.median(values))
