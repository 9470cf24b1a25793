"""How time and memory of training grow with the images, their pixels, and the processes.

Every point is measured in its own process, which has its own peak of memory; the interpreter and the
libraries are about half a GiB of it.  Models are those of params.yaml, untrained; images are noise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.ours import TINY, parameters, training_turn
from benchmarks.peers import Shape, random_images
from benchmarks.report import Settings, Table, peak_mib
from benchmarks.workers import Factory, Turn, Workers
from rediffuse.params import Params
from rediffuse.runtime.device import device, to_device
from rediffuse.runtime.processes import is_main, process_group

BLOCK = 10_000  # images written at once


def alone(factory: Factory) -> tuple[Any, float]:
    """Return what one turn in a process of its own gives, and the peak of that process in MiB."""
    with Workers({"point": factory}) as workers:
        return workers.turns(1)["point"][0], workers.each(peak_mib)["point"]


def settings_of(quick: bool) -> Params:
    return parameters(**TINY) if quick else parameters()


def write_images(path: Path, n: int, shape: Shape) -> Path:
    """Write n images of noise, block by block."""
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, *shape))
    block = random_images(min(n, BLOCK), shape)[0].numpy()
    for start in range(0, n, BLOCK):
        images[start : start + BLOCK] = block[: n - start]
    images.flush()
    return path


def training(path: Path, params: Params, steps: int) -> Turn:
    """Return a turn that gives the ms of a training step on the images in the file."""
    images = to_device(np.load(path, mmap_mode="r"), device())
    turn = training_turn(steps, params, images=images)
    return lambda: 1000 * params.ddpm.training.batch / turn()


def measure_training(points: list[tuple[int, int]], steps: int, params: Params) -> Table:
    """points: images, and their side."""
    rows = []
    with TemporaryDirectory() as folder:
        for n, side in points:
            path = write_images(Path(folder, "images.npy"), n, (1, side, side))
            ms, peak = alone(partial(training, path, params, steps))
            pixel = 1e6 * ms / params.ddpm.training.batch / side**2
            rows.append([f"{n:,} of {side}x{side}", path.stat().st_size / 2**20, ms, pixel, peak])
            path.unlink()
    note = f"Means of {steps} steps, batch {params.ddpm.training.batch}."
    note += "  On a CPU the set is mapped: pages that were read count, though the system can take them back."
    columns = ["training images", "set MiB", "ms a step", "ns a pixel", "peak MiB"]
    return Table("Growth with the training images and their pixels", columns, rows, note)


def train_together(steps: int, quick: bool) -> None:
    """Train in each process that torchrun starts; the first prints ms a step, and its peak, as JSON."""
    with process_group():
        params = settings_of(quick)
        turn = training_turn(steps, params, images=random_images(1_000)[0])
        ms = 1000 * params.ddpm.training.batch / turn()
        if is_main():
            print(json.dumps([ms, peak_mib()]), flush=True)


def measure_processes(counts: list[int], steps: int, quick: bool) -> Table:
    """Train data parallel with the same global batch; the processes share the cores of the machine."""
    rows, cores = [], os.cpu_count() or 1
    code = f"from benchmarks.growth import train_together; train_together({steps}, {quick})"
    for count in counts:
        threads = max(1, cores // count)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [*launch, "--no-python", sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        ms, peak = json.loads(done.stdout.splitlines()[-1])
        rows.append([count, threads, ms, rows[0][2] / ms if rows else 1.0, peak])
    columns = ["processes", "threads each", "ms a step", "speed-up", "peak MiB of the first"]
    return Table("Growth with the processes", columns, rows, f"{steps} steps at one global batch.")


def measure(settings: Settings) -> list[Table]:
    params, steps = settings_of(settings.quick), 2 if settings.quick else 10
    points = [(1_000, 16), (1_000, 28), (1_000, 32), (1_000, 64), (100_000, 28), (1_000_000, 28)]
    return [
        measure_training(points[:1] if settings.quick else points, steps, params),
        measure_processes([1] if settings.quick else [1, 2], steps, settings.quick),
    ]
