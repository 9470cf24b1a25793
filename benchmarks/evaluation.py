"""All scores of one image set, beside torch-fidelity's on the same features.

`judge` gives fd, is, kid, precision and recall (the same numbers, which is checked) and fd_inf, density and
coverage. torch-fidelity is called through `calculate_metrics` as its documentation shows, with a registered
extractor that returns features as they are: once with its defaults, once with `save_cpu_ram`.  The time is
that of the call alone; the peak is of the whole process.  With its defaults torch-fidelity starts worker
processes, whose memory is not counted.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.report import RATIO, Settings, Table, peak_mib
from benchmarks.workers import Turn, Workers, ratio
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import judge
from rediffuse.params import Evaluate

DIMENSION, CLASSES = 64, 10
SUBSETS = {"kid_subsets": 100, "kid_subset_size": 1000}  # with the rest, torch-fidelity's defaults
SETTINGS = Evaluate(is_splits=10, **SUBSETS, neighbours=3, density_neighbours=5, accuracy_images=0)
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
    """Return features as they are; `dimension` of them are values, the others logits."""

    def __init__(self, name: str, features_list: list[str], *, dimension: int, **_) -> None:
        super().__init__(name, features_list)
        self.dimension = dimension

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts = {"values": rows[:, : self.dimension], "logits": rows[:, self.dimension :]}
        return tuple(parts[name] for name in self.features_list)  # its order depends on PYTHONHASHSEED

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
    """Return IS, FD, KID, precision and recall of `torch_fidelity.calculate_metrics`, under our names."""
    found = torch_fidelity.calculate_metrics(
        input1=Rows(generated),
        input2=Rows(real),
        feature_extractor="ready-features",
        dimension=generated.dimension,  # passed on to Ready
        cuda=False,  # its default fails without a GPU
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        **settings,
    )
    return {ours: found[theirs] for theirs, ours in NAMES.items()}


CONTENDERS = {
    OURS: lambda generated, real: judge(generated, real, SETTINGS),
    "torch-fidelity": partial(plain, verbose=False),
    "torch-fidelity, save_cpu_ram": partial(plain, verbose=False, save_cpu_ram=True),
}


def made_up(n: int, seed: int, scale: float) -> Features:
    """Return correlated features that are not quite Gaussian, and logits that depend on them."""
    mixing = np.random.default_rng(0).normal(size=(DIMENSION, DIMENSION)) / math.sqrt(DIMENSION)
    values = scale * np.tanh(np.random.default_rng(seed).normal(size=(n, DIMENSION))) @ mixing
    return Features(torch.from_numpy(values), 5 * torch.from_numpy(values[:, :CLASSES]))


def scoring(contender: str, n: int) -> Turn:
    """Return a turn that gives seconds and scores of one call, with n images on each side."""
    # Without this torch-fidelity's loaders are spawned too, and import everything anew, for minutes.
    multiprocessing.set_start_method(None, force=True)
    generated, real = made_up(n, seed=1, scale=1.1), made_up(n, seed=2, scale=1.0)

    def turn() -> dict[str, Any]:
        begin = time.perf_counter()
        scores = CONTENDERS[contender](generated, real)
        return {"seconds": time.perf_counter() - begin, "scores": scores}

    return turn


def check_same(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Raise RuntimeError if scores differ: then the times compare different work."""
    for name, found in scores.items():
        for metric in NAMES.values():
            if not math.isclose(found[metric], scores[OURS][metric], rel_tol=1e-6):
                raise RuntimeError(f"{metric}: {found[metric]} by {name}, {scores[OURS][metric]} by {OURS}")


def measure_scores(n: int, turns: int) -> Table:
    """Compare `judge` with torch-fidelity, n against n images."""
    with Workers({name: partial(scoring, name, n) for name in CONTENDERS}) as workers:
        results, memory = workers.turns(turns), workers.each(peak_mib)
    check_same({name: each[0]["scores"] for name, each in results.items()})
    times = {name: [turn["seconds"] for turn in each] for name, each in results.items()}
    rows = [[name, median(each), ratio(each, times[OURS]), memory[name]] for name, each in times.items()]
    note = (
        f"{n:,} against {n:,} images, {DIMENSION} features; medians of {turns} turns; equal scores, to 1e-6"
    )
    return Table("All scores of one image set", ["by", "seconds", RATIO, "peak MiB"], rows, note)


def measure(settings: Settings) -> list[Table]:
    return [measure_scores(*((1000, 1) if settings.quick else (10_000, settings.turns)))]
