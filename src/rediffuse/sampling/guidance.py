"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), in an interval of t (Kynkäänniemi et al.
2024, arXiv:2404.07724).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.sampling.samplers import Denoise


def guided(
    denoiser: Denoiser, guidance_scale: float = 1.0, guidance_interval: Sequence[float] = (0, 1)
) -> Denoise:
    """Return D(x_t, t, labels) -> x_0 for the samplers, in [-1, 1] if the denoiser clips.

    guidance_scale w: output = unconditional + w (conditional - unconditional), so that w = 1 is no guidance.
    guidance_interval: the smallest and largest t / T with guidance. Near T it makes images alike, near 0 it
    costs an evaluation and changes little. All images of a batch must have the same t.
    """
    low, high = (share * denoiser.schedule.T for share in guidance_interval)

    def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if guidance_scale == 1 or labels is None or not low <= int(t[0]) <= high:
            output = denoiser(x_t, t, labels)
        else:
            none = torch.full_like(labels, denoiser.classes)
            both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, none]))
            conditional, unconditional = both.chunk(2)
            output = torch.lerp(unconditional, conditional, guidance_scale)
        x_0 = denoiser.schedule.x_0_from(denoiser.predict, output, x_t, t)
        return x_0.clamp(-1, 1) if denoiser.clip else x_0

    return denoise
