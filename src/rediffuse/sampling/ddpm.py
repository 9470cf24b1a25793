"""Images from the DDPM: Gaussian noise, denoised step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.params import SampleDDPM
from rediffuse.runtime.device import Precision, autocast, device
from rediffuse.runtime.shards import DrawShard, asked_labels
from rediffuse.sampling.guidance import guided
from rediffuse.sampling.samplers import SAMPLERS, SPACINGS, Observe
from rediffuse.sampling.space import Pixels, Space


def ddpm_shards(
    denoiser: Denoiser,
    settings: SampleDDPM,
    precision: Precision,
    *,
    space: Space | None = None,
    guide: Denoiser | None = None,
    label: int | None = None,
    observe: Observe | None = None,
) -> DrawShard:
    """Return a function that draws a shard of images from the denoiser, which is on `device()`.

    space: of x_0; None: pixels.  guide: of autoguidance; None: there is none, whatever the settings.  label:
    of all images, without effect on the noise; None: 0, 1, 2, ... in turn if there are classes.  observe:
    called at each step of the sampler.
    """
    denoise = guided(
        denoiser,
        settings.guidance_scale,
        settings.guidance_interval,
        guide=guide,
        autoguidance_scale=settings.autoguidance_scale,
    )
    decode = (space or Pixels(denoiser.shape)).decode
    schedule, sampler, eta = denoiser.schedule, SAMPLERS[settings.sampler], settings.eta
    times = SPACINGS[settings.spacing](schedule, settings.steps)

    def draw_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        def noise() -> Tensor:
            return torch.randn(len(indices), *denoiser.shape, generator=generator).to(device())

        labels = asked_labels(indices.to(device()), denoiser.classes, label)
        with autocast(device(), precision):
            x_0 = sampler(
                denoise, schedule, noise(), labels, times=times, eta=eta, noise=noise, observe=observe
            )
            return decode(x_0)

    return draw_shard
