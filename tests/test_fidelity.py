"""The metrics against independent computations and closed forms, and the traps of torch-fidelity that the door must keep shut."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch_fidelity import metric_kid, metric_prc

from benchmarks.evaluation import plain
from rediffuse.evaluation import fidelity as module
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import SEED, class_distances, expected_bias, frechet_distance, inception_score, judge, spread
from rediffuse.evaluation.manifold import density_coverage
from rediffuse.params import Evaluate
from rediffuse.runtime.errors import UserError

SETTINGS = Evaluate(is_splits=4, kid_subsets=5, kid_subset_size=100, neighbours=3, density_neighbours=5, accuracy_images=0)
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


def changed(**settings: int) -> Evaluate:
    return SETTINGS.model_copy(update=settings)


def permuted(of: Features, seed: int = 5) -> Features:
    return of.take(torch.from_numpy(np.random.default_rng(seed).permutation(len(of))))


def frechet_by_symmetric_roots(a: Matrix, b: Matrix) -> float:
    """|mu_a - mu_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 with eigenvalues of symmetric matrices only."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def test_frechet_distance_agrees_with_symmetric_roots() -> None:
    a, b = features(seed=1, mean=0.1), features(seed=2, noise=0.5)
    assert frechet_distance(a, b) == pytest.approx(frechet_by_symmetric_roots(a.values.numpy(), b.values.numpy()), rel=1e-6)


def test_frechet_distance_of_gaussians_with_known_moments() -> None:
    # Whitened samples have exactly the moments 0 and 1; scaled and moved by known amounts, the distance is known in closed form.
    values = np.random.default_rng(3).normal(size=(200, 4))
    values -= values.mean(0)
    white = values @ np.linalg.inv(np.linalg.cholesky(np.cov(values.T))).T
    scale, shift = np.array([1.0, 2.0, 3.0, 0.5]), np.array([0.0, 1.0, -2.0, 0.5])
    a, b = gaussian(white), gaussian(white * scale + shift)
    assert frechet_distance(a, b) == pytest.approx(((scale - 1) ** 2).sum() + (shift**2).sum(), rel=1e-9)


def test_frechet_distance_is_zero_for_equal_sets_and_symmetric() -> None:
    a, b = features(seed=1), features(seed=2, noise=0.3)
    assert abs(frechet_distance(a, a)) < 1e-6
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_rises_with_noise() -> None:
    real = features(seed=1)
    distances = [frechet_distance(features(seed=2, noise=noise), real) for noise in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert distances == sorted(distances) and len(set(distances)) == len(distances)


def test_order_of_images_does_not_change_fd_precision_recall_density_coverage() -> None:
    a, b = features(seed=1), features(seed=2, noise=0.5)
    one, other = judge(a, b, SETTINGS), judge(permuted(a), permuted(b, seed=6), SETTINGS)
    assert one["fd"] == pytest.approx(other["fd"], rel=1e-9)
    for name in ("precision", "recall", "density", "coverage"):
        assert one[name] == other[name]


def balls(inside: Matrix, of: Matrix, k: int) -> float:
    """Share of the points `inside` at least one ball around the points `of`, with the distance to its k-th neighbour as radius."""
    radius = np.sort(np.linalg.norm(of[:, None] - of[None], axis=2), axis=1)[:, k]  # index 0 is the point itself
    return float((np.linalg.norm(inside[:, None] - of[None], axis=2) <= radius).any(axis=1).mean())


def test_precision_and_recall_agree_with_brute_force() -> None:
    a, b = features(250, seed=1, mean=0.8), features(250, seed=2)
    found = judge(a, b, SETTINGS)
    assert found["precision"] == balls(a.values.numpy(), b.values.numpy(), 3)
    assert found["recall"] == balls(b.values.numpy(), a.values.numpy(), 3)
    assert found["precision"] != found["recall"]


def test_precision_judges_the_generated_images_and_recall_the_real_ones() -> None:
    narrow = features(seed=1)
    narrow = Features(narrow.values * 0.1, narrow.logits)  # all near the centre of the real data: precise, without variety
    found = judge(narrow, features(seed=2), SETTINGS)
    assert found["precision"] > 0.95 and found["recall"] < 0.05


def test_kid_agrees_with_an_own_unbiased_mmd() -> None:
    a, b = features(120, seed=1, mean=0.3), features(120, seed=2)
    x, y = a.values.numpy(), b.values.numpy()

    def kernel(u: Matrix, v: Matrix) -> float:
        return float((u @ v / D + 1) ** 3)

    n = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(kernel(u, v) for u in x for v in y) / n**2
    found = judge(a, b, changed(kid_subset_size=n))  # every subset is the whole set
    assert found["kid"] == pytest.approx(within - 2 * across, rel=1e-9)


def test_kid_is_the_mean_over_subsets_drawn_with_the_seed_of_the_ruler() -> None:
    a, b = features(300, seed=1, mean=0.3), features(250, seed=2)
    random = np.random.RandomState(SEED)
    draws = [(random.choice(300, 100, replace=False), random.choice(250, 100, replace=False)) for _ in range(5)]
    each = [judge(a.take(torch.from_numpy(i)), b.take(torch.from_numpy(j)), changed(kid_subsets=1))["kid"] for i, j in draws]
    assert judge(a, b, SETTINGS)["kid"] == pytest.approx(np.mean(each), rel=1e-9)
    assert len(set(each)) == 5


def test_inception_score_is_the_mean_over_splits_shuffled_with_the_seed_of_the_ruler() -> None:
    of = features(300)
    parts = np.split(np.random.RandomState(SEED).permutation(300), 4)
    each = [inception_score(of.take(torch.from_numpy(part)), splits=1) for part in parts]
    assert inception_score(of, splits=4) == pytest.approx(np.mean(each), rel=1e-9)


def test_inception_score_agrees_with_its_formula() -> None:
    of = features(seed=1)
    p = np.exp(of.logits.numpy())
    p /= p.sum(axis=1, keepdims=True)
    kl = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
    assert inception_score(of, splits=1) == pytest.approx(np.exp(kl.mean()), rel=1e-9)


def test_inception_score_reaches_the_number_of_classes_and_falls_to_one() -> None:
    values = features(200).values
    certain = torch.eye(10, dtype=torch.float64).repeat(20, 1) * 100
    assert inception_score(Features(values, certain), splits=1) == pytest.approx(10, rel=1e-9)
    assert inception_score(Features(values, certain[:1].repeat(200, 1)), splits=1) == pytest.approx(1, rel=1e-9)


def strict_balls(generated: Matrix, real: Matrix, k: int) -> tuple[float, float]:
    """Density and coverage as the paper writes them, pair by pair."""
    radius = np.sort(cdist(real, real), axis=1)[:, k]  # index 0 is the point itself
    inside = cdist(generated, real) < radius
    return inside.sum() / (k * len(generated)), inside.any(axis=0).mean()


@pytest.mark.parametrize("mean", [0.0, 0.8])
def test_density_and_coverage_agree_with_brute_force(mean: float) -> None:
    a, b = features(250, seed=1, mean=mean), features(310, seed=2)
    for k in (1, 5):
        density, coverage = density_coverage(a.values, b.values, k)
        wanted = strict_balls(a.values.numpy(), b.values.numpy(), k)
        assert (density, coverage) == pytest.approx(wanted, rel=1e-12)
        assert density != coverage and 0 < coverage < 1


def test_density_and_coverage_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(2000, seed=1, mean=0.8), features(2000, seed=2)
    whole = density_coverage(a.values, b.values, 5)
    monkeypatch.setattr("rediffuse.evaluation.manifold.MEMORY", 1)  # MiB: 65 rows
    assert density_coverage(a.values, b.values, 5) == whole


def test_density_and_coverage_do_not_hang_on_where_the_origin_lies() -> None:
    a, b = features(250, seed=1, mean=0.8), features(250, seed=2)
    assert density_coverage(a.values + 1e6, b.values + 1e6, 5) == density_coverage(a.values, b.values, 5)


def test_copies_of_the_real_images_have_density_one_and_coverage_one_exactly() -> None:
    # Each lies in its own ball, in those of k - 1 neighbours, and on the boundary of another, which does not count: rounding must not.
    for seed in range(5):
        real = features(400, seed=seed, mean=100.0)
        assert density_coverage(permuted(real).values, real.values, 5) == (1.0, 1.0)


def test_density_and_coverage_of_one_distribution_are_the_expected_ones() -> None:
    # Among N - 1 real and N generated neighbours of a real image in random order, the first k are all real with probability
    # (N-1)...(N-k) / ((2N-1)...(2N-k)): then it is not covered.  Before the k-th real one come k generated ones on average.
    n, k = 200, 3
    pairs = [(features(n, seed=2 * i), features(n, seed=2 * i + 1)) for i in range(200)]
    densities, coverages = zip(*(density_coverage(a.values, b.values, k) for a, b in pairs), strict=True)
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert expected == pytest.approx(1 - 2**-k, abs=0.005)
    for found, wanted in ((densities, 1.0), (coverages, expected)):
        error = statistics.stdev(found) / math.sqrt(len(found))
        assert error < 0.01 and abs(statistics.fmean(found) - wanted) < 3 * error


def test_outliers_among_the_real_images_raise_recall_but_not_density() -> None:
    # The paper's argument: one real outlier has a huge ball, which everything falls into.
    a, b = features(seed=1, mean=6.0), features(seed=2)
    b.values[:1] += 100
    found = judge(a, b, SETTINGS)
    assert found["precision"] == 1.0
    assert found["density"] < 0.5 and found["coverage"] < 0.5


def test_neighbours_are_counted_among_as_many_generated_as_real_images() -> None:
    a, b = features(300, seed=1, mean=0.8), features(200, seed=2)
    for generated, real in ((a, b), (b, a)):
        found, equal = judge(generated, real, SETTINGS), judge(generated.take(slice(200)), real.take(slice(200)), SETTINGS)
        for name in ("precision", "recall", "density", "coverage"):
            assert found[name] == equal[name]
        assert found["fd"] != equal["fd"]


def moments_distance(mean: float, std: Matrix, real: Matrix) -> float:
    """FD of N(mean, diag std^2) itself to the moments of a finite real set: what infinitely many images would give."""
    cross = np.sqrt(np.linalg.eigvalsh(std[:, None] * np.cov(real.T) * std)).sum()
    return float(((mean - real.mean(0)) ** 2).sum() + (std**2).sum() + np.trace(np.cov(real.T)) - 2 * cross)


@pytest.mark.parametrize(("d", "n"), [(16, 400), (32, 70)])  # far above 2d, and just above
def test_fd_inf_is_the_distance_of_the_distribution_to_the_finite_real_set(d: int, n: int) -> None:
    std, settings = np.linspace(0.5, 1.5, d), changed(kid_subset_size=10)
    errors, biases = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        real, values = rng.normal(size=(500, d)), rng.normal(size=(n, d)) * std + 0.1
        found, truth = judge(gaussian(values), gaussian(real), settings), moments_distance(0.1, std, real)
        errors.append(found["fd_inf"] - truth)
        biases.append(found["fd"] - truth)
    assert statistics.fmean(biases) > 10 * statistics.stdev(biases) / math.sqrt(60)  # fd is biased: there is something to remove
    assert abs(statistics.fmean(errors)) < 0.2 * statistics.fmean(biases)


@pytest.mark.parametrize(("n", "smallest"), [(500, 50), (200, 32), (36, 29)])  # N/10, 2d, 4N/5
def test_fd_inf_agrees_with_an_own_fit_to_evenly_spaced_subsets(n: int, smallest: int) -> None:
    a, b = features(n, seed=1), features(200, seed=2)
    sizes = np.linspace(smallest if n > 36 else 28.8, n, 15).round().astype(int)
    assert sizes[0] == smallest
    random = np.random.RandomState(SEED)
    subsets = [a.values.numpy()[random.choice(n, size, replace=False)] for size in sizes[:-1]] + [a.values.numpy()]
    line = np.polynomial.Polynomial.fit(1 / sizes, [frechet_by_symmetric_roots(x, b.values.numpy()) for x in subsets], 1)
    assert judge(a, b, changed(kid_subset_size=10))["fd_inf"] == pytest.approx(line(0), rel=1e-6)


def test_fd_inf_of_a_generator_without_noise_is_its_fd() -> None:
    # Every subset has the same moments, so there is no bias to remove.
    a, b = gaussian(np.full((300, D), 0.5)), features(seed=2)
    found = judge(a, b, SETTINGS)
    assert found["fd_inf"] == pytest.approx(found["fd"], rel=1e-9)
    assert (found["recall"], found["coverage"]) == (0.0, pytest.approx(0, abs=0.1))


@pytest.mark.parametrize(("many", "points"), [(D, 15), (D - 1, 5)])
def test_fd_inf_takes_fewer_points_where_a_distance_is_slow(many: int, points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    frechet = module._frechet
    monkeypatch.setattr(module, "MANY_DIMENSIONS", many)
    monkeypatch.setattr(module, "_frechet", lambda *moments: calls.append(1) or frechet(*moments))
    judge(features(seed=1), features(seed=2), SETTINGS)
    assert len(calls) == points  # the last one is fd


def white(n: int, d: int) -> Matrix:
    """n rows whose sample covariance is the identity."""
    values = np.random.default_rng(3).normal(size=(n, d))
    return values @ np.linalg.inv(np.linalg.cholesky(np.cov(values.T))).T


def test_expected_bias_of_gaussians_with_equal_eigenvalues_is_the_closed_form() -> None:
    d, n, m = 12, 300, 20_000
    trace = 4.0 * d
    assert expected_bias(gaussian(2 * white(m, d)), n) == pytest.approx(trace * (1 / n + 1 / m) * (1 + (d + 1) / 4), rel=0.01)


def test_expected_bias_of_gaussians_is_the_sum_over_pairs_of_eigenvalues() -> None:
    n, m, l = 300, 20_000, np.array([9.0, 4.0, 1.0, 0.01])  # noqa: E741
    pairs = sum(a * b * (1 + (i == j)) / (2 * (a + b)) for i, a in enumerate(l) for j, b in enumerate(l))
    assert expected_bias(gaussian(white(m, 4) * np.sqrt(l)), n) == pytest.approx((1 / n + 1 / m) * (l.sum() + pairs), rel=0.01)


@pytest.mark.parametrize("std", [np.ones(8), np.logspace(0, -3, 8), np.array([10.0, 1, 1, 1, 1, 1, 1, 1])])
@pytest.mark.parametrize("draw", [np.random.Generator.normal, np.random.Generator.logistic])
def test_expected_bias_is_the_mean_distance_of_two_samples_of_one_distribution(std: Matrix, draw: Any) -> None:
    n, m = 200, 300
    rng = np.random.default_rng(11)
    found, expected = [], []
    for _ in range(2000):
        generated, real = (gaussian(draw(rng, size=(size, 8)) * std) for size in (n, m))
        found.append(frechet_distance(generated, real))
        expected.append(expected_bias(real, n))
    error = statistics.stdev(found) / math.sqrt(len(found)) / statistics.fmean(found)
    assert error < 0.025 and statistics.fmean(expected) == pytest.approx(statistics.fmean(found), rel=0.05)


def test_features_that_never_change_do_not_change_the_expected_bias() -> None:
    values = white(100, 4)
    padded = np.concatenate([values, np.ones((100, 3))], axis=1)
    assert expected_bias(gaussian(padded), 50) == pytest.approx(expected_bias(gaussian(values), 50), rel=1e-9)
    assert expected_bias(gaussian(np.ones((100, 3))), 50) == 0
    with pytest.raises(UserError, match="too few generated images: at least 14 are needed"):
        expected_bias(gaussian(padded), 13)


def classes(*counts: int) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def test_class_distances_are_those_of_the_classes_alone_and_left_out_where_too_few() -> None:
    a, b = features(300, seed=1, mean=0.2), features(300, seed=2)
    names = ("shirt", "bag", "coat", "boot")
    found = class_distances(a, classes(100, 150, 2 * D - 1, 19), b, classes(200, 2 * D - 1, 69, 0), names)
    assert found == {
        "shirt": {"fd": frechet_distance(a.take(slice(100)), b.take(slice(200))), "n": 100},
        "bag": {"n": 150},  # too few real ones
        "coat": {"n": 2 * D - 1},
        "boot": {"n": 19},
    }
    order = torch.from_numpy(np.random.default_rng(5).permutation(300))
    shuffled = class_distances(a.take(order), classes(100, 150, 31, 19)[order], b, classes(200, 31, 69, 0), names)
    assert shuffled["shirt"]["fd"] == pytest.approx(found["shirt"]["fd"], rel=1e-9)


@pytest.mark.parametrize("wrong", [classes(299), classes(150, 150).int(), classes(100, 100, 100), classes(150, 150) - 1])
def test_classes_that_do_not_fit_the_images_are_refused(wrong: torch.Tensor) -> None:
    a, right = features(), classes(150, 150)
    for pair, title in (((wrong, right), "generated images"), ((right, wrong), "real images")):
        with pytest.raises(UserError, match=f"classes of the {title} must be 300 int64 numbers from 0 to 1"):
            class_distances(a, pair[0], a, pair[1], ("shirt", "bag"))


def test_spread_is_that_of_a_sample() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
    assert spread([0.7]) == {"mean": 0.7, "std": 0.0, "min": 0.7, "max": 0.7, "values": [0.7]}
    assert spread([0.1] * 3)["mean"] == 0.1  # a mean lies between least and greatest: not 0.10000000000000002


def test_repeating_gives_the_same_bits_and_leaves_the_global_random_states_alone() -> None:
    a, b = features(seed=1), features(seed=2, noise=0.5)
    torch.manual_seed(1)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert judge(a, b, SETTINGS) == judge(a, b, SETTINGS)
    assert torch.equal(before, torch.get_rng_state())
    assert before_numpy == np.random.get_state()[1].tolist()  # type: ignore[index]


def test_how_the_features_lie_in_memory_changes_nothing() -> None:
    a, b = features(600, seed=1), features(seed=2, noise=0.5)
    view = a.take(slice(None, None, 2))
    copy = Features(view.values.clone(), a.logits[::2].clone() if a.logits is not None else None)
    by_column = Features(copy.values.T.contiguous().T, copy.logits)
    assert not view.values.is_contiguous() and not by_column.values.is_contiguous()
    assert judge(view, b, SETTINGS) == judge(copy, b, SETTINGS) == judge(by_column, b, SETTINGS)
    assert judge(b, view, SETTINGS) == judge(b, copy, SETTINGS) == judge(b, by_column, SETTINGS)
    assert expected_bias(view, 300) == expected_bias(copy, 300) == expected_bias(by_column, 300)


def test_nothing_is_cached_or_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    judge(features(seed=1), features(seed=1), SETTINGS)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_the_front_door_of_torch_fidelity_gives_the_same_bits() -> None:
    # The plain functions are semi-public; this is where a release that changed them, or its defaults, is noticed.
    a, b = features(seed=1), features(seed=2, noise=0.5)
    found, shares = judge(a, b, SETTINGS), {"precision": 300, "recall": 300}
    theirs = plain(a, b, isc_splits=4, kid_subsets=5, kid_subset_size=100, save_cpu_ram=True, verbose=False)
    theirs |= {name: round(theirs[name] * n) / n for name, n in shares.items()}  # through float32
    assert {name: found[name] for name in theirs} == theirs


def test_the_ruler_has_not_moved() -> None:
    # Values from torch-fidelity 0.4.0, numpy 2.4 and torch 2.14: published numbers hang on them.
    found = judge(features(seed=1), features(seed=2, noise=0.5), SETTINGS)
    published = {"fd": 2.59661329383016, "kid": -1.017979139432058, "is": 4.885461400343745, "precision": 275 / 300, "recall": 0.86}
    assert {name: found[name] for name in published} == pytest.approx(published, rel=1e-9)
    assert found["fd_inf"] == pytest.approx(0.5623570988892546, rel=1e-7)
    assert (found["density"], found["coverage"]) == (1876 / 1500, 0.98)


def test_scores_have_our_names_and_is_needs_logits() -> None:
    a, b = features(seed=1), features(seed=2)
    names = {"fd", "fd_inf", "kid", "is", "precision", "recall", "density", "coverage"}
    with_logits, without = judge(a, b, SETTINGS), judge(Features(a.values), Features(b.values), SETTINGS)
    assert set(with_logits) == names and all(type(value) is float for value in with_logits.values())
    assert without == {name: value for name, value in with_logits.items() if name != "is"}
    with pytest.raises(UserError, match="not a classifier"):
        inception_score(Features(a.values), splits=4)


@pytest.mark.parametrize(("library", "prefix"), [(metric_kid, "kid_"), (metric_prc, "prc_")])
def test_torch_fidelity_reads_every_setting_that_it_is_given(library: Any, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A name that it no longer reads would be ignored without a word; one that it reads and is not given is left to its default.
    read: set[str] = set()
    given: set[str] = set()

    def get_kwarg(name: str, settings: dict[str, Any]) -> Any:
        read.add(name)
        given.update(settings)
        return settings[name]

    monkeypatch.setattr(library, "get_kwarg", get_kwarg)
    judge(features(seed=1), features(seed=2), SETTINGS)
    assert read == given and any(name.startswith(prefix) for name in read)


def test_misspelt_settings_are_refused() -> None:
    a = features()
    with pytest.raises(TypeError, match="kid_subset_sz"):
        judge(a, a, SETTINGS, kid_subset_sz=10)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="knows no setting kid_subset_sz"):
        module._spelt(kid_subset_sz=10)


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
def test_too_few_images_are_refused_with_the_remedy(n: int, settings: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        judge(features(n), features(), changed(**settings))
    assert f"got {n}" in str(error.value) and "raise sample.n" in str(error.value)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(broken: float) -> None:
    a = features()
    a.values[7, 3] = broken
    with pytest.raises(UserError, match="features of 1 of the 300 generated images are not finite"):
        judge(a, features(), SETTINGS)
    with pytest.raises(UserError, match="real images"):
        frechet_distance(features(), a)


def test_features_of_different_dimension_or_dtype_are_refused() -> None:
    a = features()
    narrow = Features(a.values[:, :8], a.logits)
    with pytest.raises(UserError, match="16 and 8 dimensions"):
        frechet_distance(a, narrow)
    with pytest.raises(UserError, match="must be a float64 matrix"):
        frechet_distance(Features(a.values.float(), a.logits), a)
