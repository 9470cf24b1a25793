"""What passes before a stage begins its work.

A new process runs the stage on images of noise and untrained models, and ends after its first training step,
or after the first shard of 64 images is drawn.  Target: 3 s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.ours import denoiser, image_set, vae
from benchmarks.report import Settings, Table
from rediffuse.images.image_set import save_images
from rediffuse.params import load_params
from rediffuse.runtime.weights import save_model
from rediffuse.sources.splits import describe

ROOT = Path(__file__).resolve().parents[1]
STAGES = "train_vae", "train_ddpm", "sample_vae", "sample_ddpm"
SPLITS = {"train": 512, "validation": 64, "test": 64}

# Runs a stage until its first unit of work is done; prints when its imports and when its work was done.
PROBE = """
import importlib, os, sys, time
name = sys.argv[1]
stage = importlib.import_module(f"stages.{name}")
imported = time.time()

def leave():
    print(imported, time.time(), time.process_time(), flush=True)
    os._exit(0)

if name.startswith("train"):
    from rediffuse.training.loop import Trainer
    step = Trainer._step
    Trainer._step = lambda trainer: (step(trainer), leave())
else:
    import torch
    from rediffuse.runtime.shards import SHARD, shard_generator
    from rediffuse.sampling import sets
    sets.draw = lambda n, shard, **_: (shard(torch.arange(SHARD), shard_generator(1, 0)), leave())
stage.main()
"""


def run(root: Path, *command: str) -> str:
    """Run in the folder, without this process's settings of DVC, MLflow and git; return the output."""
    steering = ("DVC_", "MLFLOW_", "REDIFFUSE_", "GIT_")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    mine |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    done = subprocess.run(command, cwd=root, env=mine, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def make_repository(root: Path) -> None:
    """Make a git and DVC repository with the settings of the checkout and what the folder contains."""
    for name in ("params.yaml", "dvc.yaml", "requirements.lock"):
        shutil.copyfile(ROOT / name, root / name)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").touch()
    (root / ".gitignore").write_text("/.mlflow/\n/.dvc/tmp/\n/.dvc/cache/\n/data/\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "benchmark"]):
        run(root, "git", "-c", "user.name=benchmark", "-c", "user.email=benchmark", *command)


def make_inputs(root: Path) -> None:
    """Write images of noise and untrained models, as the stages write theirs."""
    params, splits = load_params(ROOT / "params.yaml"), {name: image_set(n) for name, n in SPLITS.items()}
    save_images(root / "data/pixels", splits, describe(splits, {"set": "random", "source": "benchmark"}))
    save_model(vae(params), root / "data/models/vae")
    save_model(denoiser(params), root / "data/models/ddpm")


def start(root: Path, stage: str) -> tuple[float, float, float, float]:
    """Return seconds to the first work, of imports, of the rest; and processor seconds."""
    began = time.time()
    imported, worked, processor = map(float, run(root, sys.executable, "-c", PROBE, stage).split()[-3:])
    return worked - began, imported - began, worked - imported, processor


def measure(settings: Settings) -> list[Table]:
    turns, stages = (1, STAGES[1:2]) if settings.quick else (settings.turns, STAGES)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        make_repository(root)
        make_inputs(root)
        starts = {stage: [start(root, stage) for _ in range(turns + 1)][1:] for stage in stages}
    rows = [[stage, *map(median, zip(*found, strict=True))] for stage, found in starts.items()]
    columns = ["stage", "s to its first work", "imports", "data, model, first work", "processor s"]
    note = f"Medians of {turns}; the first start of each stage, which compiles, is not counted."
    return [Table("Start of a stage", columns, rows, note)]
