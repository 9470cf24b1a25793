"""Which settings of the DDPM are worth their time: one change at a time, at equal time of training, as queued DVC experiments.

    python -m benchmarks.ablation calibrate             # images of each variant in 180 s on one core -> benchmarks/results/ablation.json
    python -m benchmarks.ablation queue --seed 1        # one experiment a variant, ablation-NAME-1
    OMP_NUM_THREADS=1 dvc queue start -j 2              # a core for each; then `rediffuse sync` for their rows in MLflow
    python -m benchmarks.ablation table                 # what is done, as Markdown, best first

The training of a variant is as many images long as one core handles in the given time, measured in processor seconds.  So a
variant that computes faster sees more images, and a busy machine delays the experiments without changing their results.  Scored
are 5,000 images against the test images by both default instruments; the learning rate decays to 0 at the end of each training.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from benchmarks.ours import parameters, trainer
from benchmarks.peers import random_images
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.params import DDPM, Params
from rediffuse.tracking.git import git
from rediffuse.training.loop import Trainer

CALIBRATION = Path("benchmarks/results/ablation.json")
TURNS, STEPS = 3, 4  # of the calibration: the fastest step counts
INSTRUMENTS = ("fashion-mnist-cnn-v1", "random-conv-v1")
COMMON = {"sample.seeds": [1], "evaluate.accuracy_images": 0}  # of every experiment: one set of images, no accuracy score
COSTLY = ("fold", "width", "multipliers", "attention", "blocks", "training.batch")  # what else is changed takes no other time
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "eps": {"predict": "eps"},
    "x0": {"predict": "x0"},
    "linear": {"schedule": "linear"},
    "min-snr": {"loss_weight": "min-snr"},
    "ema-none": {"training.ema_half_life": 0},
    "ema-3x": {"training.ema_half_life": 30_000},
    "independent-t": {"stratified": False},
    "no-labels": {"conditional": False},
    "attention-7": {"attention": 7},
    "fold-1": {"fold": 1, "width": 24, "multipliers": [1, 2, 4]},
    "fold-4": {"fold": 4, "width": 96, "multipliers": [1]},
    "width-32": {"width": 32},
    "width-64": {"width": 64},
    "one-level": {"width": 64, "multipliers": [1]},
    "two-blocks": {"width": 32, "blocks": 2},
    "lr-half": {"training.lr": 3e-3},
    "lr-double": {"training.lr": 1.2e-2},
    "lr-constant": {"training.lr_decay": "constant"},
    "batch-32": {"training.batch": 32},
    "batch-128": {"training.batch": 128},
    "flips": {"flip": True},
}


@click.group()
def main() -> None:
    """See the module's text."""


@main.command()
@click.option("--seconds", default=180.0, show_default=True, help="Time of training, processor seconds of one core.")
def calibrate(seconds: float) -> None:
    """Measure how many images each variant handles in the time, on one core."""
    torch.set_num_threads(1)
    costs = {name: {key: changes[key] for key in COSTLY if key in changes} for name, changes in VARIANTS.items()}
    trainers = {name: trainer_with(changes) for name, changes in costs.items() if changes or name == "base"}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(TURNS):
        for name, each in trainers.items():
            each._step()
            for _ in range(STEPS):
                begin = time.process_time()
                each._step()
                times[name].append((time.process_time() - begin) / each.config.batch)
    images = {name: round(seconds / min(times[name if changes else "base"]) / 128) * 128 for name, changes in costs.items()}
    CALIBRATION.parent.mkdir(exist_ok=True)
    CALIBRATION.write_text(json.dumps({"seconds": seconds, "images": images}, indent=2) + "\n")
    click.echo(CALIBRATION.read_text())


@main.command()
@click.option("--seed", default=1, show_default=True)
@click.argument("names", nargs=-1)
def queue(seed: int, names: tuple[str, ...]) -> None:
    """Queue an experiment for each variant, or for those named."""
    images = json.loads(CALIBRATION.read_text())["images"]
    for name in names or VARIANTS:
        length = {f"training.{key}": images[name] for key in ("images", "validate_every", "checkpoint_every")}
        changes = COMMON | {"seed": seed} | {f"ddpm.{key}": value for key, value in (length | VARIANTS[name]).items()}
        given = [part for key, value in changes.items() for part in ("-S", f"{key}={yaml_value(value)}")]
        subprocess.run(["dvc", "exp", "run", "--queue", "--quiet", "-n", f"ablation-{name}-{seed}", *given, "evaluate_ddpm"], check=True)


@main.command()
def table() -> None:
    """Print what the experiments that are done have found."""
    images = json.loads(CALIBRATION.read_text())["images"]
    rows = [(name, found) for name in VARIANTS if (found := results(name))]
    rows.sort(key=lambda row: statistics.mean(scores[INSTRUMENTS[0]] for scores in row[1]))
    click.echo("| variant | change | images | " + " | ".join(f"FD, `{name}`" for name in INSTRUMENTS) + " | validation, eps |")
    click.echo("|---" * 6 + "|")
    for name, found in rows:
        changed = ", ".join(f"`{key}={yaml_value(value)}`" for key, value in VARIANTS[name].items())
        cells = [" / ".join(f"{scores[key]:.{4 if key == 'eps' else 2}f}" for scores in found) for key in (*INSTRUMENTS, "eps")]
        click.echo(f"| {name} | {changed} | {images[name]:,} | {' | '.join(cells)} |")


def settings(changes: dict[str, Any]) -> Params:
    """params.yaml with these changes to `ddpm`, by dotted names."""
    params = parameters()
    tree = params.ddpm.model_dump()
    for name, value in changes.items():
        group, _, leaf = name.rpartition(".")
        (tree[group] if group else tree)[leaf] = value
    return params.model_copy(update={"ddpm": DDPM.model_validate(tree)})


def trainer_with(changes: dict[str, Any]) -> Trainer[Denoiser]:
    """A trainer with these changes to `ddpm`, on made-up images."""
    params = settings(changes)
    return trainer(params, *random_images(), seen=params.ddpm.training.images, log=lambda *_: None, log_every=10**9)


def results(name: str) -> list[dict[str, float]]:
    """The scores of each seed of a variant that is done."""
    here = Path()
    listed = git(here, "for-each-ref", "--format=%(refname)", "refs/exps/")
    found = []
    for ref in sorted(ref for ref in listed.split() if ref.rpartition("/")[2].rpartition("-")[0] == f"ablation-{name}"):
        ddpm, trained = (json.loads(git(here, "show", f"{ref}:metrics/{file}.json")) for file in ("ddpm", "train_ddpm"))
        distances = {key: scores["fd"] for key, scores in ddpm.items() if isinstance(scores, dict)}
        named = {key: next(fd for name, fd in distances.items() if name.startswith(key)) for key in INSTRUMENTS}  # some bear a hash
        found.append(named | {"eps": trained["validation"]["eps_mse"]})
    return found


def yaml_value(value: Any) -> str:
    """As `-S` takes it."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


if __name__ == "__main__":
    main()
