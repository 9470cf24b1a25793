"""All scores of one image set by `rediffuse.evaluation`, against torch-fidelity called plainly on the same features.

    python benchmarks/evaluation.py                          # 10,000 against 10,000 images, 64 features: median of 3 turns
    python benchmarks/evaluation.py --images 2000 --turns 1  # a short trial

`judge` gives fd, is, kid, precision and recall (the same numbers, which is checked) and beside them fd_inf, density and coverage.
torch-fidelity is called through `calculate_metrics` as its documentation shows, with a registered extractor that hands the features
through: once with its defaults, once with `save_cpu_ram`.  Every call has its own process, in turn (A B C A B C ...); the time is that of
the call alone, the peak is what the process has held at most, imports and features included.  With its defaults torch-fidelity starts
worker processes, whose memory comes on top.  Times depend on the machine and its load; the ratios are what counts.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import judge
from rediffuse.params import Evaluate

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


def plain(generated: Features, real: Features, **settings) -> dict[str, float]:
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
    "rediffuse: judge": lambda generated, real: judge(generated, real, SETTINGS),
    "torch-fidelity": plain,
    "torch-fidelity, save_cpu_ram": lambda generated, real: plain(generated, real, save_cpu_ram=True),
}


def made_up(n: int, seed: int, scale: float) -> Features:
    """Correlated features that are not quite Gaussian, and logits that depend on them."""
    mixing = np.random.default_rng(0).normal(size=(DIMENSION, DIMENSION)) / math.sqrt(DIMENSION)
    values = torch.from_numpy(scale * np.tanh(np.random.default_rng(seed).normal(size=(n, DIMENSION))) @ mixing)
    return Features(values, 5 * values[:, :CLASSES])


def peak() -> float:
    """MiB that this process has held at most."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(contender: str, n: int) -> dict[str, float | dict[str, float]]:
    """Seconds, peak in MiB and scores of one call, in this process."""
    generated, real = made_up(n, seed=1, scale=1.1), made_up(n, seed=2, scale=1.0)
    begin = time.perf_counter()
    scores = CONTENDERS[contender](generated, real)
    return {"seconds": time.perf_counter() - begin, "peak": peak(), "scores": scores}


def measure_apart(contender: str, n: int) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--images", str(n), "--contender", contender]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout)


def check_same(turn: dict[str, dict]) -> None:
    """The contenders measured the same thing, or the times say nothing."""
    ours = turn["rediffuse: judge"]["scores"]
    for name, found in turn.items():
        for metric in NAMES.values():
            if not math.isclose(found["scores"][metric], ours[metric], rel_tol=1e-6):
                raise SystemExit(f"{name} gives {metric} = {found['scores'][metric]}, rediffuse {ours[metric]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="on each side")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help="measure one call here and print it as JSON")
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(measure(arguments.contender, arguments.images)))
        return
    turns = [{name: measure_apart(name, arguments.images) for name in CONTENDERS} for _ in range(arguments.turns)]
    for turn in turns:
        check_same(turn)
    medians = {name: [statistics.median(turn[name][of] for turn in turns) for of in ("seconds", "peak")] for name in CONTENDERS}
    base_seconds, base_peak = medians["rediffuse: judge"]
    versions = f"torch {torch.__version__}, torch-fidelity {torch_fidelity.__version__}, {torch.get_num_threads()} threads"
    print(f"{arguments.images} against {arguments.images} images, {DIMENSION} features, median of {arguments.turns}; {versions}")
    for name, (seconds, mebibytes) in medians.items():
        print(f"{name:30s} {seconds:7.2f} s {seconds / base_seconds:6.2f} x {mebibytes:8.0f} MiB {mebibytes / base_peak:6.2f} x")


if __name__ == "__main__":
    main()
