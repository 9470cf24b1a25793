"""The sanity suite: on real Fashion-MNIST images, every ruler must call worse images worse, and equal ones equal.

What is promised: the same features give the same bits, whatever PYTHONHASHSEED and the state of any random generator; another order of
the images, batch size or number of threads changes the last bits of sums, and nothing else.  No worker processes are started.
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
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import expected_bias, frechet_distance, judge
from rediffuse.evaluation.instruments import Instrument, make_instrument, open_instrument
from rediffuse.images.image_set import ImageSet
from rediffuse.params import Evaluate

INSTRUMENTS = ("fashion-mnist-cnn-v1", "random-conv-v1", "pixel-pca-v1")
ROUNDING = {"fashion-mnist-cnn-v1": 1e-5, "random-conv-v1": 1e-9, "pixel-pca-v1": 1e-9}  # float32, float64, float64
SETTINGS = Evaluate(is_splits=5, kid_subsets=10, kid_subset_size=200, neighbours=3, density_neighbours=5, accuracy_images=0)
N = 1000
Images = NDArray[np.uint8]


@pytest.fixture(scope="module", params=INSTRUMENTS)
def folder(request: pytest.FixtureRequest, fashion_mnist: dict[str, ImageSet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an instrument, made from training images that take no further part."""
    folder = tmp_path_factory.mktemp(request.param)
    make_instrument(request.param, fashion_mnist["train"].take(np.arange(50_000, 53_000)), folder)
    return folder


@pytest.fixture(scope="module")
def instrument(folder: Path) -> Instrument:
    return open_instrument(folder)


@pytest.fixture(scope="module")
def images(fashion_mnist: dict[str, ImageSet]) -> Images:
    """Real images that pose as generated ones."""
    return np.array(fashion_mnist["train"].images[:N])


@pytest.fixture(scope="module")
def perfect(instrument: Instrument, images: Images) -> Features:
    return instrument.measure(images)


@pytest.fixture(scope="module")
def real(instrument: Instrument, fashion_mnist: dict[str, ImageSet]) -> Features:
    return instrument.measure(fashion_mnist["test"].images[:N])


def with_noise(images: Images, strength: float) -> Images:
    return np.clip(images + np.random.default_rng(1).normal(0, strength, images.shape), 0, 255).round().astype(np.uint8)


def blurred(images: Images, strength: float) -> Images:
    return gaussian_filter(images, (0, 0, strength, strength))


def occluded(images: Images, strength: float) -> Images:
    """A grey square over the middle."""
    out, half = images.copy(), int(strength)
    out[:, :, 14 - half : 14 + half, 14 - half : 14 + half] = 128
    return out


def salted_and_peppered(images: Images, strength: float) -> Images:
    drawn = np.random.default_rng(2).random(images.shape)
    return np.where(drawn < strength / 2, 0, np.where(drawn > 1 - strength / 2, 255, images)).astype(np.uint8)


def brightened(images: Images, strength: float) -> Images:
    return np.clip(images + strength, 0, 255).astype(np.uint8)


def permuted(features: Features, seed: int) -> Features:
    return features.take(torch.from_numpy(np.random.default_rng(seed).permutation(len(features))))


def assert_rises(distances: list[float]) -> None:
    assert all(low < high for low, high in itertools.pairwise(distances)), distances


WHITE = (with_noise, salted_and_peppered)


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
    if instrument.name == "pixel-pca-v1" and damage in WHITE:
        strengths = strengths[2:]  # it looks at 64 smooth components: little of weak white noise falls on them, less than chance does
    damaged = [instrument.measure(damage(images, strength)) for strength in strengths]
    assert_rises([frechet_distance(found, real) for found in (perfect, *damaged)])


def test_distance_rises_and_coverage_falls_with_every_two_classes_that_are_missing(
    instrument: Instrument, real: Features, fashion_mnist: dict[str, ImageSet]
) -> None:
    train = fashion_mnist["train"]
    assert train.labels is not None
    found = []
    for classes in (10, 8, 6, 4, 2):
        first = np.flatnonzero(train.labels[:10_000] < classes)[:N]  # as many images, whatever the number of classes
        found.append(judge(instrument.measure(train.images[first]), real, SETTINGS))
    assert_rises([scores["fd"] for scores in found])
    assert_rises([-scores["coverage"] for scores in found])


def test_distance_to_itself_is_zero_and_symmetric(perfect: Features, real: Features) -> None:
    assert abs(frechet_distance(real, real)) < 1e-6
    assert frechet_distance(perfect, real) == pytest.approx(frechet_distance(real, perfect), rel=1e-9)


def test_order_of_the_features_changes_only_rounding(perfect: Features, real: Features) -> None:
    one, other = judge(perfect, real, SETTINGS), judge(permuted(perfect, 1), permuted(real, 2), SETTINGS)
    assert other["fd"] == pytest.approx(one["fd"], rel=1e-9)
    for name in ("precision", "recall", "density", "coverage"):
        assert other[name] == one[name]


def test_order_of_the_images_and_batch_size_change_only_rounding(
    instrument: Instrument, images: Images, perfect: Features, real: Features
) -> None:
    one = frechet_distance(perfect, real)
    for found in (instrument.measure(images[::-1]), instrument.measure(images, batch=7), instrument.measure(images, batch=N)):
        assert frechet_distance(found, real) == pytest.approx(one, rel=ROUNDING[instrument.name])


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


def test_hash_seed_changes_nothing_and_thread_count_only_rounding(fashion_mnist: dict[str, ImageSet], tmp_path: Path) -> None:
    train, test = (fashion_mnist[name].take(np.arange(600)) for name in ("train", "test"))
    np.savez(tmp_path / "arrays.npz", train=train.images, labels=train.labels, classes=train.classes, images=test.images)

    def start(hash_seed: str, threads: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join(sys.path)
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": paths}
        arguments = [str(tmp_path), json.dumps(INSTRUMENTS), SETTINGS.model_dump_json(), f"{hash_seed}-{threads}"]
        return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env=environment, stdout=subprocess.PIPE, text=True)

    runs = [start("0", "1"), start("1", "1"), start("1", "2")]
    one, other_seed, other_threads = (json.loads(run.communicate()[0]) for run in runs)
    assert one == other_seed
    for name in INSTRUMENTS:
        assert other_threads[name] == pytest.approx(one[name], rel=ROUNDING[name], abs=ROUNDING[name])


def test_distance_agrees_with_the_matrix_square_root(instrument: Instrument, images: Images, real: Features) -> None:
    a, b = instrument.measure(blurred(images, 0.7)).values.numpy(), real.values.numpy()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.trace(sqrtm(cov_a @ cov_b)).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert frechet_distance(Features(torch.from_numpy(a)), real) == pytest.approx(wanted, rel=1e-6)


def test_precision_recall_density_coverage_agree_with_brute_force(instrument: Instrument, images: Images, real: Features) -> None:
    generated = instrument.measure(blurred(images, 0.7))
    found = judge(generated, real, SETTINGS)
    x, y = generated.values.numpy(), real.values.numpy()
    xx, yy, xy = np.sort(cdist(x, x), axis=1), np.sort(cdist(y, y), axis=1), cdist(x, y)
    assert found["precision"] == (xy <= yy[:, 3]).any(axis=1).mean()  # column 0 is the image itself
    assert found["recall"] == (xx[:, 3] >= xy.T).any(axis=1).mean()
    assert found["density"] == pytest.approx((xy < yy[:, 5]).sum() / (5 * N), rel=1e-12)
    assert found["coverage"] == (xy < yy[:, 5]).any(axis=0).mean()


def test_the_training_set_posing_as_a_generator_is_as_good_as_perfect(
    instrument: Instrument, images: Images, perfect: Features, real: Features
) -> None:
    # Copying is not seen by any distance to the test images; that is what the memorisation row is for.
    scores = judge(perfect, real, SETTINGS)
    assert scores["fd"] < 2 * expected_bias(real, N)
    assert scores["coverage"] > 0.93 and 0.9 < scores["density"] < 1.1


def test_expected_bias_is_what_halves_of_real_images_show(perfect: Features, real: Features) -> None:
    both = Features(torch.cat([perfect.values, real.values]))
    halves = [permuted(both, seed) for seed in range(20)]
    distances = [frechet_distance(half.take(slice(N)), half.take(slice(N, None))) for half in halves]
    assert np.mean(distances) == pytest.approx(expected_bias(real, N), rel=0.1)
