"""Images from the DDPM: Gaussian noise, denoised step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from rediffuse.data.pixels import from_signed
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.samplers import SAMPLERS, SPACINGS, Observe
from rediffuse.params import SampleDDPM
from rediffuse.shards import DrawShard
from rediffuse.training.hardware import Precision, autocast, device


def ddpm_shards(
    denoiser: Denoiser, settings: SampleDDPM, precision: Precision, *, label: int | None = None, observe: Observe | None = None
) -> DrawShard:
    """What draws a shard from the denoiser, which is on `device()`.

    label: of all images; None: 0, 1, 2, ... in turn.  It changes no noise.  A model without labels takes None only.
    observe: sees each step of the sampler.
    """
    denoise = denoiser.denoise(guidance_scale=settings.guidance_scale)
    times = SPACINGS[settings.spacing](denoiser.schedule, settings.steps)

    def draw_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        def noise() -> Tensor:
            return torch.randn(len(indices), *denoiser.shape, generator=generator).to(device())

        labels = None
        if denoiser.classes:
            labels = (indices % denoiser.classes if label is None else torch.full_like(indices, label)).to(device())
        with autocast(device(), precision):
            x_0 = SAMPLERS[settings.sampler](
                denoise,
                denoiser.schedule,
                noise(),
                labels,
                times=times,
                eta=settings.eta,
                noise=noise,
                observe=observe,
            )
        return from_signed(x_0)

    return draw_shard
