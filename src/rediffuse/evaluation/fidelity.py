"""How close generated images are to real ones, from the features of both: torch-fidelity's metrics behind one strict door, and ours.

FD, IS, KID, precision and recall are torch-fidelity's arithmetic, and this is the one place that calls it.  Its front door,
`calculate_metrics`, gives silent wrong numbers: it fills a cache that is keyed by name and shared between projects, takes features in
an order that hangs on PYTHONHASHSEED, starts worker processes, advances torch's global random state, and calls every Fréchet distance
"FID".  Here its plain functions get the features themselves.  They still give a figure for fewer images than dimensions, and ignore
misspelt settings; both are refused.

A distance is `fd` and belongs to the instrument that made the features; the name `fid` is kept for Inception-v3 with the original
weights.  Density and coverage, the extrapolation to infinitely many images and the expected bias are ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from rediffuse.evaluation.features import Features, check_features
from rediffuse.evaluation.manifold import density_coverage
from rediffuse.params import Evaluate
from rediffuse.runtime.errors import UserError

SEED = 2020  # of the shuffle before the splits of IS, and of the subsets of KID and FD at infinity: part of the ruler, not of an experiment
ROWS = 1000  # in one block of the distance matrices of precision and recall: 1000 x N float64
POINTS = 15  # numbers of images from which FD is extrapolated, as in the paper's code
MANY_DIMENSIONS, FEW_POINTS = 512, 5  # above so many dimensions a distance costs seconds (d = 2048: 4 s on one thread), so fewer are taken

Moments = dict[str, NDArray[np.float64]]  # mu (d,), sigma (d, d)


def judge(generated: Features, real: Features, settings: Evaluate) -> dict[str, float]:
    """All scores of one set of generated images.

    fd: Fréchet distance (Heusel et al. 2017), >= 0 up to rounding.  fd_inf: the same, extrapolated to infinitely many generated images
    (Chong & Forsyth 2020).  kid: unbiased squared MMD with the cubic kernel (Binkowski et al. 2018), mean over random subsets; around 0
    for equal distributions, also slightly below.  is: inception score of the generated images (Salimans et al. 2016) over consecutive
    splits, 1 .. number of classes; not there where the features have no logits.  precision, recall: share of generated images inside the
    k-nearest-neighbour balls of real ones and the other way round (Kynkäänniemi et al. 2019), 0 .. 1.  density, coverage: see
    `density_coverage`.

    Precision, recall, density and coverage hang on the numbers of images, so as many generated as real ones are taken: the first
    min(N, M) of both.  Beyond that the order of the images changes nothing but rounding in fd, precision, recall, density and coverage;
    fd_inf, kid and is are drawn from them with SEED.
    Raises UserError for too few images (see `check_enough`), features of different dimension, and numbers that are not finite.
    """
    _check_pair(generated, real)
    check_enough(len(generated), generated.dimension, settings, "generated images")
    check_enough(len(real), real.dimension, settings, "real images")
    moments = _moments(real.values)
    fd = _frechet(_moments(generated.values), moments)
    scores = {"fd": fd, "fd_inf": _frechet_at_infinity(generated.values, moments, fd), "kid": _kid(generated.values, real.values, settings)}
    if generated.logits is not None:
        scores["is"] = _inception_score(generated.logits, settings.is_splits)
    n = min(len(generated), len(real))
    of_generated, of_real = generated.values[:n], real.values[:n]
    scores["precision"], scores["recall"] = _precision_recall(of_generated, of_real, settings.neighbours)
    scores["density"], scores["coverage"] = density_coverage(of_generated, of_real, settings.density_neighbours)
    return _finite(scores, len(generated))


def frechet_distance(generated: Features, real: Features) -> float:
    """The Fréchet distance alone, as in `judge`."""
    _check_pair(generated, real)
    _check_dimension(len(generated), generated.dimension, "generated images")
    _check_dimension(len(real), real.dimension, "real images")
    return _finite({"fd": _frechet(_moments(generated.values), _moments(real.values))}, len(generated))["fd"]


def inception_score(features: Features, splits: int) -> float:
    """The inception score alone, as in `judge`: of real images, the score that a perfect generator would get."""
    check_features(features, "images")
    if features.logits is None:
        raise UserError("an inception score needs class logits, and this instrument is not a classifier: choose one that is")
    _check_least(len(features), splits, "is_splits", splits, "images")
    return _finite({"is": _inception_score(features.logits, splits)}, len(features))["is"]


def expected_bias(real: Features, n: int) -> float:
    """The Fréchet distance to expect of n images from the very distribution of these M real ones: what a perfect generator gets, not 0.

    Difference of means m: E|m|^2 = (1/n + 1/M) sum_i l_i, with l the eigenvalues of the covariance.  Difference E of covariances, in their
    eigenbasis: the trace term is to second order sum_ij E_ij^2 / (2 (l_i + l_j)) (the Bures metric), with E[E_ij^2] = (1/n + 1/M)
    Var(z_i z_j) for the coordinates z of the centred features.  Of Gaussian features that variance is l_i l_j (1 + delta_ij), and the
    whole, where all l are equal, trace (1/n + 1/M) (1 + (d + 1) / 4).  It is measured instead, because heavy tails have more bias.

    A mean: single distances of such images scatter around it.  Raises UserError for n or M below twice the dimensions.
    """
    check_features(real, "real images")
    _check_dimension(n, real.dimension, "generated images")
    _check_dimension(len(real), real.dimension, "real images")
    moments = _moments(real.values)
    squares = ((real.values.numpy() - moments["mu"]) @ np.linalg.eigh(moments["sigma"])[1]) ** 2  # z^2, (M, d)
    eigenvalues = squares.mean(0)
    variances = squares.T @ squares / len(real) - np.diag(eigenvalues**2)  # of z_i z_j
    sums = np.add.outer(eigenvalues, eigenvalues)
    trace_term = np.divide(variances, 2 * sums, out=np.zeros_like(sums), where=sums > 0).sum()  # 0/0: features that never change
    return float((1 / n + 1 / len(real)) * (eigenvalues.sum() + trace_term))


def class_distances(
    generated: Features, generated_classes: Tensor, real: Features, real_classes: Tensor, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For each class by name: `n`, its generated images, and `fd`, their Fréchet distance to the real images of the class.

    The classes are int64, one for each image, indices into `names`.  A class with fewer generated or real images than twice the dimensions
    of the features has no `fd`: it would be mostly bias.  Also elsewhere the bias is that of the class's own n (see `expected_bias`).
    """
    _check_pair(generated, real)
    _check_classes(generated_classes, len(generated), len(names), "generated images")
    _check_classes(real_classes, len(real), len(names), "real images")
    counts, real_counts = (classes.bincount(minlength=len(names)).tolist() for classes in (generated_classes, real_classes))
    distances: dict[str, dict[str, float]] = {}
    for index, name in enumerate(names):
        fd, n = {}, counts[index]
        if min(n, real_counts[index]) >= 2 * real.dimension:  # images are looked for only where there are enough: there may be many classes
            of_class, of_real = generated.values[generated_classes == index], real.values[real_classes == index]
            fd = _finite({"fd": _frechet(_moments(of_class), _moments(of_real))}, n)
        distances[name] = {**fd, "n": n}
    return distances


def spread(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Mean, standard deviation (of the sample, n - 1; 0 for a single value), least, greatest, and the values as they came."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": deviation, "min": min(values), "max": max(values), "values": list(values)}


def check_enough(n: int, dimension: int, settings: Evaluate, title: str) -> None:
    """Raise UserError where n images are too few for the metrics: they would be wrong or NaN there, or break."""
    _check_dimension(n, dimension, title)
    _check_least(n, settings.is_splits, "is_splits", settings.is_splits, title)
    _check_least(n, settings.kid_subset_size, "kid_subset_size", settings.kid_subset_size, title)
    _check_least(n, settings.neighbours + 1, "neighbours", settings.neighbours, title)
    _check_least(n, settings.density_neighbours + 1, "density_neighbours", settings.density_neighbours, title)


def _check_dimension(n: int, dimension: int, title: str) -> None:
    # With fewer images than dimensions the covariance is singular, and the distance mostly its own bias.
    if n < 2 * dimension:
        raise UserError(
            f"too few {title}: at least {2 * dimension} are needed, because a Fréchet distance in {dimension} dimensions needs twice as"
            f" many, got {n}; {_more(title)}, choose an instrument with fewer dimensions, or measure no distances with"
            " reference.instruments: [] (params.yaml)"
        )


def _check_least(n: int, least: int, name: str, value: int, title: str) -> None:
    if n < least:
        raise UserError(
            f"too few {title}: at least {least} are needed, because evaluate.{name} is {value}, got {n}; {_more(title)}, lower"
            f" evaluate.{name}, or measure no distances with reference.instruments: [] (params.yaml)"
        )


def _more(title: str) -> str:
    """How there come to be more of these images."""
    return "take more images or raise data.test_share" if title in ("test images", "real images") else "raise sample.n"


def _check_pair(generated: Features, real: Features) -> None:
    check_features(generated, "generated images")
    check_features(real, "real images")
    if generated.dimension != real.dimension:
        dimensions = f"{generated.dimension} and {real.dimension}"
        raise UserError(f"features of {dimensions} dimensions cannot be compared: measure both image sets with the same instrument")


def _check_classes(classes: Tensor, n: int, names: int, title: str) -> None:
    if classes.dtype != torch.int64 or classes.shape != (n,) or (n and not 0 <= int(classes.min()) <= int(classes.max()) < names):
        found = f"{classes.dtype} {list(classes.shape)}"
        raise UserError(f"the classes of the {title} must be {n} int64 numbers from 0 to {names - 1}, one for each image, got {found}")


def _finite(scores: dict[str, float], n: int) -> dict[str, float]:
    """The scores as they are.  Raises UserError for one that is not finite."""
    if broken := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise UserError(f"{', '.join(broken)} came out as not finite for {n} images: report this with the samples")
    return scores


def _moments(values: Tensor) -> Moments:
    moments: Moments = fid_features_to_statistics(values.contiguous())  # numpy adds the columns of a view up in another order
    return moments


def _frechet(generated: Moments, real: Moments) -> float:
    return float(fid_statistics_to_metric(generated, real, False)[KEY_METRIC_FID])


def _frechet_at_infinity(values: Tensor, real: Moments, fd: float) -> float:
    """FD as the number of generated images goes to infinity (Chong & Forsyth 2020, section 4.1), the real ones staying as they are.

    The bias of FD is linear in 1/N: FD is measured on random subsets of n images, evenly spaced in n from N/10 (at least 2d) to all N,
    whose distance is `fd`, and a line in 1/n is fitted by least squares.  Where N is not much more than 2d, the smallest subset is 4/5 of
    the images: extrapolating from less of a range would give mostly noise.  What is left is the bias of the finite real set.
    """
    N, d = values.shape
    smallest = min(max(2 * d, N / 10), 0.8 * N)
    sizes = np.linspace(smallest, N, FEW_POINTS if d > MANY_DIMENSIONS else POINTS).round().astype(int)
    random = np.random.RandomState(SEED)
    subsets = (torch.from_numpy(random.choice(N, n, replace=False)) for n in sizes[:-1])
    distances = [_frechet(_moments(values[subset]), real) for subset in subsets]
    return statistics.linear_regression((1 / sizes).tolist(), [*distances, fd]).intercept


def _kid(generated: Tensor, real: Tensor, settings: Evaluate) -> float:
    chosen = _spelt(
        kid_subsets=settings.kid_subsets,
        kid_subset_size=settings.kid_subset_size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,  # 1 / d
        kid_kernel_poly_coef0=1,
        rng_seed=SEED,
        verbose=False,
    )
    return float(kid_features_to_metric(generated, real, **chosen)[KEY_METRIC_KID_MEAN])


def _inception_score(logits: Tensor, splits: int) -> float:
    return float(isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=SEED)[KEY_METRIC_ISC_MEAN])


def _precision_recall(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    """Generated first, real second: precision and recall swap otherwise."""
    chosen = _spelt(prc_neighborhood=neighbours, prc_batch_size=ROWS, save_cpu_ram=True, verbose=False)  # distances in blocks
    found = prc_features_to_metric(generated, real, **chosen)
    # Shares of whole images that went through float32: 0.87779998779 is 8778 of 10000.
    return round(found[KEY_METRIC_PRECISION] * len(generated)) / len(generated), round(found[KEY_METRIC_RECALL] * len(real)) / len(real)


def _spelt(**settings: Any) -> Mapping[str, Any]:
    """The settings as they are.  Raises TypeError for one that this torch-fidelity does not know: it would ignore it without a word."""
    if unknown := set(settings) - set(DEFAULTS):
        raise TypeError(f"torch-fidelity knows no setting {', '.join(sorted(unknown))}, and would ignore it without a word")
    return settings
