"""The distances against independent computations, and the traps of torch-fidelity that the wrapper must close."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity

from rediffuse.errors import UserError
from rediffuse.evaluation import fidelity as module
from rediffuse.evaluation.features import Features
from rediffuse.evaluation.fidelity import SEED, fidelity, frechet_distance, inception_score
from rediffuse.params import Evaluate

SETTINGS = Evaluate(is_splits=4, kid_subsets=5, kid_subset_size=100, neighbours=3)
D = 16


def features(n: int = 300, *, seed: int = 0, mean: float = 0.0, noise: float = 0.0) -> Features:
    """Correlated, not quite Gaussian features, and logits that depend on them."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(D, D))
    values = np.tanh(rng.normal(size=(n, D))) @ mixing + mean + noise * rng.normal(size=(n, D))
    return Features(torch.from_numpy(values), torch.from_numpy(2 * values[:, :10]))


def changed(**settings: int) -> Evaluate:
    return SETTINGS.model_copy(update=settings)


def permuted(of: Features, seed: int = 5) -> Features:
    return of.take(torch.from_numpy(np.random.default_rng(seed).permutation(len(of))))


def frechet_by_symmetric_roots(a: np.ndarray, b: np.ndarray) -> float:
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
    a, b = (Features(torch.from_numpy(x), torch.zeros(200, 2, dtype=torch.float64)) for x in (white, white * scale + shift))
    assert frechet_distance(a, b) == pytest.approx(((scale - 1) ** 2).sum() + (shift**2).sum(), rel=1e-9)


def test_frechet_distance_is_zero_for_equal_sets_and_symmetric() -> None:
    a, b = features(seed=1), features(seed=2, noise=0.3)
    assert abs(frechet_distance(a, a)) < 1e-6
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_rises_with_noise() -> None:
    real = features(seed=1)
    distances = [frechet_distance(features(seed=2, noise=noise), real) for noise in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert distances == sorted(distances) and len(set(distances)) == len(distances)


def test_order_of_images_does_not_change_fd_precision_recall() -> None:
    a, b = features(seed=1), features(seed=2, noise=0.5)
    one, other = fidelity(a, b, SETTINGS), fidelity(permuted(a), permuted(b, seed=6), SETTINGS)
    assert one["fd"] == pytest.approx(other["fd"], rel=1e-9)
    assert (one["precision"], one["recall"]) == (other["precision"], other["recall"])


def balls(inside: np.ndarray, of: np.ndarray, k: int) -> float:
    """Share of the points `inside` at least one ball around the points `of`, with the distance to its k-th neighbour as radius."""
    radius = np.sort(np.linalg.norm(of[:, None] - of[None], axis=2), axis=1)[:, k]  # index 0 is the point itself
    return float((np.linalg.norm(inside[:, None] - of[None], axis=2) <= radius).any(axis=1).mean())


def test_precision_and_recall_agree_with_brute_force() -> None:
    a, b = features(250, seed=1, mean=0.8), features(310, seed=2)
    found = fidelity(a, b, SETTINGS)
    assert found["precision"] == balls(a.values.numpy(), b.values.numpy(), 3)
    assert found["recall"] == balls(b.values.numpy(), a.values.numpy(), 3)
    assert found["precision"] != found["recall"]


def test_precision_judges_the_generated_images_and_recall_the_real_ones() -> None:
    narrow = features(seed=1)
    narrow = Features(narrow.values * 0.1, narrow.logits)  # all near the centre of the real data: precise, without variety
    found = fidelity(narrow, features(seed=2), SETTINGS)
    assert found["precision"] > 0.95 and found["recall"] < 0.05


def test_kid_agrees_with_an_own_unbiased_mmd() -> None:
    a, b = features(120, seed=1, mean=0.3), features(120, seed=2)
    x, y = a.values.numpy(), b.values.numpy()

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / D + 1) ** 3)

    n = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(kernel(u, v) for u in x for v in y) / n**2
    found = fidelity(a, b, changed(kid_subset_size=n))  # every subset is the whole set
    assert found["kid"] == pytest.approx(within - 2 * across, rel=1e-9)
    assert found["kid_std"] == pytest.approx(0, abs=1e-9 * abs(found["kid"]))


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


def test_hash_seed_changes_nothing() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "from test_fidelity import *\n"
        "print(fidelity(features(seed=1), features(seed=2, noise=0.5), SETTINGS))"
    )
    runs = [  # the set of the two layers has another order under each seed
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
        for seed in ("0", "1")
    ]
    one, other = (run.communicate()[0] for run in runs)
    assert one == other and "'fd'" in one


def test_repeating_gives_the_same_bits_and_leaves_the_global_random_states_alone() -> None:
    a, b = features(seed=1), features(seed=2, noise=0.5)
    torch.manual_seed(1)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert fidelity(a, b, SETTINGS) == fidelity(a, b, SETTINGS)
    assert torch.equal(before, torch.get_rng_state())
    assert before_numpy == np.random.get_state()[1].tolist()  # type: ignore[index]


def test_nothing_is_cached_or_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fidelity(features(seed=1), features(seed=1), SETTINGS)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_torch_fidelity_called_plainly_on_the_same_features_agrees() -> None:
    # The wrapper adds checks and names, no arithmetic: the library's own functions on the same matrices give the same numbers.
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = features(seed=1), features(seed=2, noise=0.5)
    found = fidelity(a, b, SETTINGS)
    quiet = {"rng_seed": SEED, "verbose": False}
    assert found["is"] == isc_features_to_metric(a.logits, 4, rng_seed=SEED)[torch_fidelity.KEY_METRIC_ISC_MEAN]
    kid = kid_features_to_metric(a.values, b.values, kid_subsets=5, kid_subset_size=100, **quiet)
    assert found["kid"] == kid[torch_fidelity.KEY_METRIC_KID_MEAN]
    prc = prc_features_to_metric(a.values, b.values, **quiet)
    assert (found["precision"], found["recall"]) == pytest.approx((prc["precision"], prc["recall"]), abs=1e-6)


def test_no_result_is_called_fid() -> None:
    assert set(fidelity(features(seed=1), features(seed=2), SETTINGS)) == {
        "is", "is_std", "fd", "kid", "kid_std", "precision", "recall"
    }  # fmt: skip


def test_misspelt_settings_are_refused() -> None:
    a = features()
    with pytest.raises(TypeError, match="kid_subset_sz"):
        fidelity(a, a, SETTINGS, kid_subset_sz=10)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="knows no setting kid_subset_sz"):
        module._calculate(a, a, kid=True, kid_subset_sz=10)


@pytest.mark.parametrize(
    ("n", "settings", "named"),
    [
        (2 * D - 1, {}, "dimensions needs twice as many"),
        (90, {}, "evaluate.kid_subset_size is 100"),
        (110, {"is_splits": 120}, "evaluate.is_splits is 120"),
        (110, {"neighbours": 110}, "evaluate.neighbours is 110"),
    ],
)
def test_too_few_images_are_refused_with_the_remedy(n: int, settings: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        fidelity(features(n), features(), changed(**settings))
    assert f"got {n}" in str(error.value) and "raise sample.n" in str(error.value)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(broken: float) -> None:
    a = features()
    a.values[7, 3] = broken
    with pytest.raises(UserError, match="features of 1 of the 300 generated images are not finite"):
        fidelity(a, features(), SETTINGS)
    with pytest.raises(UserError, match="real images"):
        frechet_distance(features(), a)


def test_features_of_different_dimension_or_dtype_are_refused() -> None:
    a = features()
    narrow = Features(a.values[:, :8], a.logits)
    with pytest.raises(UserError, match="16 and 8 dimensions"):
        frechet_distance(a, narrow)
    with pytest.raises(UserError, match="must be a float64 matrix"):
        frechet_distance(Features(a.values.float(), a.logits), a)
