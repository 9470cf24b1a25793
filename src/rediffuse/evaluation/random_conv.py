"""random-conv-v1: a convolutional network of fixed random filters, which needs no labels.

A classifier learns to overlook what does not tell its classes apart.  This network looks at texture, sharpness, brightness and layout, and
sees damage that a classifier is blind to.  It computes in float64, and what is fitted is rounded much more coarsely than processors
differ in: the same images make the same ruler, byte for byte, on every machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, pad

from rediffuse.evaluation.fitted import CONSTANT, DIMENSION, batches, check_variety, content_hash, load_fitted, make_id, round_to
from rediffuse.evaluation.instrument_record import BuildContext, Record, new_record
from rediffuse.runtime.errors import UserError

SEED = 2020  # of the random filters
MOMENT_STEP = 2.0**-26  # what means and deviations are rounded to
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


def fit(images: NDArray[np.uint8], order: NDArray[np.int64]) -> RandomConv:
    """The network, its features standardised on these images (N, C, H, W), which are taken in this order."""
    network = RandomConv(images.shape[1])
    features = torch.cat([network(batch)[0] for batch in batches(images, order, "random convolutions")])
    std = features.std(0)
    check_variety(std.max())
    network.feature_mean.copy_(round_to(features.mean(0), MOMENT_STEP))
    network.feature_std.copy_(round_to(torch.where(std > CONSTANT, std, 1.0), MOMENT_STEP))  # what is constant has no unit
    return network.eval()


def make(context: BuildContext) -> tuple[Record, nn.Module]:
    """Standardise the features on the training images."""
    content, order = content_hash(context.images, labelled=False)
    recipe = {"filters": SHA256[context.images.shape[0]], "arithmetic": "float64"}
    return new_record(
        context,
        id=make_id(context.name, content, recipe),
        layer="means and deviations over quarters, at three scales",
        dimension=DIMENSION,
        trained_on={"n": len(context.images), "sha256": content},
        recipe=recipe,
    ), fit(context.images.images, order)


def load(record: Record, folder: Path) -> nn.Module:
    """Load the network that `make` fitted."""
    return load_fitted(RandomConv(record["shape"][0]), record, folder)
