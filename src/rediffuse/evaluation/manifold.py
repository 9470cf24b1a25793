"""Density and coverage: fidelity and variety by nearest neighbours, robust against outliers."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

MEMORY = 64  # MiB of distances that are held at a time
TIE = 1e-12  # squared distances closer to each other than this part of the largest squared norm are equal


def density_coverage(generated: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    """Return density and coverage of generated features (N, d) among real ones (M, d), float64.

    Naeem et al. 2020, equations 4 and 5. Each real image is the centre of a ball that reaches to its k-th
    nearest real neighbour, boundary excluded. Density: the mean number of balls that contain a generated
    image, over k; 1 expected for equal distributions. Coverage: the share of balls that contain a generated
    image; about 1 - 2^-k for equal distributions and N = M. A copy of a real image lies exactly on the
    boundary of other balls, so distances that are equal up to the rounding of the matrix products count as
    equal.
    """
    centre = real.mean(0)  # smaller numbers lose less in |x|^2 + |y|^2 - 2 x y
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
