"""All scores of one image set, ours against torch-fidelity on the same features; and all of an evaluation, part by part.

`judge` gives fd, is, kid, precision and recall (the same numbers, which is checked) and beside them fd_inf, density and coverage.
torch-fidelity is called through `calculate_metrics` as its documentation shows, with a registered extractor that hands the features
through: once with its defaults, once with `save_cpu_ram`.  Every contender has its own process, in turn (A B C A B C ...); the time is
that of the call alone, the peak is what the process has held at most, imports and features included.  With its defaults torch-fidelity
starts worker processes, whose memory comes on top.

The whole evaluation: training images 50,000 to 60,000 of Fashion-MNIST pose as samples; the other 50,000 are what they may have been
copied from.  The reference features of the test images are measured once per data set by the stage `reference`, and stand apart.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.made_up import image_set
from benchmarks.report import RATIO, Settings, Table
from benchmarks.workers import Turn, Workers, ratio
from rediffuse.evaluation.accuracy_score import IMAGES, classification_accuracy_score
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import SEED, class_distances, judge
from rediffuse.evaluation.instruments import make_instrument
from rediffuse.evaluation.memorisation import Neighbourhood, memorisation
from rediffuse.evaluation.shipped import SHIPPED
from rediffuse.params import Evaluate, load_params
from rediffuse.runtime.device import autocast, device
from rediffuse.sources.fashion_mnist import load_fashion_mnist

DIMENSION, CLASSES = 64, 10
SETTINGS = Evaluate(
    is_splits=10, kid_subsets=100, kid_subset_size=1000, neighbours=3, density_neighbours=5, accuracy_images=0
)  # torch-fidelity's defaults
NAMES = {  # of torch-fidelity -> ours
    "frechet_inception_distance": "fd",
    "inception_score_mean": "is",
    "kernel_inception_distance_mean": "kid",
    "precision": "precision",
    "recall": "recall",
}
OURS = "rediffuse: judge"


class Rows(Dataset[Tensor]):
    """Features as torch-fidelity takes data from memory: one tensor for each image, here [values, logits]."""

    def __init__(self, features: Features) -> None:
        assert features.logits is not None
        self.rows = torch.cat([features.values, features.logits], dim=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class Ready(torch_fidelity.FeatureExtractorBase):
    """Takes features, gives features; `dimension` of them are values, the others logits."""

    def __init__(self, name: str, features_list: list[str], *, dimension: int, **_) -> None:
        super().__init__(name, features_list)
        self.dimension = dimension

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts = {"values": rows[:, : self.dimension], "logits": rows[:, self.dimension :]}
        return tuple(parts[name] for name in self.features_list)  # a list made from a set: its order hangs on PYTHONHASHSEED

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "values", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "values"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


torch_fidelity.register_feature_extractor("ready-features", Ready)


def plain(generated: Features, real: Features, **settings: Any) -> dict[str, float]:
    """IS, FD, KID, precision and recall from `torch_fidelity.calculate_metrics`, under our names."""
    found = torch_fidelity.calculate_metrics(
        input1=Rows(generated),
        input2=Rows(real),
        feature_extractor="ready-features",
        dimension=generated.dimension,  # handed on to Ready
        cuda=False,  # its default breaks where there is no GPU
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        **settings,
    )
    return {ours: found[theirs] for theirs, ours in NAMES.items()}


CONTENDERS = {
    OURS: lambda generated, real: judge(generated, real, SETTINGS),
    "torch-fidelity": lambda generated, real: plain(generated, real, verbose=False),
    "torch-fidelity, save_cpu_ram": lambda generated, real: plain(generated, real, verbose=False, save_cpu_ram=True),
}


def made_up(n: int, seed: int, scale: float) -> Features:
    """Correlated features that are not quite Gaussian, and logits that depend on them."""
    mixing = np.random.default_rng(0).normal(size=(DIMENSION, DIMENSION)) / math.sqrt(DIMENSION)
    values = torch.from_numpy(scale * np.tanh(np.random.default_rng(seed).normal(size=(n, DIMENSION))) @ mixing)
    return Features(values, 5 * values[:, :CLASSES])


def scoring(contender: str, n: int) -> Turn:
    """A turn: seconds and scores of one call, n images on each side."""
    # A process that was spawned spawns its own as well, which would make torch-fidelity's loaders import everything anew, for minutes.
    multiprocessing.set_start_method(None, force=True)
    generated, real = made_up(n, seed=1, scale=1.1), made_up(n, seed=2, scale=1.0)

    def turn() -> dict[str, Any]:
        begin = time.perf_counter()
        scores = CONTENDERS[contender](generated, real)
        return {"seconds": time.perf_counter() - begin, "scores": scores}

    return turn


def check_same(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Raise RuntimeError unless the contenders measured the same thing: else the times say nothing."""
    for name, found in scores.items():
        for metric in NAMES.values():
            if not math.isclose(found[metric], scores[OURS][metric], rel_tol=1e-6):
                raise RuntimeError(f"{name} gives {metric} = {found[metric]}, rediffuse {scores[OURS][metric]}")


def measure_scores(n: int, turns: int) -> Table:
    """`judge` against torch-fidelity, n against n images."""
    with Workers({name: partial(scoring, name, n) for name in CONTENDERS}) as workers:
        results, peaks = workers.turns(turns), workers.peaks()
    for number in range(turns):
        check_same({name: turn[number]["scores"] for name, turn in results.items()})
    times = {name: [turn["seconds"] for turn in of] for name, of in results.items()}
    rows = [
        [name, statistics.median(spent), ratio(spent, times[OURS]), peaks[name], peaks[name] / peaks[OURS]] for name, spent in times.items()
    ]
    note = f"{n:,} against {n:,} images, {DIMENSION} features; median of {turns} turns; the same scores in each, to 1e-6"
    return Table("all scores of one image set", ["by", "s", RATIO, "peak MiB", "of ours"], rows, note)


# All that one sample set is judged by


def whole(quick: bool) -> Turn:
    """A turn: seconds of each part of an evaluation, by name; the last is the sum of those of one sample set."""
    params = load_params().evaluate
    settings = params.model_copy(update={"kid_subset_size": 100, "accuracy_images": 1280} if quick else {"accuracy_images": IMAGES})
    splits = {"train": image_set(1200), "test": image_set(400, seed=1)} if quick else load_fashion_mnist()
    train, test = splits["train"], splits["test"]
    boundary = len(train) * 5 // 6
    samples, seen_before = train.take(np.arange(boundary, len(train))), train.take(np.arange(boundary))
    with tempfile.TemporaryDirectory() as folder:
        instrument = make_instrument(SHIPPED[0], train, Path(folder))

    def turn() -> dict[str, float]:
        spent = dict[str, float]()

        @contextmanager
        def part(name: str) -> Iterator[None]:
            begin = time.perf_counter()
            yield
            spent[name] = time.perf_counter() - begin

        with part("(once per data set: features and neighbours of the test images)"):
            real, unseen = instrument.measure(test.images), Neighbourhood.of(test.images, seen_before.images)
        with part("all of one sample set"):
            with part("features"):
                seen = instrument.measure(samples.images)
            with part("fd, fd_inf, kid, is, precision, recall, density, coverage"):
                judge(seen, real, settings)
            with part("distance by class"):
                class_distances(seen, torch.from_numpy(samples.labels), real, torch.from_numpy(test.labels), test.classes)
            with part("memorisation"):
                memorisation(Neighbourhood.of(samples.images, seen_before.images), unseen)
            with part("accuracy score"):
                classification_accuracy_score(
                    samples.images,
                    samples.labels,
                    test.images,
                    test.labels,
                    len(test.classes),
                    seed=SEED,
                    seen=settings.accuracy_images,
                    device=device(),
                    autocast=autocast(device(), "auto"),
                )
        return spent

    return turn


def measure_whole(*, quick: bool = False) -> Table:
    """Everything that one sample set is judged by, with one instrument."""
    with Workers({"whole": partial(whole, quick)}) as workers:
        (spent,), peak = workers.turns(1)["whole"], workers.peaks()["whole"]
    note = f"10,000 images of Fashion-MNIST, {SHIPPED[0]}; one run; peak {peak:,.0f} MiB"
    return Table("a whole evaluation, part by part", ["part", "s"], [[name, seconds] for name, seconds in spent.items()], note)


def measure(settings: Settings) -> list[Table]:
    n, turns = (1000, 1) if settings.quick else (10_000, settings.turns)
    return [measure_scores(n, turns), measure_whole(quick=settings.quick)]
