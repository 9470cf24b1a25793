"""The in-domain classifiers: the network, images in, features and class logits out, and how it is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from rediffuse.images.pixels import to_signed

ARCHITECTURE = 1  # part of the id of a trained instrument: another network measures other distances
CHANNELS = (64, 128)
BATCH = 250  # images in one pass without gradients


class Classifier(nn.Module):
    """A small convolutional classifier of grey or colour images with sides from 16 to 128 pixels.

    The penultimate layer is linear: a ReLU after it would make features constant and covariances singular.
    The buffers hold the scale of the raw features on the training images. The last map is 4 to 8 wide for
    every size: images with a side above 32 are folded by 4 instead of 2, and those above 64 get a third
    stage.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        classes: int = 10,
        dimension: int = 64,
        *,
        shape: Sequence[int] = (1, 28, 28),
        channels: tuple[int, int] = CHANNELS,
    ) -> None:
        super().__init__()
        (image_channels, *sides), (narrow, wide) = shape, channels
        fold = 2 if max(sides) <= 32 else 4
        self.unit = fold * (2 if max(sides) <= 64 else 4)  # pixels of a side for each place of the last map
        third: list[nn.Module] = []
        if self.unit == 16:  # made before the others: the random weights depend on this order
            third = [nn.MaxPool2d(2), *_convolution(wide, wide), *_convolution(wide, wide)]
        self.convolutions = nn.Sequential(
            nn.PixelUnshuffle(fold),  # for 28 x 28: (B, 4, 14, 14): all pixels, at a quarter of the cost
            *_convolution(image_channels * fold**2, narrow),
            *_convolution(narrow, narrow),
            nn.MaxPool2d(2),  # (B, 64, 7, 7)
            *_convolution(narrow, wide),
            *_convolution(wide, wide),
            *third,
        )
        places = -(-sides[0] // self.unit) * -(-sides[1] // self.unit)
        self.penultimate = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(wide * places, dimension))
        self.logits = nn.Sequential(nn.BatchNorm1d(dimension), nn.ReLU(), nn.Linear(dimension, classes))
        self.register_buffer("feature_mean", torch.zeros(dimension, dtype=torch.float64))
        self.register_buffer("feature_std", torch.ones(dimension, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardised features (B, d), float64, and logits (B, classes) of uint8 images."""
        raw = self.penultimate(self.convolutions(to_signed(self._bordered(images))))
        return (raw.double() - self.feature_mean) / self.feature_std, self.logits(raw)

    def _bordered(self, images: Tensor) -> Tensor:
        """Add a black border that makes the sides multiples of `unit`."""
        height, width = (-side % self.unit for side in images.shape[2:])
        border = (width // 2, width - width // 2, height // 2, height - height // 2)
        return nn.functional.pad(images, border) if any(border) else images


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def build_classifier(record: dict[str, Any]) -> Classifier:
    """Return the network that a record describes, its weights still arbitrary."""
    with torch.random.fork_rng(devices=[]):
        return Classifier(len(record["classes"]), record["dimension"], shape=record["shape"])


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    The number of steps does not depend on the size of the set: seven epochs of 55,000 images in batches of
    128, minutes on a CPU core. A small set is seen more often, and the held-out images prevent overfitting; a
    very large set is not seen whole, which costs accuracy but not hours.
    """

    seed: int = 20_240_501
    held_out: int = 5_000  # training images that choose the weights, at most a tenth; 0: none
    looks: int = 7  # how often the weights are compared on them, evenly over the training
    steps: int = 3_003
    batch: int = 128  # all images where there are fewer
    lr: float = 3e-3  # the peak of one cycle
    warmup: float = 0.15  # share of the steps
    weight_decay: float = 1e-2
    shift: float = 1 / 28  # of the longer side: random translation along both axes, at least a pixel


def train_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: int,
    recipe: Recipe,
    *,
    channels: tuple[int, int] = CHANNELS,
    device: torch.device | None = None,
    autocast: AbstractContextManager[object] | None = None,
    title: str = "classifier",
) -> tuple[Classifier, float | None]:
    """Return a classifier of uint8 images (N, C, H, W) with labels 0 .. classes - 1, and its accuracy.

    Of `looks` states it is the one with the best accuracy on the held-out images; without these, the last
    one, and None. The features are not standardised yet. The global random state does not change. The steps
    run on `device` (CPU if None) within `autocast`, which must be reusable (float32 if None).
    """
    device, autocast = device or torch.device("cpu"), autocast or nullcontext()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(recipe.seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(recipe.seed)
        held, used = torch.randperm(len(images)).tensor_split([min(recipe.held_out, len(images) // 10)])
        x, y = torch.tensor(images).to(device), torch.tensor(labels).to(device)
        network = Classifier(classes, shape=images.shape[1:], channels=channels)
        network.to(device).to(memory_format=torch.channels_last)
        best = _train(network, x, y, held.to(device), used, recipe, autocast, title)
    return network.to("cpu").eval(), best


def _train(
    network: Classifier,
    x: Tensor,
    y: Tensor,
    held: Tensor,
    used: Tensor,
    recipe: Recipe,
    autocast: AbstractContextManager[object],
    title: str,
) -> float | None:
    """Train on the images `used`; keep the state that is best on the images `held`, return its accuracy."""
    shift, steps = max(1, round(recipe.shift * max(x.shape[2:]))), recipe.steps
    weights, decay = network.parameters(), recipe.weight_decay
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, steps, pct_start=recipe.warmup)
    batches, cross_entropy = _batches(used, min(recipe.batch, len(used))), nn.CrossEntropyLoss()
    best, chosen = -1.0, dict[str, Any]()
    bar = tqdm(range(1, steps + 1), desc=title, unit="step", leave=False)
    for step in bar:
        index = next(batches).to(x.device)
        with autocast:
            _, logits = network.train()(_shifted(x[index], shift))
        loss: Tensor = cross_entropy(logits.float(), y[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if len(held) and step * recipe.looks // steps > (step - 1) * recipe.looks // steps:
            reached = accuracy(network, x[held], y[held])
            bar.set_postfix(held_out=f"{reached:.4f}")
            if reached > best:
                best, chosen = reached, copy.deepcopy(network.state_dict())
    if not chosen:
        return None
    network.load_state_dict(chosen)
    return best


def _batches(index: Tensor, size: int) -> Iterator[Tensor]:
    """Yield full batches without end; each pass over the images has a new random order."""
    while True:
        mixed = index[torch.randperm(len(index))]
        for start in range(0, len(mixed) - size + 1, size):
            yield mixed[start : start + size]


def _shifted(images: Tensor, shift: int) -> Tensor:
    """Move each image (B, C, H, W) by up to `shift` pixels along both axes, filling with black."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (shift, shift, shift, shift)).movedim(1, -1)
    rows = torch.randint(2 * shift + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * shift + 1, (n, 1)) + torch.arange(width)
    rows, columns, each = (index.to(images.device) for index in (rows, columns, torch.arange(n)))
    return padded[each[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@torch.inference_mode()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of the images whose largest logit is the label's."""
    network.eval()
    classes = torch.cat([network(part)[1].argmax(1) for part in torch.split(images, BATCH)])
    return float((classes == labels).double().mean())
