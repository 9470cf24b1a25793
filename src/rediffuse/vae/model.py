"""The convolutional VAE (Kingma & Welling 2014): encoder q(z|x), decoder p(x|z), standard normal prior p(z).

With labels y it is conditional: q(z|x,y), p(x|z,y), and p(z) as before, independent of y (Kingma et al. 2014, M2; Sohn et al. 2015).

Encoder: convolutions that halve the image and deepen the features, ReLU, flatten, dense, then two heads, mean and log-variance.
Decoder: dense, reshape, transposed convolutions that double the image, sigmoid.  With a spatial latent the dense layers are convolutions,
and each position of the smallest resolution has some latent dimensions of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from rediffuse.runtime.kinds import Kind
from rediffuse.runtime.weights import Rebuildable

LOG_VARIANCE_RANGE = (-20.0, 10.0)  # keeps exp() finite when a young encoder overshoots
MIN_SIGMA = 1 / 510  # half a grey level: below it a density on 8-bit pixels rewards nothing real


class Architecture(TypedDict):
    """The arguments of a VAE beside the images' shape and classes."""

    latent_dim: int
    latent_channels: int
    channels: list[int]
    hidden: int
    likelihood: Literal["bernoulli", "gaussian"]


class VAE(Rebuildable):
    """A VAE for images of one shape.  `config` has the arguments that rebuild it.

    shape: (C, H, W).  channels: feature maps after each halving.  hidden: width of the dense layers.  latent_channels: above 0 the latent
    is spatial, of so many dimensions at each position, and latent_dim and hidden are ignored; `latent_dim` counts all of them then.
    likelihood: "bernoulli", or "gaussian" with one learned sigma for all pixels (Rybkin et al. 2021).
    class_names: of the labels 0, 1, ..., none for an unconditional VAE.
    Pixels are in [0, 1]; latents z are (B, latent_dim); labels, int64 (B,), are needed by a conditional VAE and ignored by another.
    """

    kind: ClassVar[Kind] = "vae"

    def __init__(self, shape: Sequence[int], *, class_names: Sequence[str] = (), **architecture: Unpack[Architecture]) -> None:
        super().__init__()
        self.config = {"shape": list(shape), **architecture, "class_names": list(class_names)}
        latent_dim, latent_channels = architecture["latent_dim"], architecture["latent_channels"]
        channels, hidden = architecture["channels"], architecture["hidden"]
        sizes = _halvings(shape, len(channels))
        features = (channels[-1], *sizes[-1])
        flat = features[0] * features[1] * features[2]
        self.shape, self.likelihood = (shape[0], shape[1], shape[2]), architecture["likelihood"]
        self.class_names, self.classes = tuple(class_names), len(class_names)
        self.latent_shape = (latent_channels, *sizes[-1]) if latent_channels else (latent_dim, 1, 1)
        self.latent_dim = math.prod(self.latent_shape)
        down = [_down(a, b) for a, b in zip([shape[0], *channels[:-1]], channels, strict=True)]
        width = channels[-1] if latent_channels else hidden
        if latent_channels:
            last = nn.Conv2d(channels[-1], channels[-1], 3, padding=1)
            self.encoder = LabelSequential(*down, last, nn.ReLU(), classes=self.classes, width=width)
            self.mean: nn.Module = nn.Conv2d(channels[-1], latent_channels, 1)
            self.log_variance: nn.Module = nn.Conv2d(channels[-1], latent_channels, 1)
            first = [nn.Unflatten(1, self.latent_shape), nn.Conv2d(latent_channels, channels[-1], 3, padding=1), nn.ReLU()]
        else:
            self.encoder = LabelSequential(*down, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), classes=self.classes, width=width)
            self.mean, self.log_variance = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
            first = [nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, flat), nn.ReLU(), nn.Unflatten(1, features)]
        outputs = [*channels[-2::-1], channels[0]]
        self.decoder = LabelSequential(
            *first,
            *(_up(a, b, size) for a, b, size in zip(channels[::-1], outputs, sizes[-2::-1], strict=True)),
            nn.Conv2d(channels[0], shape[0], 3, padding=1),
            classes=self.classes,
            width=width,
        )
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=self.likelihood == "gaussian")

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each (B, latent_dim), float32, of pixels x (B, C, H, W) in [0, 1]."""
        features = self.encoder(x, labels)
        mean, log_variance = self.mean(features).flatten(1), self.log_variance(features).flatten(1)
        return mean.float(), log_variance.float().clamp(*LOG_VARIANCE_RANGE)

    def decode_logits(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The decoder before its sigmoid, (B, C, H, W), float32; likelihoods are computed from it without overflow."""
        logits: Tensor = self.decoder(z, labels)
        return logits.float()

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean of p(x|z), (B, C, H, W) in [0, 1]."""
        return self.decode_logits(z, labels).sigmoid()

    def sigma(self) -> Tensor:
        """The standard deviation of the Gaussian likelihood, in units of the pixel range; a scalar."""
        return self.log_sigma.exp().clamp_min(MIN_SIGMA)


class LabelSequential(nn.Sequential):
    """Layers one after the other, of which the one before the first ReLU at this level sees the one-hot label y beside its input h.

    W [h, y] is W_h h + W_y y, and W_y y a column of W_y: the label's own bias of `width` features, in a convolution the same at each
    position.  It starts as N(0, 1), well above the other weights: from 0 the latents learn the class before the label can tell it, and
    the decoder then ignores the label.  classes: 0: no labels.
    Raises ValueError for labels that are missing where there are classes.
    """

    def __init__(self, *layers: nn.Module, classes: int, width: int) -> None:
        super().__init__(*layers)
        self.relu = [isinstance(layer, nn.ReLU) for layer in layers].index(True)
        self.by_label = nn.Parameter(torch.randn(classes, width)) if classes else None

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        for index, layer in enumerate(self):
            if index == self.relu and self.by_label is not None:
                if labels is None:
                    raise ValueError(f"a VAE of {len(self.by_label)} classes needs labels, int64 ({len(input)},), got None")
                bias = embedding(labels, self.by_label)
                input = input + bias.view(*bias.shape, *[1] * (input.ndim - 2))
            input = layer(input)
        return input


def reparameterise(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    """z = mean + sigma * eps with eps ~ N(0, I): a sample of q(z|x) through which gradients flow (Kingma & Welling 2014, eq. 4)."""
    return mean + (0.5 * log_variance).exp() * eps


def _halvings(shape: Sequence[int], times: int) -> list[tuple[int, int]]:
    """Height and width before and after each halving (rounded up)."""
    sizes = [(shape[1], shape[2])]
    for _ in range(times):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def _down(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU())


def _up(inputs: int, outputs: int, size: tuple[int, int]) -> nn.Module:
    """Twice the size, less one row or column where the encoder rounded up."""
    padding = ((size[0] + 1) % 2, (size[1] + 1) % 2)
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=padding), nn.ReLU())
