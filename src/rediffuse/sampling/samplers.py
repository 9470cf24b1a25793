"""Samplers: from x_T ~ N(0, I) to images, by a denoiser D(x_t, t, labels) -> x_0.

All have the signature of `Sampler`, so that every sampler works with every denoiser.  All go down `times`,
from T to 0, and return the x_0 of the last step.  x_t keeps the dtype of x_T; coefficients are float64.

    DDPM: Ho et al. 2020, arXiv:2006.11239           DDIM: Song et al. 2021, arXiv:2010.02502
    Heun: Karras et al. 2022, arXiv:2206.00364       DPM-Solver++: Lu et al. 2022, arXiv:2211.01095
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x_t (B, ...), t and labels int64 (B,) -> x_0
Noise = Callable[[], Tensor]  # the next N(0, I) like x_T, from the caller's generator
Times = Sequence[int]  # T, ..., 0, strictly decreasing
Spacing = Callable[[Schedule, int], list[int]]  # number of steps -> times
Observe = Callable[[int, Tensor, Tensor], None]  # sees t, x_t and D(x_t, t) at each step

# Karras' spacing, for 20 steps on Fashion-MNIST.  0.01 is a grey level: the last step starts from noise that
# hardly shows (docs/ablation.md).  With SIGMA_MAX from 20 to 160 and RHO from 3 to 7, images scored alike.
SIGMA_MIN, SIGMA_MAX, RHO = 0.01, 40.0, 4.0


class DenoiseAt(Protocol):
    """D(x_t, t) for one t of the whole batch.  corrector: a second evaluation in a step, not observed."""

    def __call__(self, x_t: Tensor, t: int, /, *, corrector: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """Draw images (B, ...) from x_T ~ N(0, I), with a step from each of `times` to the next.

    walk: the mathematics, written with D(x_t, t).  eta: for `ddim` only, 0 (deterministic) to 1 (ancestral).
    noise: called once in each random step except the last.  observe: called at each step.
    """

    walk: Callable[[DenoiseAt, Schedule, Tensor, Times, Noise, float], Tensor]

    def __call__(
        self,
        denoise: Denoise,
        schedule: Schedule,
        x_T: Tensor,
        labels: Tensor | None,
        *,
        times: Times,
        eta: float = 0.0,
        noise: Noise,
        observe: Observe | None = None,
    ) -> Tensor:
        def D(x_t: Tensor, t: int, /, *, corrector: bool = False) -> Tensor:
            x_0 = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device), labels)
            if observe is not None and not corrector:
                observe(t, x_t, x_0)
            return x_0

        return self.walk(D, schedule, x_T, times, noise, eta)


def even_times(schedule: Schedule, steps: int) -> list[int]:
    """Return steps + 1 times from T to 0, as even as integers can be: T (1 - i/steps), half rounded up."""
    T = _checked_T(schedule, steps)
    return [(2 * T * (steps - i) + steps) // (2 * steps) for i in range(steps + 1)]


def karras_times(schedule: Schedule, steps: int) -> list[int]:
    """Return steps + 1 times from T to 0 with even sigma^(1/RHO) (Karras et al. 2022, eq. 5).

    sigma = sqrt((1 - alpha_bar) / alpha_bar) runs from SIGMA_MAX to SIGMA_MIN, as far as the schedule
    reaches.  Each gives the time of the nearest log(sigma), moved if it is taken.  T replaces the first, and
    0 follows the last.
    """
    T = _checked_T(schedule, steps)
    log_sigma = -schedule.log_snr[1:] / 2
    high, low = log_sigma.clamp(math.log(SIGMA_MIN), math.log(SIGMA_MAX))[[-1, 0]].exp() ** (1 / RHO)
    sigmas = (high + (low - high) * torch.linspace(0, 1, steps, dtype=torch.float64)) ** RHO
    nearest = (log_sigma - sigmas.log()[:, None]).abs().argmin(1) + 1
    times = [T]
    for i, t in enumerate(nearest[1:].tolist(), 1):
        times.append(max(min(t, times[-1] - 1), steps - i))  # leaves one for each of the times that follow
    return [*times, 0]


@Sampler
def ddpm(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Times, noise: Noise, eta: float) -> Tensor:
    """Sample from q(x_s | x_t, x_0 = D(x_t)) (Ho et al. 2020, algorithm 2), on any subset of the steps."""
    x_t = x_T
    for t, s in pairwise(times):
        x_t, variance = schedule.q_posterior(D(x_t, t), x_t, t, s)
        if s > 0:
            x_t = x_t + variance.sqrt() * noise()
    return x_t


@Sampler
def ddim(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Times, noise: Noise, eta: float) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16).  eta = 1 has the transitions of `ddpm`."""
    x_t = x_T
    alpha_bar, one_minus_alpha_bar = schedule.alpha_bar, schedule.one_minus_alpha_bar
    for t, s in pairwise(times):
        x_0 = D(x_t, t)
        eps = schedule.eps_from(x_0, x_t, t)
        # eq. 16, in which (1 - alpha_bar_t / alpha_bar_s) / (1 - alpha_bar_t) = 1 - SNR_t / SNR_s
        variance = eta**2 * one_minus_alpha_bar[s] * (1 - schedule.snr[t] / schedule.snr[s])
        x_t = alpha_bar[s].sqrt() * x_0 + (one_minus_alpha_bar[s] - variance).sqrt() * eps
        if variance > 0:
            x_t = x_t + variance.sqrt() * noise()
    return x_t


@Sampler
def heun(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Times, noise: Noise, eta: float) -> Tensor:
    """Heun's method for dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, algorithm 1).

    Deterministic, second order, max(1, 2 steps - 2) evaluations of D.  x is the paper's x_t /
    sqrt(alpha_bar_t).  The last step, to sigma = 0, is Euler's as in the paper.  So is the first: where a
    schedule ends near alpha_bar = 0, it divides sigma by 10 to 1000, and Heun's correction grows with that
    quotient.
    """
    scale = schedule.alpha_bar.sqrt()
    sigma = (-schedule.log_snr / 2).exp()
    x = x_T / scale[-1]
    for t, s in pairwise(times):
        d = (x - D(scale[t] * x, t)) / sigma[t]
        x_s = x + (sigma[s] - sigma[t]) * d
        if t < schedule.T and s > 0:
            d_prime = (x_s - D(scale[s] * x_s, s, corrector=True)) / sigma[s]
            x_s = x + (sigma[s] - sigma[t]) * (d + d_prime) / 2
        x = x_s
    return x


def _dpm_solver_pp_2m(
    D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Times, noise: Noise, eta: float, *, sde: bool
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation of D per step.

    D is taken as linear in lambda = log(alpha / sigma).  The last step, to lambda = +inf, returns the last D.
    sde: solve the reverse SDE (section 5), as random as `ddpm`.  Fresh noise washes out the errors of earlier
    steps, so that few steps come as near to the data as the whole ancestral chain.
    """
    x_t, random = x_T, 1 if sde else 0
    alpha, sigma = schedule.alpha_bar.sqrt(), schedule.one_minus_alpha_bar.sqrt()
    lambda_ = schedule.log_snr / 2
    x_0_before, h_before = None, torch.tensor(0.0)
    for t, s in pairwise(times[:-1]):
        x_0 = D(x_t, t)
        h = lambda_[s] - lambda_[t]
        D_s = x_0
        if x_0_before is not None:
            r = h_before / h
            D_s = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
        kept = sigma[s] / sigma[t] * torch.exp(-random * h) * x_t
        x_t = kept - alpha[s] * torch.expm1(-(1 + random) * h) * D_s
        if sde:
            x_t = x_t + sigma[s] * torch.expm1(-2 * h).neg().sqrt() * noise()
        x_0_before, h_before = x_0, h
    return D(x_t, times[-2])


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm-solver++": Sampler(partial(_dpm_solver_pp_2m, sde=False)),
    "sde-dpm-solver++": Sampler(partial(_dpm_solver_pp_2m, sde=True)),
    "heun": heun,
}
SPACINGS: dict[str, Spacing] = {"even": even_times, "karras": karras_times}


def _checked_T(schedule: Schedule, steps: int) -> int:
    """Return T.  Raises ValueError if it cannot be walked in this many steps."""
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps must be between 1 and T ({schedule.T}), got {steps}")
    return schedule.T
