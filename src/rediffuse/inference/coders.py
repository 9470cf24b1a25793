"""Images as codes, and back: latents of a VAE, or the noise that a DDPM draws an image from.

Both coders work on one shard: images uint8 (64, C, H, W), labels int64 (64,) on `device()`; None: no label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.images.pixels import from_unit, to_unit
from rediffuse.inference.inpainting import repaint
from rediffuse.inference.inversion import invert, slerp
from rediffuse.inference.likelihood import stratified_times, variational_bound
from rediffuse.runtime.device import Precision, autocast, device
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.shards import SHARD
from rediffuse.sampling.guidance import guided
from rediffuse.sampling.samplers import ddim, even_times
from rediffuse.sampling.space import Space
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import bits_per_dim, elbo
from rediffuse.vae.prior import Prior


class VAECoder:
    """Codes an image as the mean of q(z|x), (latent_dim,), and decodes z to the mean of p(x|z)."""

    def __init__(self, vae: VAE, prior: Prior, precision: Precision) -> None:
        self.vae, self.prior, self.precision = vae, prior, precision

    def encode(self, images: Tensor, labels: Tensor | None) -> Tensor:
        with autocast(device(), self.precision):
            return self.vae.encode(to_unit(images.to(device())), labels)[0]

    def decode(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        with autocast(device(), self.precision):
            return from_unit(self.vae.decode(codes.to(device()), labels))

    def interpolate(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """Return the codes (K, ...) that lie share (K,) of the way from a to b."""
        return torch.lerp(a[None], b[None], share[:, None])

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the code of the first image of a seed."""
        return self.prior(SHARD, generator)[0]

    def bits(
        self, images: Tensor, labels: Tensor | None, generator: torch.Generator, evaluations: int | None
    ) -> Tensor:
        """Return the negative ELBO, bits per dimension, float64 (64,), of `evaluations` samples (None: 1)."""
        x, shape = to_unit(images.to(device())), (len(images), self.vae.latent_dim)
        noise = [torch.randn(shape, generator=generator).to(device()) for _ in range(evaluations or 1)]
        nats = torch.stack([elbo(self.vae, x, eps, labels).total.double() for eps in noise]).mean(0)
        return torch.tensor([bits_per_dim(self.vae, value) for value in nats.tolist()], dtype=torch.float64)


class DDPMCoder:
    """Codes an image as x_T by the probability flow in `steps` steps of DDIM, and decodes x_T by DDIM."""

    def __init__(self, denoiser: Denoiser, space: Space, precision: Precision, steps: int) -> None:
        self.denoise, self.schedule, self.shape = guided(denoiser), denoiser.schedule, denoiser.shape
        self.space, self.precision = space, precision
        self.times = even_times(self.schedule, steps)

    def encode(self, images: Tensor, labels: Tensor | None) -> Tensor:
        with autocast(device(), self.precision):
            x_0 = self.space.encode(images.to(device()))
            return invert(self.denoise, self.schedule, x_0, labels, times=self.times)

    def decode(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        x_T = codes.to(device())
        with autocast(device(), self.precision):
            x_0 = ddim(self.denoise, self.schedule, x_T, labels, times=self.times, noise=lambda: x_T)
            return self.space.decode(x_0)

    def interpolate(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        return slerp(a, b, share)

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randn(SHARD, *self.shape, generator=generator)[0]

    def bits(
        self, images: Tensor, labels: Tensor | None, generator: torch.Generator, evaluations: int | None
    ) -> Tensor:
        """Return the variational bound, bits per dimension, at `evaluations` times (None: all)."""
        T = self.schedule.T
        if evaluations is not None and not 1 <= evaluations < T:
            allowed = f"between 1 and T - 1 ({T - 1}) for this model"
            raise UserError(f"evaluations must be {allowed}, got {evaluations}")
        times = None if evaluations is None else stratified_times(T, evaluations, generator)
        x_0 = self.space.encode(images.to(device()))
        with autocast(device(), self.precision):
            return variational_bound(self.denoise, self.schedule, x_0, labels, generator, times=times)

    def inpaint(
        self, image: Tensor, known: Tensor, labels: Tensor | None, generator: torch.Generator, rounds: int
    ) -> Tensor:
        """Return a shard of images that equal `image`, (C, H, W), where `known`, bool (H, W), is true."""

        def noise() -> Tensor:
            return torch.randn(SHARD, *self.shape, generator=generator).to(device())

        D, schedule, times = self.denoise, self.schedule, self.times
        x_0, mask = self.space.encode(image.to(device())).expand(SHARD, *image.shape), known.to(device())
        with autocast(device(), self.precision):
            drawn = repaint(D, schedule, x_0, mask, noise(), labels, times=times, rounds=rounds, noise=noise)
        return torch.where(known, image, self.space.decode(drawn).cpu())


Coder = VAECoder | DDPMCoder
