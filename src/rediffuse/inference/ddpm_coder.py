"""What one does with a DDPM beside drawing from it.  Apart from ddpm.py, so that a change here draws no image again."""

from __future__ import annotations

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.inference.inpainting import repaint
from rediffuse.inference.inversion import invert, slerp
from rediffuse.inference.likelihood import stratified_times, variational_bound
from rediffuse.runtime.device import Precision, autocast, device
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.shards import SHARD
from rediffuse.sampling.guidance import guided
from rediffuse.sampling.samplers import ddim, even_times
from rediffuse.sampling.space import Space


class DDPMCoder:
    """Images as the noise that they would be drawn from, by the probability flow in `steps` steps of DDIM, and back."""

    def __init__(self, denoiser: Denoiser, space: Space, precision: Precision, steps: int) -> None:
        self.denoiser, self.space, self.precision, self.steps = denoiser, space, precision, steps
        self.times = even_times(denoiser.schedule, steps)

    def encode(self, images: Tensor, label: int | None) -> Tensor:
        """uint8 (B, C, H, W) -> x_T, of the shape of the denoiser."""
        with autocast(device(), self.precision):
            x_0 = self.space.encode(images.to(device()))
            return invert(guided(self.denoiser), self.denoiser.schedule, x_0, self._labels(len(x_0), label), times=self.times)

    def decode(self, codes: Tensor, label: int | None) -> Tensor:
        """x_T -> uint8 (B, C, H, W)."""
        x_T = codes.to(device())
        with autocast(device(), self.precision):
            labels = self._labels(len(x_T), label)
            x_0 = ddim(guided(self.denoiser), self.denoiser.schedule, x_T, labels, times=self.times, noise=lambda: x_T)
            return self.space.decode(x_0)

    def between(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """(K, C, H, W): the great circle from a to b, share (K,) of the way."""
        return slerp(a, b, share)

    def drawn(self, generator: torch.Generator) -> Tensor:
        """x_T of the first image of a seed."""
        return torch.randn(SHARD, *self.denoiser.shape, generator=generator)[0]

    def bits(self, images: Tensor, label: int | None, generator: torch.Generator, evaluations: int | None) -> Tensor:
        """The variational bound in bits per dimension, float64 (B,), from so many evaluations of the network; all T - 1 if None."""
        schedule = self.denoiser.schedule
        if evaluations is not None and not 1 <= evaluations < schedule.T:
            raise UserError(f"evaluations must be between 1 and T - 1 ({schedule.T - 1}) for this model, got {evaluations}")
        times = None if evaluations is None else stratified_times(schedule.T, evaluations, generator)
        x_0 = self.space.encode(images.to(device()))
        labels = self._labels(len(x_0), label)
        with autocast(device(), self.precision):
            return variational_bound(guided(self.denoiser), schedule, x_0, labels, generator, times=times).total

    def inpaint(self, image: Tensor, known: Tensor, indices: Tensor, generator: torch.Generator, label: int | None, rounds: int) -> Tensor:
        """A shard of images, uint8 (64, C, H, W), that agree with `image`, uint8 (C, H, W), where `known`, bool (H, W), is true."""

        def noise() -> Tensor:
            return torch.randn(len(indices), *self.denoiser.shape, generator=generator).to(device())

        x_0 = self.space.encode(image.to(device())).expand(len(indices), *image.shape)
        labels = self._labels(len(indices), label)
        with autocast(device(), self.precision):
            denoise, schedule = guided(self.denoiser), self.denoiser.schedule
            drawn = repaint(denoise, schedule, x_0, known.to(device()), noise(), labels, times=self.times, rounds=rounds, noise=noise)
        return torch.where(known, image, self.space.decode(drawn).cpu())

    def _labels(self, n: int, label: int | None) -> Tensor | None:
        """None, as for a model without labels, is "no label"."""
        return None if label is None else torch.full((n,), label, device=device())
