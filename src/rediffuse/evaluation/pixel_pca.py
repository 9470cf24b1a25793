"""pixel-pca-v1: the first principal components of the pixels, which need no labels.

It computes in float64, and what is fitted is rounded much more coarsely than processors differ in: the same images make the same ruler,
byte for byte, on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from rediffuse.evaluation.fitted import DIMENSION, batches, check_variety, content_hash, load_fitted, make_id, round_to
from rediffuse.evaluation.instrument_record import BuildContext, Record, new_record

COMPONENT_STEP = 2.0**-14  # what the entries of the unit vectors are rounded to


class PixelPCA(nn.Module):
    """The first 64 principal components of the pixels, for images (C, H, W) = shape.

    Images with a side above 32 are averaged over squares first, so that none is above 32.  The components are those of the
    covariance of the training images, rounded; they are not whitened, but all scaled alike, so that the total variance of the
    training images, with what the 64 leave out, is 1.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.square = -(-max(height, width) // 32)
        pixels = channels * -(-height // self.square) * -(-width // self.square)
        self.register_buffer("mean", torch.zeros(pixels, dtype=torch.float64))
        self.register_buffer("components", torch.zeros(pixels, min(DIMENSION, pixels), dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """The features (B, 64), float64, of uint8 images (B, C, H, W); those of the training images have mean 0."""
        return (self.sums(images) - self.mean) @ self.components, None

    def sums(self, images: Tensor) -> Tensor:
        """The pixels summed over squares, (B, D): whole numbers in float64.  The last row and column are repeated to fill the squares."""
        height, width = (-side % self.square for side in images.shape[2:])
        x = pad(images.double(), (0, width, 0, height), mode="replicate")
        return avg_pool2d(x, self.square, divisor_override=1).flatten(1)


def fit(images: NDArray[np.uint8]) -> PixelPCA:
    """The components of these images (N, C, H, W).  Sums and products are whole numbers below 2^53: exact, whatever the order."""
    network = PixelPCA(images.shape[1:])
    n, total, products = len(images), torch.zeros_like(network.mean), torch.zeros(len(network.mean), len(network.mean), dtype=torch.float64)
    for batch in batches(images, np.arange(len(images)), "principal components"):
        x = network.sums(batch)
        total += x.sum(0)
        products += x.T @ x
    mean = total / n
    covariance = products / n - torch.outer(mean, mean)
    check_variety(covariance.trace())
    _, vectors = torch.linalg.eigh(covariance)
    first = vectors.flip(1)[:, : network.components.shape[1]]
    largest = first.gather(0, first.abs().argmax(0, keepdim=True))
    directions = round_to(first * largest.sign(), COMPONENT_STEP)  # the largest entry of each is positive
    network.mean.copy_(mean)
    network.components.copy_(directions / covariance.trace().sqrt().float())
    return network.eval()


def make(context: BuildContext) -> tuple[Record, nn.Module]:
    """Fit the components to the training images."""
    content, _ = content_hash(context.images, labelled=False)
    network = fit(context.images.images)
    recipe = {"square": network.square, "arithmetic": "float64"}
    return new_record(
        context,
        id=make_id(context.name, content, recipe),
        layer="first principal components",
        dimension=network.components.shape[1],
        resize=f"sums over squares of {network.square} pixels" if network.square > 1 else None,
        trained_on={"n": len(context.images), "sha256": content},
        recipe=recipe,
    ), network


def load(record: Record, folder: Path) -> nn.Module:
    """Load the components that `make` fitted."""
    return load_fitted(PixelPCA(record["shape"]), record, folder)
