"""The convolutional VAE (Kingma & Welling 2014): encoder q(z|x), decoder p(x|z), standard normal prior p(z).

With labels y: q(z|x,y), p(x|z,y), and p(z) independent of y (Kingma et al. 2014, M2; Sohn et al. 2015).

Encoder: convolutions that halve the image, flatten, a dense layer, then two heads, mean and log-variance.
Decoder: dense layers, transposed convolutions that double the image, a residual block before the last,
sigmoid.  ReLU between all layers.
With a spatial latent the dense layers are convolutions, and each position has its own latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, relu

from rediffuse.runtime.kinds import Kind
from rediffuse.runtime.weights import Rebuildable

LOG_VARIANCE_RANGE = (-20.0, 10.0)  # keeps exp() finite when an untrained encoder overshoots
MIN_SIGMA = 1 / 510  # half a grey level: 8-bit pixels hold no finer detail


class Architecture(TypedDict):
    """The arguments of a VAE except the images' shape and classes."""

    latent_dim: int
    latent_channels: int
    channels: list[int]
    hidden: int
    likelihood: Literal["bernoulli", "gaussian"]


class VAE(Rebuildable):
    """A VAE for images of one shape.  `config` holds the arguments that rebuild it.

    shape: (C, H, W).  channels: feature maps after each halving.  hidden: width of the dense layers.
    latent_channels: above 0 the latent is spatial, with this many dimensions at each position; latent_dim and
    hidden are then ignored, and the attribute `latent_dim` counts all dimensions.
    likelihood: "bernoulli", or "gaussian" with one learned sigma for all pixels (Rybkin et al. 2021).
    class_names: names of the labels 0, 1, ...; empty for an unconditional VAE, which ignores labels.

    Pixels are in [0, 1]; latents z are (B, latent_dim); labels are int64 (B,).
    """

    kind: ClassVar[Kind] = "vae"

    def __init__(
        self, shape: Sequence[int], *, class_names: Sequence[str] = (), **architecture: Unpack[Architecture]
    ) -> None:
        super().__init__()
        self.config = {"shape": list(shape), **architecture, "class_names": list(class_names)}
        channels, hidden = architecture["channels"], architecture["hidden"]
        latent_channels, deepest = architecture["latent_channels"], channels[-1]
        sizes = _halvings(shape, len(channels))
        features = (deepest, *sizes[-1])
        self.shape, self.likelihood = (shape[0], shape[1], shape[2]), architecture["likelihood"]
        self.class_names, self.classes = tuple(class_names), len(class_names)
        self.latent_shape = (
            (latent_channels, *sizes[-1]) if latent_channels else (architecture["latent_dim"], 1, 1)
        )
        self.latent_dim = math.prod(self.latent_shape)
        by_label = {"classes": self.classes, "width": deepest if latent_channels else hidden}
        down = [_down(a, b) for a, b in pairwise([shape[0], *channels])]
        last: list[nn.Module]
        first: list[nn.Module]
        if latent_channels:
            last = [nn.Conv2d(deepest, deepest, 3, padding=1), nn.ReLU()]
            self.encoder = LabelSequential(*down, *last, **by_label)
            self.mean: nn.Module = nn.Conv2d(deepest, latent_channels, 1)
            self.log_variance: nn.Module = nn.Conv2d(deepest, latent_channels, 1)
            widen = nn.Conv2d(latent_channels, deepest, 3, padding=1)
            first = [nn.Unflatten(1, self.latent_shape), widen, nn.ReLU()]
        else:
            flat = math.prod(features)
            last = [nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU()]
            self.encoder = LabelSequential(*down, *last, **by_label)
            self.mean, self.log_variance = (nn.Linear(hidden, self.latent_dim) for _ in range(2))
            dense = [nn.Linear(self.latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, flat), nn.ReLU()]
            first = [*dense, nn.Unflatten(1, features)]
        levels = zip(channels[:0:-1], channels[-2::-1], sizes[-2:0:-1], strict=True)
        up = [nn.Sequential(_double(*level, kernel=3), nn.ReLU()) for level in levels]
        # No features at full size: they would take half the time of a training step.
        to_pixels = [ResidualBlock(channels[0]), _double(channels[0], shape[0], sizes[0], kernel=5)]
        self.decoder = LabelSequential(*first, *up, *to_pixels, **by_label)
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=self.likelihood == "gaussian")

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z|x), each float32 (B, latent_dim), of pixels x (B, C, H, W)."""
        features = self.encoder(x, labels)
        mean, log_variance = self.mean(features).flatten(1), self.log_variance(features).flatten(1)
        return mean.float(), log_variance.float().clamp(*LOG_VARIANCE_RANGE)

    def decode_logits(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return p(x|z) as logits, (B, C, H, W), float32, from which likelihoods do not overflow."""
        logits: Tensor = self.decoder(z, labels)
        return logits.float()

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean of p(x|z), (B, C, H, W) in [0, 1]."""
        return self.decode_logits(z, labels).sigmoid()

    def sigma(self) -> Tensor:
        """Return the standard deviation of the Gaussian likelihood, in units of the pixel range; a scalar."""
        return self.log_sigma.exp().clamp_min(MIN_SIGMA)


class LabelSequential(nn.Sequential):
    """Layers in sequence.  The layer before the first ReLU also sees the one-hot label y beside its input h.

    W [h, y] = W_h h + W_y y, and W_y y is a column of W_y: a bias of `width` features for each label.  It
    starts as N(0, 1), well above the other weights.  From 0, the latents would learn the class before the
    label can tell it, and the decoder would then ignore the label.  classes: 0 for no labels.  Raises
    ValueError for missing labels.
    """

    def __init__(self, *layers: nn.Module, classes: int, width: int) -> None:
        super().__init__(*layers)
        self.relu = [isinstance(layer, nn.ReLU) for layer in layers].index(True)
        self.by_label = nn.Parameter(torch.randn(classes, width)) if classes else None

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        for index, layer in enumerate(self):
            if index == self.relu and self.by_label is not None:
                if labels is None:
                    classes, count = len(self.by_label), len(input)
                    raise ValueError(f"a VAE of {classes} classes needs labels, int64 ({count},), got None")
                bias = embedding(labels, self.by_label)
                input = input + bias.view(*bias.shape, *[1] * (input.ndim - 2))
            input = layer(input)
        return input


class ResidualBlock(nn.Module):
    """Add two convolutions to x, which start as zero (He et al. 2016)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = (nn.Conv2d(features, features, 3, padding=1) for _ in range(2))
        for parameter in self.conv_2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return relu(x + self.conv_2(relu(self.conv_1(x))))


def reparameterise(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    """Return z = mean + sigma * eps with eps ~ N(0, I), a sample of q(z|x) (Kingma & Welling 2014, eq. 4)."""
    return mean + (0.5 * log_variance).exp() * eps


def _halvings(shape: Sequence[int], times: int) -> list[tuple[int, int]]:
    """Return height and width before and after each halving, rounded up."""
    sizes = [(shape[1], shape[2])]
    for _ in range(times):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def _down(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU())


def _double(inputs: int, outputs: int, size: tuple[int, int], *, kernel: int) -> nn.Module:
    """Double the size, to this one; one row or column less where the encoder rounded up."""
    padding = ((size[0] + 1) % 2, (size[1] + 1) % 2)
    return nn.ConvTranspose2d(inputs, outputs, kernel, 2, padding=kernel // 2, output_padding=padding)
