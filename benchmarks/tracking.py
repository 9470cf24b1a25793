"""What tracking costs: the same training with and without a row.

Training runs in turn (off on off on ...) in one process, through the Trainer, without checkpoints and validation.  With tracking it
stands inside a real `stage_run` on SQLite: points are sent, and MLflow samples the machine in a thread.  `start` and `end` of the row are
measured apart and come once for a stage, however long it trains; so the share of the default run is reckoned from the parts:

    (start + end + points in a training of its length) / (seconds of a training of its length)

The ratio on / off of the loops has the noise of the machine in it, of processor seconds less than of wall-clock seconds.  Target:
at most 2 % of training time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.checkout import ROOT, make_repository, quiet_environment
from benchmarks.made_up import NoCheckpoint, image_set
from benchmarks.ours import trainer
from benchmarks.report import Settings, Table
from rediffuse.params import Params, load_params
from rediffuse.runtime.device import make_deterministic
from rediffuse.tracking.row import stage_run

Log = Callable[[int, dict[str, float]], None]
IMAGES = 9600  # in each turn of training


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """(wall-clock seconds, processor seconds of all threads)."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


class Training:
    """The default training of the DDPM on images of noise, without and with a row; `params.yaml` is in the working directory."""

    def __init__(self, params: Params, images: int) -> None:
        self.params, self.images = params, images
        made = image_set(4096)
        assert made.labels is not None
        self.data, self.labels = torch.from_numpy(made.images), torch.from_numpy(made.labels)

    def plain(self, log: Log = lambda *_: None) -> tuple[float, float]:
        """Wall-clock and processor seconds of the loop."""
        every = self.params.ddpm.training.log_every
        run = trainer(self.params, self.data, self.labels, seen=self.images, log=log, log_every=every)
        return spent(lambda: run.train(NoCheckpoint()))

    def tracked(self) -> dict[str, float]:
        """Seconds of each part of a stage with a row."""
        points = list[float]()
        began = time.perf_counter()
        with stage_run("train_ddpm", self.params) as run:
            start = time.perf_counter() - began

            def log(seen: int, values: dict[str, float]) -> None:
                points.append(spent(lambda: run.log_curve(seen, {f"ddpm/{name}": value for name, value in values.items()}))[0])

            wall, processor = self.plain(log)
            began = time.perf_counter()
        return {"start": start, "wall": wall, "processor": processor, "points": sum(points), "end": time.perf_counter() - began}


def first_row(params: Params) -> dict[str, float]:
    """Seconds that a row takes to begin and to end with the import of MLflow, as in every stage."""
    began = time.perf_counter()
    with stage_run("prepare", params):
        start = time.perf_counter() - began
        began = time.perf_counter()
    return {"start": start, "end": time.perf_counter() - began}


def measure_training(turns: int, images: int) -> Table:
    """The loop without and with a row, their ratio, and the parts that tracking takes."""
    params = load_params(ROOT / "params.yaml")
    make_deterministic()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        make_repository(Path(folder))
        store = f"from rediffuse.tracking.store import connect; connect('sqlite:///{folder}/.mlflow/mlflow.db')"
        Path(".mlflow").mkdir()
        subprocess.run([sys.executable, "-c", store], env=quiet_environment(PYTHONPATH=str(ROOT / "src")), check=True)
        first = first_row(params)
        Training(params, min(images, 20 * params.ddpm.training.batch)).plain()  # warms up
        training = Training(params, images)
        rounds = [(training.plain(), training.tracked()) for _ in range(turns)]
    return _table(rounds, first, images, params.ddpm.training.images)


def _table(rounds: list[tuple[tuple[float, float], dict[str, Any]]], first: dict[str, float], images: int, whole: int) -> Table:
    mean = {part: median(on[part] for _, on in rounds) for part in rounds[0][1]}
    plain = median(wall for (wall, _), _ in rounds)
    walls = [on["wall"] / wall for (wall, _), on in rounds]
    processors = [on["processor"] / processor for (_, processor), on in rounds]
    seconds = plain * whole / images
    paid = first["start"] + first["end"] + mean["points"] * whole / images
    rows: list[list[str | float | int | None]] = [
        ["training without a row", plain, "s", ""],
        ["with one, without its start and end", mean["wall"], "s", ""],
        ["on / off, wall-clock", median(walls), "", " ".join(f"{value:.3f}" for value in walls)],
        ["on / off, processor", median(processors), "", " ".join(f"{value:.3f}" for value in processors)],
        ["start of a row", mean["start"], "s", f"in a new process {first['start']:.2f} s"],
        ["end of a row", mean["end"], "s", f"in a new process {first['end']:.2f} s"],
        ["points, all calls", mean["points"], "s", f"{100 * mean['points'] / plain:.2f} % of training"],
        [f"a row's share of the default run, {whole:,} images", 100 * paid / seconds, "%", f"{paid:.1f} of {seconds:.0f} s"],
    ]
    note = f"{images:,} images in each of {len(rounds)} turns"
    return Table("what tracking costs in training", ["", "median", "unit", "of it"], rows, note)


def measure(settings: Settings) -> list[Table]:
    os.environ |= {name: "" for name in ("MLFLOW_TRACKING_URI", "REDIFFUSE_TRACKING") if name in os.environ}
    return [measure_training(*((1, 128) if settings.quick else (settings.turns, IMAGES)))]
