"""The metrics against independent computations and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import (
    SEED,
    class_distances,
    expected_bias,
    frechet_distance,
    inception_score,
    judge,
)
from rediffuse.evaluation.manifold import density_coverage
from rediffuse.params import Evaluate
from rediffuse.runtime.errors import UserError

SETTINGS = Evaluate(
    is_splits=4, kid_subsets=5, kid_subset_size=100, neighbours=3, density_neighbours=5, accuracy_images=0
)
SHARES = ("precision", "recall", "density", "coverage")
Matrix = NDArray[np.float64]
D = 16


def features(n: int = 300, *, seed: int = 0, mean: float = 0.0, noise: float = 0.0) -> Features:
    """Correlated, not quite Gaussian features, and logits that depend on them."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(D, D))
    values = np.tanh(rng.normal(size=(n, D))) @ mixing + mean + noise * rng.normal(size=(n, D))
    return Features(torch.from_numpy(values), torch.from_numpy(2 * values[:, :10]))


def gaussian(values: Matrix) -> Features:
    """Features of an instrument that is not a classifier."""
    return Features(torch.from_numpy(values))


def white(n: int, d: int) -> Matrix:
    """n rows whose sample mean is 0 and covariance the identity."""
    values = np.random.default_rng(3).normal(size=(n, d))
    values -= values.mean(0)
    return values @ np.linalg.inv(np.linalg.cholesky(np.cov(values.T))).T


def changed(**settings: int) -> Evaluate:
    return SETTINGS.model_copy(update=settings)


def frechet_by_symmetric_roots(a: Matrix, b: Matrix) -> float:
    """|mu_a - mu_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 by symmetric eigenvalues."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def test_frechet_distance_agrees_with_symmetric_roots_and_is_symmetric():
    a, b = features(seed=1, mean=0.1), features(seed=2, noise=0.5)
    wanted = frechet_by_symmetric_roots(a.values.numpy(), b.values.numpy())
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-6


def test_frechet_distance_of_gaussians_with_known_moments():
    values, scale, shift = white(200, 4), np.array([1.0, 2.0, 3.0, 0.5]), np.array([0.0, 1.0, -2.0, 0.5])
    found = frechet_distance(gaussian(values), gaussian(values * scale + shift))
    assert found == pytest.approx(((scale - 1) ** 2).sum() + (shift**2).sum(), rel=1e-9)


def balls(inside: Matrix, of: Matrix, k: int) -> float:
    """Share of the points `inside` at least one ball around the points `of`, up to the k-th neighbour."""
    radius = np.sort(cdist(of, of), axis=1)[:, k]  # column 0 is the point itself
    return float((cdist(inside, of) <= radius).any(axis=1).mean())


def test_precision_and_recall_agree_with_brute_force():
    a, b = features(250, seed=1, mean=0.8), features(250, seed=2)
    found = judge(a, b, SETTINGS)
    assert found["precision"] == balls(a.values.numpy(), b.values.numpy(), 3)
    assert found["recall"] == balls(b.values.numpy(), a.values.numpy(), 3) != found["precision"]


def test_kid_agrees_with_an_own_unbiased_mmd():
    n = 120
    a, b = features(n, seed=1, mean=0.3), features(n, seed=2)
    xx, yy, xy = ((u.values @ v.values.T / D + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
    within = sum(float(k.sum() - k.trace()) for k in (xx, yy)) / (n * (n - 1))
    found = judge(a, b, changed(kid_subset_size=n))["kid"]  # every subset is the whole set
    assert found == pytest.approx(within - 2 * float(xy.mean()), rel=1e-9)


def test_inception_score_agrees_with_its_formula_on_shuffled_splits():
    logits = features(300).logits
    p = np.exp(logits.numpy())
    p /= p.sum(axis=1, keepdims=True)
    kl = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
    assert inception_score(logits, splits=1) == pytest.approx(np.exp(kl.mean()), rel=1e-9)
    parts = np.split(np.random.RandomState(SEED).permutation(300), 4)
    each = [inception_score(logits[part], splits=1) for part in parts]
    assert inception_score(logits, splits=4) == pytest.approx(np.mean(each), rel=1e-9)


def test_density_and_coverage_agree_with_brute_force_in_blocks_too(monkeypatch):
    a, b = features(1500, seed=1, mean=0.8).values, features(1700, seed=2).values
    for k in (1, 5):
        inside = cdist(a, b) < np.sort(cdist(b, b), axis=1)[:, k]  # column 0 is the image itself
        wanted = inside.sum() / (k * len(a)), inside.any(axis=0).mean()
        assert density_coverage(a, b, k) == pytest.approx(wanted, rel=1e-12)
        assert wanted[0] != wanted[1] and 0 < wanted[1] < 1
    monkeypatch.setattr("rediffuse.evaluation.manifold.MEMORY", 1)  # MiB: 77 rows
    assert density_coverage(a + 1e6, b + 1e6, 5) == pytest.approx(wanted, rel=1e-12)


def test_copies_of_the_real_images_have_density_one_and_coverage_one_exactly():
    # Each lies in its own ball, in k - 1 others, and on the boundary of another, which does not count.
    real = features(400, mean=100.0).values
    assert density_coverage(real.flip(0), real, 5) == (1.0, 1.0)


def test_neighbours_are_counted_among_as_many_generated_as_real_images():
    a, b = features(300, seed=1, mean=0.8), features(200, seed=2)
    for generated, real in ((a, b), (b, a)):
        found = judge(generated, real, SETTINGS)
        equal = judge(generated.take(slice(200)), real.take(slice(200)), SETTINGS)
        assert all(found[name] == equal[name] for name in SHARES) and found["fd"] != equal["fd"]


@pytest.mark.parametrize(("n", "smallest"), [(500, 50), (200, 32), (36, 28.8)])  # N/10, 2d, 4N/5
def test_fd_inf_agrees_with_an_own_fit_to_evenly_spaced_subsets(n, smallest):
    a, b, random = features(n, seed=1), features(200, seed=2), np.random.RandomState(SEED)
    sizes, values = np.linspace(smallest, n, 15).round().astype(int), a.values.numpy()
    subsets = [values[random.choice(n, size, replace=False)] for size in sizes[:-1]] + [values]
    distances = [frechet_by_symmetric_roots(x, b.values.numpy()) for x in subsets]
    line = np.polynomial.Polynomial.fit(1 / sizes, distances, 1)
    assert judge(a, b, changed(kid_subset_size=10))["fd_inf"] == pytest.approx(line(0), rel=1e-6)


@pytest.mark.parametrize("l", [np.full(12, 4.0), np.array([9.0, 4.0, 1.0, 0.01])])
def test_expected_bias_of_gaussians_is_the_sum_over_pairs_of_eigenvalues(l):  # noqa: E741
    n, m = 300, 20_000
    pairs = sum(a * b * (1 + (i == j)) / (2 * (a + b)) for i, a in enumerate(l) for j, b in enumerate(l))
    wanted = (1 / n + 1 / m) * (l.sum() + pairs)
    values = white(m, len(l)) * np.sqrt(l)
    assert expected_bias(gaussian(values), n) == pytest.approx(wanted, rel=0.01)
    padded = np.concatenate([values, np.ones((m, 3))], axis=1)  # features that never change add nothing
    assert expected_bias(gaussian(padded), n) == pytest.approx(expected_bias(gaussian(values), n), rel=1e-9)


def classes(*counts: int) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def test_class_distances_are_those_of_the_classes_alone_and_left_out_where_too_few():
    a, b, names = features(300, seed=1, mean=0.2), features(300, seed=2), ("shirt", "bag", "coat", "boot")
    of_a, of_b = classes(100, 150, 2 * D - 1, 19), classes(200, 2 * D - 1, 69, 0)
    found = class_distances(a, of_a, b, of_b, names)
    assert found == {
        "shirt": {"fd": frechet_distance(a.take(slice(100)), b.take(slice(200))), "n": 100},
        "bag": {"n": 150},  # too few real ones
        "coat": {"n": 2 * D - 1},
        "boot": {"n": 19},
    }


def test_scores_repeat_exactly_wherever_the_features_lie_and_draw_from_no_global_generator():
    a, b = features(600, seed=1), features(seed=2, noise=0.5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    view = a.take(slice(None, None, 2))
    copy = Features(view.values.clone(), view.logits)
    by_column = Features(copy.values.T.contiguous().T, copy.logits)
    assert not view.values.is_contiguous() and not by_column.values.is_contiguous()
    for other in (view, by_column):
        assert judge(other, b, SETTINGS) == judge(copy, b, SETTINGS)
        assert judge(b, other, SETTINGS) == judge(b, copy, SETTINGS)
        assert expected_bias(other, 300) == expected_bias(copy, 300)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()


def test_published_numbers_do_not_change():
    # Values from torch-fidelity 0.4.0, numpy 2.4 and torch 2.14.
    found = judge(features(seed=1), features(seed=2, noise=0.5), SETTINGS)
    published = {"fd": 2.59661329383016, "kid": -1.017979139432058, "is": 4.885461400343745}
    published |= {"precision": 275 / 300, "recall": 0.86, "density": 1876 / 1500, "coverage": 0.98}
    assert {name: found[name] for name in published} == pytest.approx(published, rel=1e-9)
    assert found["fd_inf"] == pytest.approx(0.5623570988892546, rel=1e-7)
    without = judge(Features(features(seed=1).values), features(seed=2, noise=0.5), SETTINGS)
    assert without == {name: value for name, value in found.items() if name != "is"}  # which needs logits
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("n", "settings", "named"),
    [
        (2 * D - 1, {}, "dimensions needs twice as many"),
        (90, {}, "evaluate.kid_subset_size is 100"),
        (110, {"is_splits": 120}, "evaluate.is_splits is 120"),
        (110, {"neighbours": 110}, "evaluate.neighbours is 110"),
        (110, {"density_neighbours": 110}, "evaluate.density_neighbours is 110"),
    ],
)
def test_too_few_images_are_refused_with_the_remedy(n, settings, named):
    with pytest.raises(UserError, match=f"{named}, got {n}.*raise sample.n"):
        judge(features(n), features(), changed(**settings))


def test_features_that_are_broken_or_do_not_fit_are_refused():
    a, broken = features(), features()
    broken.values[7, 3] = float("nan")
    with pytest.raises(UserError, match="features of 1 of the 300 generated images are not finite"):
        judge(broken, a, SETTINGS)
    with pytest.raises(UserError, match="real images"):
        frechet_distance(a, broken)
    with pytest.raises(UserError, match="16 and 8 dimensions"):
        frechet_distance(a, Features(a.values[:, :8]))
    with pytest.raises(UserError, match="must be float64"):
        frechet_distance(Features(a.values.float()), a)
