"""Density and coverage: fidelity and variety that one outlier does not decide, from the nearest neighbours of the real images."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

MEMORY = 64  # MiB of distances that are held at a time
TIE = 1e-12  # squared distances closer to each other than this part of the largest squared norm are equal


def density_coverage(generated: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    """Density and coverage of generated features (N, d) among real ones (M, d), float64 (Naeem et al. 2020, eqs. 4 and 5).

    Around each real image lies a ball that reaches to its k-th nearest real neighbour, boundary excluded.  Density: the mean number of
    balls that a generated image lies in, over k; >= 0, 1 is expected where generated and real have one distribution, and more where the
    generated crowd together in the middle.  Coverage: the share of balls with a generated image inside, 0 .. 1; where generated and real
    have one distribution and N = M, about 1 - 2^-k.

    Distances come from matrix products, whose last bits hang on the processor and the number of threads.  So that a tie (a copy of a
    real image lies exactly on the boundary of others' balls) is decided alike everywhere, distances equal up to rounding count as equal.
    """
    centre = real.mean(0)  # the smaller the numbers, the less is lost in |x|^2 + |y|^2 - 2 x y
    x, y = (generated - centre).numpy(), (real - centre).numpy()
    tie = TIE * max(np.square(x).sum(1).max(), np.square(y).sum(1).max())
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="sqeuclidean").fit(y)
    radius = neighbours.kneighbors()[0][:, -1]  # squared; without a query, no image is its own neighbour
    inside, covered = 0, np.zeros(len(y), bool)
    for distance in pairwise_distances_chunked(x, y, metric="euclidean", squared=True, working_memory=MEMORY):
        block = distance < radius - tie  # (rows, M)
        inside += int(np.count_nonzero(block))
        covered |= block.any(axis=0)
    return inside / (k * len(x)), float(covered.mean())
