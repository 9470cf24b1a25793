"""The convolutional VAE (Kingma & Welling 2014): encoder q(z|x), decoder p(x|z), standard normal prior p(z).

Encoder: convolutions that halve the image and deepen the features, ReLU, flatten, dense, then two heads, mean and log-variance.
Decoder: dense, reshape, transposed convolutions that double the image, sigmoid.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

LOG_VARIANCE_RANGE = (-20.0, 10.0)  # keeps exp() finite when a young encoder overshoots
MIN_SIGMA = 1 / 510  # half a grey level: below it a density on 8-bit pixels rewards nothing real


class VAE(nn.Module):
    """A VAE for images of one shape.

    shape: (C, H, W).  channels: feature maps after each halving.  hidden: width of the dense layers.
    likelihood: "bernoulli", or "gaussian" with one learned sigma for all pixels (Rybkin et al. 2021).
    Pixels are in [0, 1]; latents z are (B, latent_dim).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        latent_dim: int,
        channels: list[int],
        hidden: int,
        likelihood: Literal["bernoulli", "gaussian"],
    ) -> None:
        super().__init__()
        self.shape, self.latent_dim, self.likelihood = shape, latent_dim, likelihood
        sizes = _halvings(shape, len(channels))
        features = (channels[-1], *sizes[-1])
        flat = features[0] * features[1] * features[2]
        self.encoder = nn.Sequential(
            *(_down(a, b) for a, b in zip([shape[0], *channels[:-1]], channels, strict=True)),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.ReLU(),
        )
        self.mean = nn.Linear(hidden, latent_dim)
        self.log_variance = nn.Linear(hidden, latent_dim)
        outputs = [*channels[-2::-1], channels[0]]
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, flat),
            nn.ReLU(),
            nn.Unflatten(1, features),
            *(_up(a, b, size) for a, b, size in zip(channels[::-1], outputs, sizes[-2::-1], strict=True)),
            nn.Conv2d(channels[0], shape[0], 3, padding=1),
        )
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=likelihood == "gaussian")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each (B, latent_dim), float32, of pixels x (B, C, H, W) in [0, 1]."""
        features = self.encoder(x)
        return self.mean(features).float(), self.log_variance(features).float().clamp(*LOG_VARIANCE_RANGE)

    def decode_logits(self, z: Tensor) -> Tensor:
        """The decoder before its sigmoid, (B, C, H, W), float32; likelihoods are computed from it without overflow."""
        logits: Tensor = self.decoder(z)
        return logits.float()

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z), (B, C, H, W) in [0, 1]."""
        return self.decode_logits(z).sigmoid()

    def sigma(self) -> Tensor:
        """The standard deviation of the Gaussian likelihood, in units of the pixel range; a scalar."""
        return self.log_sigma.exp().clamp_min(MIN_SIGMA)


def reparameterise(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    """z = mean + sigma * eps with eps ~ N(0, I): a sample of q(z|x) through which gradients flow (Kingma & Welling 2014, eq. 4)."""
    return mean + (0.5 * log_variance).exp() * eps


def _halvings(shape: tuple[int, int, int], times: int) -> list[tuple[int, int]]:
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
