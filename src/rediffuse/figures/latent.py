"""The latent space of a VAE: where the images lie in it."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rediffuse.figures.render import default_style, plain, render
from rediffuse.figures.text import legible

Floats = NDArray[np.floating]

MOST = 40  # classes in the legend


@default_style
def latent_map(
    means: Floats, labels: NDArray[np.int64] | None = None, classes: Sequence[str] = ()
) -> NDArray[np.uint8]:
    """Return a scatter of posterior means by class: (900, 900, 3), or (900, 1100, 3) with a legend.

    means: (N, latent_dim).  Two dimensions are drawn as they are.  More are projected on the first two
    principal components, with their share of the variance.  A single one is drawn against the class.  More
    than MOST classes get no legend.
    """
    points, (x, y) = _plane(means, labels)
    legend = labels is not None and len(classes) <= MOST
    figure = Figure(figsize=(11 if legend else 9, 9), dpi=100, layout="constrained")
    axis = figure.add_subplot(xlabel=x, ylabel=y, title="Posterior means of the VAE")
    colours = class_colours(len(classes))
    # In the order of the data, not class by class, so that the last class does not cover the others.
    colour = None if labels is None else colours(labels)
    axis.scatter(points[:, 0], points[:, 1], s=6, c=colour, alpha=0.6, linewidths=0)
    if legend:
        marks = [axis.scatter([], [], color=colours(i)) for i in range(len(classes))]
        # Given as arguments: matplotlib leaves out labels of its own that begin with "_".
        figure.legend(marks, [plain(name) for name in legible(classes)], loc="outside right center")
    return render(figure)


def class_colours(n: int) -> Colormap:
    """Return the colours of n classes, by index."""
    return matplotlib.colormaps["tab10"] if n <= 10 else matplotlib.colormaps["turbo"].resampled(n)


def principal_components(means: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return coordinates on the first two principal axes, (N, 2), and their shares of the variance, (2,).

    The largest loading of each axis is positive: otherwise its sign would depend on the linear algebra
    library.
    """
    centred = np.asarray(means, np.float64) - means.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    first = axes[:, ::-1][:, :2]
    first = first * np.sign(first[np.abs(first).argmax(axis=0), range(2)])
    total = variances.sum()
    return centred @ first, variances[::-1][:2] / total if total > 0 else np.zeros(2)


def _plane(means: Floats, labels: NDArray[np.int64] | None) -> tuple[Floats, tuple[str, str]]:
    """Return points of the plane, (N, 2), and the names of its axes."""
    if means.shape[1] == 1:
        heights = np.zeros(len(means)) if labels is None else labels
        return np.stack([means[:, 0], heights], axis=1), ("z", "" if labels is None else "class")
    if means.shape[1] == 2:
        return means, ("z_1", "z_2")
    points, shares = principal_components(means)
    name = "principal component {} of {} ({:.0%} of the variance)"
    x, y = (name.format(i + 1, means.shape[1], share) for i, share in enumerate(shares))
    return points, (x, y)
