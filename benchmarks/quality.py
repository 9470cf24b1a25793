"""Quality at equal time: the Fréchet distance of what each contender draws after `--seconds` of training.

A shared machine has slower minutes, so time is counted in images: each contender is trained on as many as it
handles in that time, by a few turns of training before.  Its learning rate's schedule ends there.  Then it
draws 5,000 images from its averaged weights: ours as in params.yaml; the peers with their DDIM in 50 steps.
Distances are to the 10,000 test images, by two instruments.  The floor is the distance of 5,000 real training
images, the mean of three disjoint sets.  Ratio: excess over the floor of the contender / of ours.

Ours is the default recipe, with labels.  The peers are in their best setting (benchmarks/peers.py),
unconditional as their scripts are, with a learning rate of 1e-3: the documented 1e-4 and 8e-5 are meant for
days of training.  All train on the images that our stage trains on, 55,000.  The images are kept in
benchmarks/results, for `rediffuse judge`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import ours, peers, training
from benchmarks.report import RATIO, RESULTS, Cell, Settings, Table
from benchmarks.workers import Workers
from rediffuse.evaluation.fidelity import frechet_distance
from rediffuse.evaluation.instruments import make_instrument
from rediffuse.evaluation.record import real_sets
from rediffuse.images.image_set import ImageSet
from rediffuse.sources.fashion_mnist import load_fashion_mnist
from rediffuse.sources.splits import hold_out

OURS = training.DEFAULT
INSTRUMENTS = "fashion-mnist-cnn-v1", "random-conv-v1"
N, N_QUICK = 5000, 256  # images drawn; a distance needs twice as many as its instrument has dimensions
SETS = 3  # of real images, for the floor
LR, EVALUATIONS = 1e-3, 50  # of the peers
QUICK_STEPS = 10

Draw = Callable[[], torch.Tensor]


def measure(settings: Settings) -> list[Table]:
    n, batch = N_QUICK if settings.quick else N, ours.parameters().ddpm.training.batch
    done = {}
    for name, rate in throughput(settings).items():
        steps = QUICK_STEPS if settings.quick else max(1, round(rate * settings.seconds / batch))
        recipe = None if name == OURS else replace(training.peer_recipes(steps)[name], lr=LR)
        with Workers({name: partial(contender, steps, n, recipe)}) as workers:
            done[name] = workers.turns(1)[name][0] | {"images": steps * batch, "rate": rate}
        if not settings.quick:
            RESULTS.mkdir(parents=True, exist_ok=True)
            np.save(RESULTS / f"{name.partition(',')[0]}.npy", done[name]["samples"])
    splits = load_fashion_mnist()
    title = f"{QUICK_STEPS} steps" if settings.quick else f"{settings.seconds:.0f} s"
    names = INSTRUMENTS[1:] if settings.quick else INSTRUMENTS
    return [distances(name, splits, done, n, f"Quality after {title} of training, {name}") for name in names]


def throughput(settings: Settings) -> dict[str, float]:
    """Return images a second of ours and of each peer at its best."""
    steps = 2 if settings.quick else training.STEPS
    contenders = {OURS: partial(ours.training_turn, steps, ours.parameters())}
    for name, recipe in training.peer_recipes().items():
        if recipe.setting == "best":
            contenders[name] = partial(peers.training_turn, recipe, steps)
    with Workers(contenders) as workers:
        return {name: median(rates) for name, rates in workers.turns(settings.turns).items()}


def contender(steps: int, n: int, recipe: peers.Recipe | None) -> Callable[[], dict[str, Any]]:
    """Return a turn that trains and draws.  recipe None: ours."""

    def turn() -> dict[str, Any]:
        params = ours.parameters()
        train, _ = hold_out(load_fashion_mnist()["train"], params.data.validation, params.seed)
        begin = time.perf_counter()
        draw = train_peer(recipe, train, n) if recipe else train_ours(steps, train, n)
        trained = time.perf_counter()
        samples = draw().numpy()
        return {"samples": samples, "training": trained - begin, "sampling": time.perf_counter() - trained}

    return turn


def train_ours(steps: int, train: ImageSet, n: int) -> Draw:
    params = ours.parameters()
    images, labels = torch.tensor(train.images), None if train.labels is None else torch.tensor(train.labels)
    run = ours.trainer("ddpm", params, images, labels, seen=steps * params.ddpm.training.batch)
    model, _ = run.train(ours.NoCheckpoint())
    return lambda: ours.draw_images(model, params, n)


def train_peer(recipe: peers.Recipe, train: ImageSet, n: int) -> Draw:
    peer, stream = peers.contender(recipe), peers.batches(torch.tensor(train.images), recipe.batch)
    for _ in range(recipe.steps):
        peer.step(next(stream))
    return lambda: peer.sample(n, EVALUATIONS)


def distances(name: str, splits: dict[str, ImageSet], done: dict[str, Any], n: int, title: str) -> Table:
    """Return the table of one instrument."""
    train, test = splits["train"], splits["test"]
    with TemporaryDirectory() as folder:
        instrument = make_instrument(name, train, Path(folder))
    real = instrument.measure(test.images[: 2 * n])

    def distance(images: NDArray[np.uint8]) -> float:
        return frechet_distance(instrument.measure(images), real)

    floors = [distance(train.take(indices).images) for indices in real_sets(n, len(train), SETS)]
    rows: list[list[Cell]] = [["real training images", None, None, None, None, mean(floors), 0.0, None]]
    own = distance(done[OURS]["samples"]) - mean(floors)
    for contender, each in done.items():
        fd = distance(each["samples"])
        row: list[Cell] = [contender, each["rate"], each["images"], each["training"], each["sampling"]]
        rows.append([*row, fd, fd - mean(floors), (fd - mean(floors)) / own if own > 0 else None])
    note = (
        f"{n:,} images against the test images by {instrument.id} (SHA-256 {instrument.sha256[:12]});"
        f" one training each, the peers' with learning rate {LR:g}."
        f"  Floor: {min(floors):.3g} to {max(floors):.3g}."
    )
    columns = ["contender", "images/s before", "images trained on", "seconds of training", "of sampling"]
    return Table(title, [*columns, "FD", "excess over real", RATIO], rows, note)
