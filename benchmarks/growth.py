"""How time and memory grow: with the images of the training set, their pixels, T, the images drawn, and the processes.

Every point is measured in a process of its own, so that its peak of memory is its own.  Models are those of params.yaml, untrained; images
are made up.  Peaks hold the interpreter and the libraries, about half a GiB.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.made_up import TINY, NoCheckpoint, image_set
from benchmarks.ours import denoiser, trainer
from benchmarks.peers import SHAPE
from benchmarks.report import Settings, Table, peak_mib
from benchmarks.workers import Factory, Turn, Workers
from rediffuse.diffusion.schedule import Schedule
from rediffuse.params import Params, SampleDDPM, load_params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.runtime.shards import draw, shard_generator
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sources.fashion_mnist import CLASSES

Shape = tuple[int, int, int]
Way = Literal["copied", "mapped"]
WARMUP = 3  # steps
BLOCK = 10_000  # images written at once


def alone(factory: Factory) -> dict[str, Any]:
    """What one turn gives, in a process of its own, with the peak of that process in MiB."""
    with Workers({"point": factory}) as workers:
        return workers.turns(1)["point"][0] | {"peak": workers.peaks()["point"]}


def parameters(quick: bool, **ddpm: Any) -> Params:
    """Those of params.yaml; quick: with a denoiser that takes no time."""
    params = load_params()
    return params.model_copy(update={"ddpm": params.ddpm.model_copy(update=(TINY if quick else {}) | ddpm)})


# Training


def write_images(folder: Path, n: int, shape: Shape) -> Path:
    """A file of n made-up images and their labels, written block by block."""
    images = np.lib.format.open_memmap(folder / f"{n}.npy", mode="w+", dtype=np.uint8, shape=(n, *shape))
    block = image_set(min(n, BLOCK), shape).images
    for start in range(0, n, BLOCK):
        images[start : start + BLOCK] = block[: n - start]
    images.flush()
    return folder / f"{n}.npy"


def training(path: Path, way: Way, params: Params, steps: int) -> Turn:
    """A turn: ms of a training step on the images in the file.

    copied: into memory, as the stages do; mapped: read from the file, image by image, when they are needed.
    """
    make_deterministic()
    images = np.load(path, mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a map is not writable
        data = torch.tensor(images, device=device()) if way == "copied" else torch.from_numpy(images)
    labels = torch.arange(len(data), device=data.device) % len(CLASSES)
    batch = params.ddpm.training.batch
    run = trainer(params, data, labels, seen=(WARMUP + steps) * batch, log=lambda *_: None, log_every=batch)

    def turn() -> dict[str, float]:
        times = list[float]()
        for _ in range(WARMUP + steps):
            begin = time.perf_counter()
            run._step()
            times.append(time.perf_counter() - begin)
        return {"ms": 1000 * statistics.median(times[WARMUP:])}

    return turn


def measure_images(sizes: list[int], steps: int, *, quick: bool) -> Table:
    """The size of the training set."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            path = write_images(Path(folder), n, SHAPE)
            ways: tuple[Way, ...] = ("copied", "mapped")
            points = [alone(partial(training, path, way, parameters(quick), steps)) for way in ways]
            size = path.stat().st_size / 2**20
            rows.append([f"{n:,}", size, *(point["ms"] for point in points), *(point["peak"] for point in points)])
            path.unlink()
    note = (
        f"median of {steps} steps of the default DDPM, batch {load_params().ddpm.training.batch}; copied: the set is copied into memory, as"
        " the stages do; mapped: it is read from the file as needed, and its pages that were read count in the peak though they can be"
        " given back"
    )
    columns = ["training images, 28x28", "set MiB", "ms a step, copied", "mapped", "peak MiB, copied", "mapped"]
    return Table("growth with the training set", columns, rows, note)


def measure_pixels(sides: list[int], steps: int, *, quick: bool) -> Table:
    """The size of an image."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            shape = (1, side, side)
            path = write_images(Path(folder), 1_000, shape)
            point = alone(partial(training, path, "copied", parameters(quick), steps))
            rows.append([f"{side}x{side}", point["ms"], 1e6 * point["ms"] / load_params().ddpm.training.batch / side**2, point["peak"]])
            path.unlink()
    note = f"median of {steps} steps of the default DDPM; attention, if any, grows with the square of the pixels, the rest in proportion"
    return Table("growth with the pixels", ["image", "ms a step", "ns a pixel", "peak MiB"], rows, note)


# Sampling


def sampling(params: Params, n: int, settings: SampleDDPM) -> Turn:
    """A turn: ms of one step of a shard, of n images drawn; and of making the schedule with its tables."""
    make_deterministic()
    model = denoiser(params).to(device()).to(memory_format=torch.channels_last).eval()
    shard = ddpm_shards(model, settings, params.precision)

    def turn() -> dict[str, float]:
        begin = time.perf_counter()
        made = Schedule.make(params.ddpm.schedule, params.ddpm.T)
        tables = [made.log_snr, made.snr, made.alpha_bar, made.one_minus_alpha_bar, made.beta]
        schedule = time.perf_counter() - begin
        with torch.inference_mode():
            shard(torch.arange(64), shard_generator(0, 0))
            begin = time.perf_counter()
            images = draw(n, shard, seed=1, title="growth")
        seconds = time.perf_counter() - begin
        kib = sum(table.nbytes for table in tables) / 1024
        return {
            "schedule": 1000 * schedule,
            "kib": kib,
            "ms": 1000 * seconds / settings.steps / -(-n // 64),
            "s": seconds,
            "mib": images.nbytes / 2**20,
        }

    return turn


def _sampler(steps: int) -> SampleDDPM:
    return SampleDDPM(sampler="ddim", steps=steps, spacing="even", eta=0.0, guidance_scale=1.0)


def measure_T(values: list[int], *, quick: bool) -> Table:
    """The steps of the schedule: the network sees t / T, so only the tables grow."""
    rows = []
    for T in values:
        point = alone(partial(sampling, parameters(quick, T=T), 64, _sampler(10)))
        rows.append([f"{T:,}", point["ms"], point["schedule"], point["kib"], point["peak"]])
    columns = ["T", "ms a sampling step of 64 images", "ms to make the schedule", "KiB of its tables", "peak MiB"]
    return Table("growth with T", columns, rows, "64 images in 10 steps of ddim")


def measure_drawn(counts: list[int], *, quick: bool) -> Table:
    """The images drawn."""
    rows = []
    for n in counts:
        point = alone(partial(sampling, parameters(quick), n, _sampler(2)))
        rows.append([f"{n:,}", 1000 * point["s"] / n, point["mib"], point["peak"]])
    note = "in 2 steps of ddim; the result is held in memory as uint8"
    return Table("growth with the images drawn", ["images drawn", "ms an image", "result MiB", "peak MiB"], rows, note)


# Processes


def train_together(steps: int, quick: bool) -> None:
    """What each of the processes runs: prints, from the first one, the ms of a training step and its peak as JSON."""
    from rediffuse.runtime.processes import is_main, process_group

    with process_group():
        params = parameters(quick)
        make_deterministic()
        made = image_set(1_000)
        assert made.labels is not None
        data, labels = torch.from_numpy(made.images).to(device()), torch.from_numpy(made.labels).to(device())
        seen = steps * params.ddpm.training.batch
        run = trainer(params, data, labels, seen=seen, log=lambda *_: None, log_every=seen)
        began = time.perf_counter()
        run.train(NoCheckpoint())
        ms = 1000 * (time.perf_counter() - began) / steps
        if is_main():
            print(json.dumps({"ms": ms, "peak": peak_mib()}), flush=True)


def measure_processes(counts: list[int], steps: int, *, quick: bool) -> Table:
    """Data parallel on this machine, the same global batch, its cores divided among the processes."""
    rows, cores = [], os.cpu_count() or 1
    for count in counts:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        threads = {"OMP_NUM_THREADS": str(max(1, cores // count)), "TQDM_DISABLE": "1"}
        code = f"from benchmarks.growth import train_together; train_together({steps}, {quick})"
        launch = ["torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={port}", "--no-python"]
        command = [sys.executable, "-m", *launch, sys.executable, "-c", code]
        done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
        point = json.loads(done.stdout.splitlines()[-1])
        rows.append([count, int(threads["OMP_NUM_THREADS"]), point["ms"], rows[0][2] / point["ms"] if rows else 1.0, point["peak"]])
    columns = ["processes", "threads each", "ms a step", "speed-up", "peak MiB of the first"]
    return Table(
        "growth with the processes", columns, rows, f"{steps} steps of the default DDPM at one global batch, on one machine, by gloo"
    )


def measure(settings: Settings) -> list[Table]:
    quick = settings.quick
    steps = 2 if quick else 10
    return [
        measure_images([1_000] if quick else [1_000, 100_000, 1_000_000], steps, quick=quick),
        measure_pixels([16] if quick else [16, 28, 32, 64], steps, quick=quick),
        measure_T([100] if quick else [100, 1_000, 4_000], quick=quick),
        measure_drawn([128] if quick else [1_000, 4_000], quick=quick),
        measure_processes([1] if quick else [1, 2], steps, quick=quick),
    ]
