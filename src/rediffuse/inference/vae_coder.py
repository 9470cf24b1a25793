"""What one does with a VAE beside drawing from it.  Apart from vae.py, so that a change here draws no image again."""

from __future__ import annotations

import torch
from torch import Tensor

from rediffuse.images.pixels import from_unit, to_unit
from rediffuse.runtime.device import Precision, autocast, device
from rediffuse.runtime.shards import SHARD
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import bits_per_dim, elbo
from rediffuse.vae.prior import Prior


class VAECoder:
    """Images as latents: the mean of q(z|x), and the mean of p(x|z) back; a conditional VAE needs their label."""

    steps = 1

    def __init__(self, vae: VAE, prior: Prior, precision: Precision) -> None:
        self.vae, self.prior, self.precision = vae, prior, precision

    def encode(self, images: Tensor, label: int | None) -> Tensor:
        """uint8 (B, C, H, W) -> (B, latent_dim)."""
        with autocast(device(), self.precision):
            return self.vae.encode(to_unit(images.to(device())), self._labels(len(images), label))[0]

    def decode(self, codes: Tensor, label: int | None) -> Tensor:
        """(B, latent_dim) -> uint8 (B, C, H, W)."""
        with autocast(device(), self.precision):
            return from_unit(self.vae.decode(codes.to(device()), self._labels(len(codes), label)))

    def between(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """(K, latent_dim): the straight line from a to b, share (K,) of the way."""
        return torch.lerp(a[None], b[None], share[:, None])

    def drawn(self, generator: torch.Generator) -> Tensor:
        """The latent of the first image of a seed."""
        return self.prior(SHARD, generator)[0]

    def bits(self, images: Tensor, label: int | None, generator: torch.Generator, evaluations: int | None) -> Tensor:
        """The negative ELBO in bits per dimension, float64 (B,), the mean over so many samples of q(z|x), 1 if None; in float32."""
        x, count, labels = to_unit(images.to(device())), evaluations or 1, self._labels(len(images), label)
        noise = [torch.randn(len(x), self.vae.latent_dim, generator=generator).to(device()) for _ in range(count)]
        nats = torch.stack([elbo(self.vae, x, eps, labels).total.double() for eps in noise]).mean(0)
        return torch.tensor([bits_per_dim(self.vae, value) for value in nats.tolist()], dtype=torch.float64)

    def _labels(self, n: int, label: int | None) -> Tensor | None:
        return None if label is None else torch.full((n,), label, device=device())
