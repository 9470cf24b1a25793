"""How close generated images are to real ones, from the features of both: torch-fidelity's metrics, and ours.

FD, IS, KID, precision and recall are torch-fidelity's plain functions, called only here. Its
`calculate_metrics` can silently give wrong numbers: it caches features by name across projects, takes them in
an order that depends on PYTHONHASHSEED, advances torch's random state, and calls every Fréchet distance
"FID". The plain functions accept fewer images than dimensions, which is refused here. `fid` is reserved for
Inception-v3 with the original weights; other distances are `fd`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from rediffuse.evaluation.features import Features, check_features
from rediffuse.evaluation.manifold import density_coverage
from rediffuse.params import Evaluate
from rediffuse.runtime.errors import UserError

SEED = 2020  # of the splits of IS and the subsets of KID and fd_inf: part of the metrics
ROWS = 1000  # in one block of the distance matrices of precision and recall: 1000 x N float64
POINTS = 15  # numbers of images from which FD is extrapolated, as in the paper's code
# Above this many dimensions a distance takes seconds (d = 2048: 4 s on one thread), so fewer are taken.
MANY_DIMENSIONS, FEW_POINTS = 512, 5

Moments = dict[str, NDArray[np.float64]]  # mu (d,), sigma (d, d)


def judge(generated: Features, real: Features, settings: Evaluate) -> dict[str, float]:
    """Return all scores of one set of generated images.

    fd, fd_inf: see `distances`. kid: unbiased squared MMD, cubic kernel (Binkowski et al. 2018), mean over
    random subsets; around 0 for equal distributions. is: inception score (Salimans et al. 2016) over
    consecutive splits, 1 .. number of classes; absent without logits. precision, recall: share of generated
    images inside the k-nearest-neighbour balls of real ones, and the reverse (Kynkäänniemi et al. 2019).
    density, coverage: see `density_coverage`. The last four depend on the numbers of images and use the first
    min(N, M) of both sets.

    Raises UserError for too few images (see `check_enough`), unequal dimensions, and features that are not
    finite.
    """
    check_enough(len(generated), generated.dimension, settings, "generated images")
    check_enough(len(real), real.dimension, settings, "real images")
    scores = distances(generated, real)
    scores["kid"] = _kid(generated.values, real.values, settings)
    if generated.logits is not None:
        scores["is"] = inception_score(generated.logits, settings.is_splits)
    n = min(len(generated), len(real))
    pair = generated.values[:n], real.values[:n]
    scores["precision"], scores["recall"] = _precision_recall(*pair, settings.neighbours)
    scores["density"], scores["coverage"] = density_coverage(*pair, settings.density_neighbours)
    return scores


def distances(generated: Features, real: Features) -> dict[str, float]:
    """Return the Fréchet distances of one set of generated images; raise UserError as `judge` does.

    fd: Fréchet distance (Heusel et al. 2017). fd_inf: the same, extrapolated to infinitely many generated
    images (Chong & Forsyth 2020).
    """
    _check_pair(generated, real)
    moments = _moments(real.values)
    fd = _frechet(_moments(generated.values), moments)
    return {"fd": fd, "fd_inf": _frechet_at_infinity(generated.values, moments, fd)}


def frechet_distance(generated: Features, real: Features) -> float:
    """Return `fd` of `distances` alone."""
    _check_pair(generated, real)
    return _frechet(_moments(generated.values), _moments(real.values))


def inception_score(logits: Tensor, splits: int) -> float:
    """Return the inception score of the logits (N, K), as in `judge`."""
    found = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=SEED)
    return float(found[KEY_METRIC_ISC_MEAN])


def expected_bias(real: Features, n: int) -> float:
    """Return the Fréchet distance to expect of n images from the distribution of these M real ones.

    Difference of means m: E|m|^2 = (1/n + 1/M) sum_i l_i, with l the eigenvalues of the covariance.
    Difference E of covariances, in their eigenbasis: the trace term is to second order sum_ij E_ij^2 / (2
    (l_i + l_j)) (the Bures metric), with E[E_ij^2] = (1/n + 1/M) Var(z_i z_j) for the coordinates z of the
    centred features. For Gaussian features that variance is l_i l_j (1 + delta_ij); heavy tails have more, so
    it is measured.
    """
    moments = _moments(real.values)
    squares = ((real.values.numpy() - moments["mu"]) @ np.linalg.eigh(moments["sigma"])[1]) ** 2  # (M, d)
    eigenvalues = squares.mean(0)
    variances = squares.T @ squares / len(real) - np.diag(eigenvalues**2)  # of z_i z_j
    sums = np.add.outer(eigenvalues, eigenvalues)
    terms = np.divide(variances, 2 * sums, out=np.zeros_like(sums), where=sums > 0)  # 0/0: constant features
    return float((1 / n + 1 / len(real)) * (eigenvalues.sum() + terms.sum()))


def class_distances(
    generated: Features, generated_classes: Tensor, real: Features, real_classes: Tensor, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return for each class `n`, its generated images, and `fd`, their distance to its real images.

    The classes are int64, one for each image, indices into `names`. A class with fewer generated or real
    images than twice the dimensions of the features has no `fd`: it would be mostly bias (see `expected_bias`
    for its own n).
    """
    counts, real_counts = (
        classes.bincount(minlength=len(names)).tolist() for classes in (generated_classes, real_classes)
    )
    distances: dict[str, dict[str, float]] = {}
    for index, name in enumerate(names):
        distances[name] = {}
        if min(counts[index], real_counts[index]) >= 2 * real.dimension:
            of_class = generated.take(generated_classes == index)
            distances[name]["fd"] = frechet_distance(of_class, real.take(real_classes == index))
        distances[name]["n"] = counts[index]
    return distances


def spread(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Return mean, standard deviation (of a sample; 0 for one value), minimum, maximum, and the values."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    ends = {"min": min(values), "max": max(values)}
    return {"mean": statistics.mean(values), "std": std, **ends, "values": list(values)}


def check_enough(n: int, dimension: int, settings: Evaluate, title: str) -> None:
    """Raise UserError where n images are too few for the metrics, which would be wrong or NaN, or fail."""
    _check_dimension(n, dimension, title)
    for name in ("is_splits", "kid_subset_size", "neighbours", "density_neighbours"):
        value = getattr(settings, name)
        least = value + ("neighbours" in name)  # an image is not its own neighbour
        _check_least(n, least, f"evaluate.{name} is {value}", f"lower evaluate.{name}", title)


def _check_dimension(n: int, dimension: int, title: str) -> None:
    # With fewer images than dimensions the covariance is singular, and the distance mostly its own bias.
    reason = f"a Fréchet distance in {dimension} dimensions needs twice as many"
    _check_least(n, 2 * dimension, reason, "choose an instrument with fewer dimensions", title)


def _check_least(n: int, least: int, reason: str, remedy: str, title: str) -> None:
    if n < least:
        of_data = title in ("test images", "real images")
        more = "take more images or raise data.test_share" if of_data else "raise sample.n"
        raise UserError(
            f"too few {title}: at least {least} are needed, because {reason}, got {n}; {more}, {remedy}, or"
            " measure no distances with reference.instruments: [] (params.yaml)"
        )


def _check_pair(generated: Features, real: Features) -> None:
    check_features(generated, "generated images")
    check_features(real, "real images")
    if generated.dimension != real.dimension:
        raise UserError(
            f"features of {generated.dimension} and {real.dimension} dimensions cannot be compared:"
            " measure both image sets with the same instrument"
        )
    _check_dimension(len(generated), generated.dimension, "generated images")
    _check_dimension(len(real), real.dimension, "real images")


def _moments(values: Tensor) -> Moments:
    # numpy adds the columns of a view in another order
    moments: Moments = fid_features_to_statistics(values.contiguous())
    return moments


def _frechet(generated: Moments, real: Moments) -> float:
    return float(fid_statistics_to_metric(generated, real, False)[KEY_METRIC_FID])


def _frechet_at_infinity(values: Tensor, real: Moments, fd: float) -> float:
    """Return FD in the limit of infinitely many generated images (Chong & Forsyth 2020, section 4.1).

    The bias of FD is linear in 1/N: FD is measured on random subsets, evenly spaced from N/10 (at least 2d,
    at most 4/5 N) to N images, whose distance is `fd`, and a line in 1/n is fitted. The bias of the real set
    remains.
    """
    N, d = values.shape
    smallest = min(max(2 * d, N / 10), 0.8 * N)
    sizes = np.linspace(smallest, N, FEW_POINTS if d > MANY_DIMENSIONS else POINTS).round().astype(int)
    random = np.random.RandomState(SEED)
    subsets = (torch.from_numpy(random.choice(N, n, replace=False)) for n in sizes[:-1])
    distances = [_frechet(_moments(values[subset]), real) for subset in subsets]
    return statistics.linear_regression((1 / sizes).tolist(), [*distances, fd]).intercept


def _kid(generated: Tensor, real: Tensor, settings: Evaluate) -> float:
    found = kid_features_to_metric(
        generated,
        real,
        kid_subsets=settings.kid_subsets,
        kid_subset_size=settings.kid_subset_size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,  # 1 / d
        kid_kernel_poly_coef0=1,
        rng_seed=SEED,
        verbose=False,
    )
    return float(found[KEY_METRIC_KID_MEAN])


def _precision_recall(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    """Return precision and recall of two sets of n images. The order matters: generated first."""
    blocks = {"prc_neighborhood": neighbours, "prc_batch_size": ROWS, "save_cpu_ram": True, "verbose": False}
    found, n = prc_features_to_metric(generated, real, **blocks), len(real)
    # Shares of whole images that went through float32: 0.87779998779 is 8778 of 10000.
    return round(found[KEY_METRIC_PRECISION] * n) / n, round(found[KEY_METRIC_RECALL] * n) / n
