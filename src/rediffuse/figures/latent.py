"""The latent space of a VAE: where the images lie in it, and what lies where."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rediffuse.figures.render import plain, render

Floats = NDArray[np.floating]

MOST = 40  # classes in the legend


def latent_map(means: Floats, labels: NDArray[np.int64] | None = None, classes: Sequence[str] = ()) -> NDArray[np.uint8]:
    """A scatter of posterior means, coloured by class, as a picture (900, 900, 3) or, with a legend, (900, 1100, 3).

    means: (N, latent_dim).  Two dimensions are drawn as they are; of more, the first two principal components, with their
    share of the variance; a single one against the class.  More than MOST classes are not named.
    """
    points, axes = _plane(means, labels)
    with matplotlib.style.context("default"):  # whatever the user's matplotlibrc says, the bytes are the same
        named = labels is not None and len(classes) <= MOST
        figure = Figure(figsize=(11 if named else 9, 9), dpi=100, layout="constrained")
        axis = figure.add_subplot(xlabel=axes[0], ylabel=axes[1], title="Posterior means of the VAE")
        colours = matplotlib.colormaps["tab10"] if len(classes) <= 10 else matplotlib.colormaps["turbo"].resampled(len(classes))
        # In the order of the data, not class by class, so that the last class does not cover the others.
        axis.scatter(points[:, 0], points[:, 1], s=6, c=None if labels is None else colours(labels), alpha=0.6, linewidths=0)
        if named:
            for index, name in enumerate(classes):
                axis.scatter([], [], color=colours(index), label=plain(name))
            figure.legend(loc="outside right center")
        return render(figure)


def principal_components(means: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """((N, 2), (2,)): the coordinates on the first two principal axes, and the share of the variance of each.

    An axis points to where its largest loading is positive: otherwise its sign would be the linear algebra library's whim.
    """
    centred = np.asarray(means, np.float64) - means.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    first = axes[:, ::-1][:, :2]
    first = first * np.sign(first[np.abs(first).argmax(axis=0), range(2)])
    total = variances.sum()
    return centred @ first, variances[::-1][:2] / total if total > 0 else np.zeros(2)


def _plane(means: Floats, labels: NDArray[np.int64] | None) -> tuple[Floats, tuple[str, str]]:
    if means.shape[1] == 1:
        heights = np.zeros(len(means)) if labels is None else labels
        return np.stack([means[:, 0], heights], axis=1), ("z", "" if labels is None else "class")
    if means.shape[1] == 2:
        return means, ("z_1", "z_2")
    points, shares = principal_components(means)
    x, y = (f"principal component {index + 1} of {means.shape[1]} ({share:.0%} of the variance)" for index, share in enumerate(shares))
    return points, (x, y)
