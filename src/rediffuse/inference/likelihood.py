"""How probable an image is: the variational bound of the diffusion model, in bits per dimension.

-log p(x) <= KL(q(x_T|x) || N(0, I)) + sum of the diffusion losses at t = 2..T - E log p(x|x_1)
(Ho et al. 2020, eq. 5; here in the form of Kingma et al. 2021, arXiv:2107.00630, eq. 11-14).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule
from rediffuse.sampling.samplers import Denoise

LEVELS = 256
CHUNK = 2**20  # pixels times levels whose probabilities are in memory at once


def variational_bound(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    *,
    times: Sequence[int] | None = None,
) -> Tensor:
    """Return the bound of images x_0 (B, ...) whose pixels are the 256 levels -1, -1 + 2/255, ..., 1.

    Bits per dimension, float64 (B,): lower is better.

    times: at which of 2..T the diffusion loss is evaluated, with one draw of noise each.  None: at all, which
    costs T - 1 evaluations of D.  Otherwise their mean stands for all; this is unbiased if they are drawn
    uniformly.  generator: on the CPU.
    """
    every = range(2, schedule.T + 1)
    chosen = list(every if times is None else times)

    def noise() -> Tensor:
        return torch.randn(x_0.shape, generator=generator).to(x_0)

    alpha_bar_T, one_minus = schedule.alpha_bar[-1], schedule.one_minus_alpha_bar[-1]
    # KL(N(sqrt(alpha_bar) x_0, 1 - alpha_bar) || N(0, 1))
    #   = (alpha_bar x_0^2 - alpha_bar - log(1 - alpha_bar)) / 2
    prior = _sum(alpha_bar_T.to(x_0.device) * x_0.double().square() - alpha_bar_T - one_minus.log()) / 2
    total = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    for t in chosen:
        x_t = schedule.q_sample(x_0, t, noise())
        error = x_0 - denoise(x_t, torch.full((len(x_0),), t, device=x_0.device), labels)
        # KL(q(x_{t-1}|x_t, x_0) || q(x_{t-1}|x_t, D)) = (SNR(t-1) - SNR(t)) / 2 |x_0 - D|^2
        total += (schedule.snr[t - 1] - schedule.snr[t]).item() / 2 * _sum(error.double().square())
    diffusion = total * (len(every) / len(chosen)) if chosen else total
    reconstruction = _reconstruction(schedule, x_0, schedule.q_sample(x_0, 1, noise()))
    unit = x_0[0].numel() * math.log(2)
    return prior / unit + diffusion / unit + reconstruction / unit


def stratified_times(T: int, count: int, generator: torch.Generator) -> list[int]:
    """Return `count` of the times 2..T, one drawn uniformly from each of as many equal parts."""
    random = torch.rand(count, dtype=torch.float64, generator=generator)
    u = (torch.arange(count, dtype=torch.float64) + random) / count
    return (2 + (u * (T - 1)).long().clamp(max=T - 2)).tolist()


def _reconstruction(schedule: Schedule, x_0: Tensor, x_1: Tensor) -> Tensor:
    """Return -log p(x_0|x_1), p(.|x_1) over the grey levels of a pixel from x_1 alone (VDM, eq. 17)."""
    levels = torch.linspace(-1, 1, LEVELS, dtype=torch.float64, device=x_0.device)
    alpha, variance = schedule.alpha_bar[1].sqrt().item(), schedule.one_minus_alpha_bar[1].item()
    level_of = ((x_0.double().flatten() + 1) * ((LEVELS - 1) / 2)).round().long()
    parts = []
    chunks = (torch.split(values, CHUNK // LEVELS) for values in (x_1.double().flatten(), level_of))
    for noisy, index in zip(*chunks, strict=True):
        log_p = (-(noisy[:, None] - alpha * levels).square() / (2 * variance)).log_softmax(1)
        parts.append(-log_p.gather(1, index[:, None])[:, 0])
    return _sum(torch.cat(parts).view(x_0.shape))


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)
