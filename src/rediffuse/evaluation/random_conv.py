"""random-conv-v1: a convolutional network of fixed random filters, which needs no labels.

A classifier ignores what does not help to tell its classes apart. This network measures texture, sharpness,
brightness and layout. It computes in float64, and what is fitted is rounded much more coarsely than
processors differ: the same images give the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, pad

from rediffuse.evaluation import shared
from rediffuse.evaluation.shared import BuildContext, Record
from rediffuse.runtime.errors import UserError

SEED = 2020  # of the random filters
MOMENT_STEP = 2.0**-26  # means and deviations are rounded to multiples of this
WIDTHS = (4, 2, 2)  # filters at full, half and quarter resolution; each gives 8 features
SHA256 = {  # of the random filters, by the number of image channels
    1: "844972dd638cb464ed4d1f47a0c38d3c145c30f962be95b4baddff08998ac47b",
    3: "e0e7737582774ade1250e48ab6187b20fd78f47698c9a7776a2e05c3a18964a8",
}
check = shared.check_training_images


class RandomConv(nn.Module):
    """A convolutional network with fixed random weights, for grey or colour images of 16 pixels or more.

    3 x 3 filters at three scales, each half as fine as the one before; of the magnitude of each response,
    mean and standard deviation over the four quarters of the image are the 64 features. The filters sum to
    zero, so that they respond to edges and texture, except the first, which gives the mean brightness.
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
                f"the filters of random-conv-v1 have the SHA-256 {found}, which must be {SHA256[channels]}:"
                " numpy draws other numbers here, and their distances cannot be compared; report this"
            )
        self.filters = nn.ParameterList(map(torch.from_numpy, banks)).requires_grad_(False)
        self.register_buffer("feature_mean", torch.zeros(shared.DIMENSION, dtype=torch.float64))
        self.register_buffer("feature_std", torch.ones(shared.DIMENSION, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return the standardised features (B, 64), float64, of uint8 images (B, C, H, W)."""
        x, features = images.double() / 255, []
        for scale, filters in enumerate(self.filters):
            x = conv2d(pad(avg_pool2d(x, 2) if scale else x, (1, 1, 1, 1), mode="replicate"), filters).abs()
            mean, square = adaptive_avg_pool2d(x, 2), adaptive_avg_pool2d(x**2, 2)
            features += [mean.flatten(1), (square - mean**2).clamp(min=0).sqrt().flatten(1)]
        return (torch.cat(features, 1) - self.feature_mean) / self.feature_std, None


def _filters(random: np.random.RandomState, filters: int, channels: int) -> NDArray[np.float64]:
    """Draw filters (filters, channels, 3, 3) with sum 0 and sum of squares 1, in integers."""
    drawn = random.randint(-127, 128, size=(filters, channels, 3, 3), dtype=np.int64)
    centred = drawn * drawn[0].size - drawn.sum((1, 2, 3), keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).sum((1, 2, 3), keepdims=True)))


def make(context: BuildContext) -> tuple[Record, nn.Module]:
    """Standardise the features on the training images."""
    images, network = context.images.images, RandomConv(context.images.shape[0])
    content, order = shared.content_hash(context.images, labelled=False)
    mean, std = shared.feature_scale(network, images, order)
    std = torch.where(std > shared.CONSTANT, std, 1.0)  # a constant feature has no unit
    for buffer, values in ((network.feature_mean, mean), (network.feature_std, std)):
        buffer.copy_((values / MOMENT_STEP).round() * MOMENT_STEP)
    recipe = {"filters": SHA256[images.shape[1]], "arithmetic": "float64"}
    record = shared.new_record(
        context,
        id=shared.make_id(context.name, content, recipe),
        layer="means and deviations over quarters, at three scales",
        dimension=shared.DIMENSION,
        trained_on={"n": len(images), "sha256": content},
        recipe=recipe,
    )
    return record, network.eval()


def load(record: Record, folder: Path) -> nn.Module:
    """Load the network that `make` fitted."""
    return shared.load_weights(RandomConv(record["shape"][0]), folder / shared.WEIGHTS_FILE, record)
