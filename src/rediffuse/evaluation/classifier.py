"""The network of the in-domain classifiers: images in, features and class logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rediffuse.images.pixels import to_signed

ARCHITECTURE = 1  # goes into the id of a trained instrument; another network is another ruler
DIMENSION = 64  # of the penultimate layer
CHANNELS = (64, 128)
SHAPE = (1, 28, 28)


class Classifier(nn.Module):
    """A small convolutional classifier of grey or colour images with sides from 16 to 128, 0.67 M parameters for 28 x 28.

    The penultimate layer is linear: a ReLU behind it would give dead features and singular covariances.  The buffers
    `feature_mean` and `feature_std` (of the training images) put every feature on the scale of the real data, so that the
    unit of the distances does not depend on the accidents of one training run.

    The last map is 4 to 8 wide whatever the sides of the images: larger images are folded by 4 instead of 2, and above 64 pixels
    there is a third stage.  Sides that cannot be halved so often get a black border.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self, classes: int = 10, dimension: int = DIMENSION, *, shape: Sequence[int] = SHAPE, channels: tuple[int, int] = CHANNELS
    ) -> None:
        super().__init__()
        image_channels, *sides = shape
        fold = 2 if max(sides) <= 32 else 4
        self.unit = 2 * fold if max(sides) <= 64 else 4 * fold  # pixels of a side that become one place of the last map
        narrow, wide = channels
        deeper = [nn.MaxPool2d(2), *_convolution(wide, wide), *_convolution(wide, wide)] if self.unit == 16 else []
        self.convolutions = nn.Sequential(
            nn.PixelUnshuffle(fold),  # for 28 x 28: (B, 4, 14, 14): all pixels, at a quarter of the cost
            *_convolution(image_channels * fold**2, narrow),
            *_convolution(narrow, narrow),
            nn.MaxPool2d(2),  # (B, 64, 7, 7)
            *_convolution(narrow, wide),
            *_convolution(wide, wide),
            *deeper,
        )
        height, width = (-(-side // self.unit) for side in sides)
        self.penultimate = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(wide * height * width, dimension))
        self.logits = nn.Sequential(nn.BatchNorm1d(dimension), nn.ReLU(), nn.Linear(dimension, classes))
        self.register_buffer("feature_mean", torch.zeros(dimension, dtype=torch.float64))
        self.register_buffer("feature_std", torch.ones(dimension, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, d), float64, and the logits (B, classes) of uint8 images (B, C, H, W).

        The features are in units of the training images: mean 0, standard deviation 1.
        """
        raw = self.penultimate(self.convolutions(to_signed(self._bordered(images))))
        return (raw.double() - self.feature_mean) / self.feature_std, self.logits(raw)

    def _bordered(self, images: Tensor) -> Tensor:
        """With black around them, so that the sides are multiples of `unit`."""
        height, width = (-side % self.unit for side in images.shape[2:])
        border = (width // 2, width - width // 2, height // 2, height - height // 2)
        return nn.functional.pad(images, border) if any(border) else images


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]


def build_classifier(record: dict[str, Any]) -> Classifier:
    """The network that a record describes, its weights still arbitrary."""
    with torch.random.fork_rng(devices=[]):  # the layers draw weights, which are replaced
        return Classifier(len(record["classes"]), record["dimension"], shape=record["shape"])
