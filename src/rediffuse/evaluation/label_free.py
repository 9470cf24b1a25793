"""Instruments that need no labels: a fixed random convolutional network, and the principal components of the pixels.

A classifier learns to overlook what does not tell its classes apart; these two look at texture, sharpness, brightness and
layout, and see damage that it is blind to.  Both compute in float64, and what is fitted is rounded much more coarsely than
processors differ in: the same images make the same ruler, byte for byte, on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, pad
from tqdm import tqdm

from rediffuse.runtime.errors import UserError

SEED = 2020  # of the random filters
DIMENSION = 64
BATCH = 250
CONSTANT = 1e-6  # a spread up to here is rounding
MOMENT_STEP, COMPONENT_STEP = 2.0**-26, 2.0**-14  # what means and deviations, and the entries of unit vectors, are rounded to
WIDTHS = (4, 2, 2)  # filters at full, half and quarter resolution; each gives 8 features
SHA256 = {  # of the random filters, by the number of image channels
    1: "844972dd638cb464ed4d1f47a0c38d3c145c30f962be95b4baddff08998ac47b",
    3: "e0e7737582774ade1250e48ab6187b20fd78f47698c9a7776a2e05c3a18964a8",
}


class RandomConv(nn.Module):
    """A convolutional network whose weights are drawn once and never trained, for grey or colour images of any size from 16 up.

    At three scales, each half as fine as the one before, 3 x 3 filters, of whose responses the magnitude is taken (a ReLU would leave
    some dead on some image sets); mean and standard deviation of each over the four quarters of the image are the 64 features.
    The filters sum to zero, so that they answer to edges and texture, save the first, which is the mean brightness.  Their
    values are whole numbers over a root: the same on every machine.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        random = np.random.RandomState(SEED)
        banks = [_filters(random, o, i) for i, o in zip((channels, *WIDTHS), WIDTHS, strict=False)]
        banks[0][0] = 1 / banks[0][0].size
        found = hashlib.sha256(b"".join(bank.tobytes() for bank in banks)).hexdigest()
        if found != SHA256[channels]:
            raise UserError(
                f"the filters of random-conv-v1 came out with the SHA-256 {found}, which must be {SHA256[channels]}:"
                " this machine's numpy draws other numbers, and what it measured could be compared with nothing; report this"
            )
        self.filters = nn.ParameterList([nn.Parameter(torch.from_numpy(bank), requires_grad=False) for bank in banks])
        self.register_buffer("feature_mean", torch.zeros(DIMENSION, dtype=torch.float64))
        self.register_buffer("feature_std", torch.ones(DIMENSION, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """The features (B, 64), float64, of uint8 images (B, C, H, W); those of the training images have mean 0 and deviation 1."""
        x, features = images.double() / 255, []
        for scale, filters in enumerate(self.filters):
            x = conv2d(pad(avg_pool2d(x, 2) if scale else x, (1, 1, 1, 1), mode="replicate"), filters).abs()
            mean, square = adaptive_avg_pool2d(x, 2), adaptive_avg_pool2d(x**2, 2)
            features += [mean.flatten(1), (square - mean**2).clamp(min=0).sqrt().flatten(1)]
        return (torch.cat(features, 1) - self.feature_mean) / self.feature_std, None


def _filters(random: np.random.RandomState, filters: int, channels: int) -> NDArray[np.float64]:
    """Random filters (filters, channels, 3, 3) with sum 0 and sum of squares 1.  Whole numbers until the last step, which is exact."""
    drawn = random.randint(-127, 128, size=(filters, channels, 3, 3), dtype=np.int64)
    centred = drawn * drawn[0].size - drawn.sum((1, 2, 3), keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).sum((1, 2, 3), keepdims=True)))


def fit_random_conv(images: NDArray[np.uint8], order: NDArray[np.int64]) -> RandomConv:
    """The network, its features standardised on these images (N, C, H, W), which are taken in this order."""
    network = RandomConv(images.shape[1])
    features = torch.cat([network(batch)[0] for batch in _batches(images, order, "random convolutions")])
    std = features.std(0)
    _check_variety(std.max())
    network.feature_mean.copy_(_rounded(features.mean(0), MOMENT_STEP))
    network.feature_std.copy_(_rounded(torch.where(std > CONSTANT, std, 1.0), MOMENT_STEP))  # what is constant has no unit
    return network.eval()


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


def fit_pixel_pca(images: NDArray[np.uint8]) -> PixelPCA:
    """The components of these images (N, C, H, W).  Sums and products are whole numbers below 2^53: exact, whatever the order."""
    network = PixelPCA(images.shape[1:])
    n, total, products = len(images), torch.zeros_like(network.mean), torch.zeros(len(network.mean), len(network.mean), dtype=torch.float64)
    for batch in _batches(images, np.arange(len(images)), "principal components"):
        x = network.sums(batch)
        total += x.sum(0)
        products += x.T @ x
    mean = total / n
    covariance = products / n - torch.outer(mean, mean)
    _check_variety(covariance.trace())
    _, vectors = torch.linalg.eigh(covariance)
    first = vectors.flip(1)[:, : network.components.shape[1]]
    largest = first.gather(0, first.abs().argmax(0, keepdim=True))
    directions = _rounded(first * largest.sign(), COMPONENT_STEP)  # the largest entry of each is positive
    network.mean.copy_(mean)
    network.components.copy_(directions / covariance.trace().sqrt().float())
    return network.eval()


def _batches(images: NDArray[np.uint8], order: NDArray[np.int64], title: str) -> Iterator[Tensor]:
    for start in tqdm(range(0, len(order), BATCH), desc=title, unit="batch", leave=False):
        yield torch.from_numpy(images[order[start : start + BATCH]])


def _check_variety(spread: Tensor) -> None:
    if spread <= CONSTANT:
        raise UserError("the training images are all alike: no instrument can be made from them; choose another data.set")


def _rounded(values: Tensor, step: float) -> Tensor:
    return (values / step).round() * step
