"""On real Fashion-MNIST images, every instrument must call worse images worse, and equal ones equal.

The same features give the same bits, for any PYTHONHASHSEED and state of the random generators. Another
number of threads changes only the last bits of sums.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import expected_bias, frechet_distance, judge
from rediffuse.evaluation.instruments import Instrument, make_instrument
from rediffuse.images.image_set import ImageSet
from rediffuse.params import Evaluate

ROUNDING = {"fashion-mnist-cnn-v1": 1e-5, "random-conv-v1": 1e-9}  # float32, float64
SETTINGS = Evaluate(
    is_splits=5, kid_subsets=10, kid_subset_size=200, neighbours=3, density_neighbours=5, accuracy_images=0
)
N = 1000
Images = NDArray[np.uint8]
Sets = dict[str, ImageSet]


@pytest.fixture(scope="module", params=list(ROUNDING))
def instrument(
    request: pytest.FixtureRequest, fashion_mnist: Sets, tmp_path_factory: pytest.TempPathFactory
) -> Instrument:
    """Made from training images that take no further part."""
    train = fashion_mnist["train"].take(np.arange(50_000, 53_000))
    return make_instrument(request.param, train, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def images(fashion_mnist: Sets) -> Images:
    """Real images that pose as generated ones."""
    return np.array(fashion_mnist["train"].images[:N])


@pytest.fixture(scope="module")
def perfect(instrument: Instrument, images: Images) -> Features:
    return instrument.measure(images)


@pytest.fixture(scope="module")
def real(instrument: Instrument, fashion_mnist: Sets) -> Features:
    return instrument.measure(fashion_mnist["test"].images[:N])


def as_images(values: NDArray[np.float64]) -> Images:
    return np.clip(values, 0, 255).round().astype(np.uint8)


def with_noise(images: Images, strength: float) -> Images:
    return as_images(images + np.random.default_rng(1).normal(0, strength, images.shape))


def blurred(images: Images, strength: float) -> Images:
    return gaussian_filter(images, (0, 0, strength, strength))


def occluded(images: Images, strength: float) -> Images:
    """A grey square over the middle."""
    out, middle = images.copy(), slice(14 - int(strength), 14 + int(strength))
    out[:, :, middle, middle] = 128
    return out


def salted_and_peppered(images: Images, strength: float) -> Images:
    drawn = np.random.default_rng(2).random(images.shape)
    return np.where(drawn < strength / 2, 0, np.where(drawn > 1 - strength / 2, 255, images)).astype(np.uint8)


def brightened(images: Images, strength: float) -> Images:
    return as_images(images + strength)


def assert_rises(distances: list[float]) -> None:
    assert all(low < high for low, high in itertools.pairwise(distances)), distances


@pytest.mark.parametrize(
    ("damage", "strengths"),
    [
        (with_noise, (5, 15, 40, 100)),
        (blurred, (0.4, 0.7, 1.2, 2.5)),
        (occluded, (2, 4, 8, 12)),
        (brightened, (10, 30, 60)),
        (salted_and_peppered, (0.01, 0.03, 0.1, 0.3)),
    ],
)
def test_distance_rises_with_damage(
    instrument: Instrument,
    images: Images,
    perfect: Features,
    real: Features,
    damage: Callable[[Images, float], Images],
    strengths: tuple[float, ...],
) -> None:
    damaged = [instrument.measure(damage(images, strength)) for strength in strengths]
    assert_rises([frechet_distance(found, real) for found in (perfect, *damaged)])


def test_distance_rises_and_coverage_falls_with_every_two_classes_that_are_missing(
    instrument: Instrument, real: Features, fashion_mnist: Sets
) -> None:
    train, found = fashion_mnist["train"], []
    assert train.labels is not None
    for classes in (10, 8, 6, 4, 2):
        first = np.flatnonzero(train.labels[:10_000] < classes)[:N]
        found.append(judge(instrument.measure(train.images[first]), real, SETTINGS))
    assert_rises([scores["fd"] for scores in found])
    assert_rises([-scores["coverage"] for scores in found])


def test_real_images_score_as_a_perfect_generator(perfect: Features, real: Features) -> None:
    # Copies of the training set too: only the memorisation shows them.
    scores = judge(perfect, real, SETTINGS)
    assert scores["fd"] < 2 * expected_bias(real, N)
    assert scores["coverage"] > 0.93 and 0.9 < scores["density"] < 1.1
    both, distances = torch.cat([perfect.values, real.values]), []
    for seed in range(20):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(2 * N))
        distances.append(frechet_distance(Features(both[order[:N]]), Features(both[order[N:]])))
    assert np.mean(distances) == pytest.approx(expected_bias(real, N), rel=0.1)


SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from rediffuse.evaluation.fidelity import judge
from rediffuse.evaluation.instruments import make_instrument
from rediffuse.images.image_set import ImageSet
from rediffuse.params import Evaluate
folder, names, settings = Path(sys.argv[1]), json.loads(sys.argv[2]), Evaluate(**json.loads(sys.argv[3]))
arrays = np.load(folder / "arrays.npz")
train = ImageSet(arrays["train"], arrays["labels"], tuple(arrays["classes"].tolist()))
scores = {}
for name in names:
    instrument = make_instrument(name, train, folder / f"{name}-{sys.argv[4]}")
    scores[name] = judge(*(instrument.measure(half) for half in np.split(arrays["images"], 2)), settings)
print(json.dumps(scores))
"""


def test_hash_seed_changes_nothing_and_thread_count_only_rounding(
    fashion_mnist: Sets, tmp_path: Path
) -> None:
    train, test = (fashion_mnist[name].take(np.arange(600)) for name in ("train", "test"))
    named = {"train": train.images, "labels": train.labels, "classes": train.classes, "images": test.images}
    np.savez(tmp_path / "arrays.npz", **named)  # type: ignore[arg-type]

    def start(hash_seed: str, threads: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join(sys.path)
        own = {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": paths}
        of_run = [json.dumps(list(ROUNDING)), SETTINGS.model_dump_json(), f"{hash_seed}-{threads}"]
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), *of_run]
        return subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, text=True)

    runs = [start("0", "1"), start("1", "1"), start("1", "2")]
    one, other_seed, other_threads = (json.loads(run.communicate()[0]) for run in runs)
    assert one == other_seed
    for name, rounding in ROUNDING.items():
        assert other_threads[name] == pytest.approx(one[name], rel=rounding, abs=rounding)
