"""How probable an image is: the variational bound of the diffusion model, in bits per dimension.

-log p(x) <= KL(q(x_T|x) || N(0, I)) + sum of the diffusion losses at t = 2..T - E log p(x|x_1)  (Ho et al. 2020, eq. 5; in the form of
Kingma et al. 2021, arXiv:2107.00630, eq. 11-14, where the noise of x_1 is the finest that the model knows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule
from rediffuse.sampling.samplers import Denoise

LEVELS = 256
CHUNK = 2**20  # pixels times levels whose probabilities are held at once


@dataclass(frozen=True)
class Bound:
    """The terms of -log p(x) for each image, in bits per dimension, float64 (B,): lower is better."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.diffusion + self.reconstruction


def variational_bound(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    *,
    times: Sequence[int] | None = None,
) -> Bound:
    """The bound of images x_0 (B, ...) in [-1, 1] whose pixels are the 256 grey levels -1, -1 + 2/255, ..., 1.

    One draw of noise at each t.  times: at which of 2..T the diffusion loss is evaluated; None: at all, which costs T - 1 evaluations
    of D; otherwise their mean stands for all, without bias where they are drawn uniformly.  generator: on the CPU.
    """
    dimensions = x_0[0].numel()
    every = range(2, schedule.T + 1)
    chosen = list(every if times is None else times)

    def noise() -> Tensor:
        return torch.randn(x_0.shape, generator=generator).to(x_0)

    alpha_bar_T, one_minus = schedule.alpha_bar[-1], schedule.one_minus_alpha_bar[-1]
    # KL(N(sqrt(alpha_bar) x_0, 1 - alpha_bar) || N(0, 1)) = (alpha_bar x_0^2 - alpha_bar - log(1 - alpha_bar)) / 2, summed
    prior = _sum(alpha_bar_T.to(x_0.device) * x_0.double().square() - alpha_bar_T - one_minus.log()) / 2
    total = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    for t in chosen:
        x_t = schedule.q_sample(x_0, t, noise())
        error = x_0 - denoise(x_t, torch.full((len(x_0),), t, device=x_0.device), labels)
        # KL(q(x_{t-1}|x_t, x_0) || q(x_{t-1}|x_t, D)) = (SNR(t-1) - SNR(t)) / 2 |x_0 - D|^2
        total += (schedule.snr[t - 1] - schedule.snr[t]).item() / 2 * _sum(error.double().square())
    diffusion = total * (len(every) / len(chosen)) if chosen else total
    reconstruction = _reconstruction(schedule, x_0, schedule.q_sample(x_0, 1, noise()))
    bits = [term / (dimensions * math.log(2)) for term in (prior, diffusion, reconstruction)]
    return Bound(*bits)


def stratified_times(T: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` of the times 2..T, one drawn uniformly from each of as many equal parts."""
    if not 1 <= count <= T - 1:
        raise ValueError(f"the number of evaluations must be between 1 and T - 1 ({T - 1}), got {count}")
    u = (torch.arange(count, dtype=torch.float64) + torch.rand(count, dtype=torch.float64, generator=generator)) / count
    return (2 + (u * (T - 1)).long().clamp(max=T - 2)).tolist()


def _reconstruction(schedule: Schedule, x_0: Tensor, x_1: Tensor) -> Tensor:
    """-log p(x_0|x_1), p the posterior of a pixel over the grey levels that x_1 alone gives (VDM, eq. 17)."""
    levels = torch.linspace(-1, 1, LEVELS, dtype=torch.float64, device=x_0.device)
    alpha, variance = schedule.alpha_bar[1].sqrt().item(), schedule.one_minus_alpha_bar[1].item()
    found = []
    seen, true = x_1.double().flatten(), ((x_0.double().flatten() + 1) * ((LEVELS - 1) / 2)).round().long()
    for part, index in zip(torch.split(seen, CHUNK // LEVELS), torch.split(true, CHUNK // LEVELS), strict=True):
        log_p = (-(part[:, None] - alpha * levels).square() / (2 * variance)).log_softmax(1)
        found.append(-log_p.gather(1, index[:, None])[:, 0])
    return _sum(torch.cat(found).view(x_0.shape))


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)
