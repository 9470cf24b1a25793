"""Samplers: from x_T ~ N(0, I) to images, by a denoiser D(x_t, t, labels) -> x_0.

Pure functions of one signature, `Sampler`'s, so that every sampler works with every denoiser, whatever its network predicts.
All walk down `times`, from T to 0, and return the x_0 of the last step.  x_t keeps the dtype of x_T; coefficients are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x_t (B, ...), t int64 (B,), labels int64 (B,) or None -> x_0 like x_t
Noise = Callable[[], Tensor]  # the next N(0, I) like x_T, from the caller's generator
Spacing = Callable[[Schedule, int], list[int]]  # number of steps -> the times to step to
Observe = Callable[[int, Tensor, Tensor], None]  # sees t, x_t and D(x_t, t) at the beginning of each step

# Of Karras' spacing, for 20 steps on Fashion-MNIST: 0.03 is four grey levels, below which a step changes little.  SIGMA_MAX from 20 to 160
# and RHO from 3 to 7 score alike, so these lie in the middle of what works (docs/performance.md).
SIGMA_MIN, SIGMA_MAX, RHO = 0.03, 40.0, 4.0


class DenoiseAt(Protocol):
    """D(x_t, t) for one t of the whole batch.  corrector: a second look within a step, which no observer sees."""

    def __call__(self, x_t: Tensor, t: int, /, *, corrector: bool = False) -> Tensor: ...


Walk = Callable[[DenoiseAt, Schedule, Tensor, Sequence[int], Noise, float], Tensor]  # D, schedule, x_T, times, noise, eta


@dataclass(frozen=True)
class Sampler:
    """Draw images (B, ...) from x_T ~ N(0, I), a step from each of `times` to the next: T, ..., 0, strictly decreasing.

    walk: the mathematics, written with D(x_t, t).  eta: for `ddim` only, 0 (deterministic) to 1 (ancestral).  noise: called once a step
    where the step is random (not the last one), otherwise never.  observe: sees each step.
    """

    walk: Walk

    def __call__(
        self,
        denoise: Denoise,
        schedule: Schedule,
        x_T: Tensor,
        labels: Tensor | None,
        *,
        times: Sequence[int],
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
    """steps + 1 times from T down to 0, strictly decreasing, as even as integers can be: T (1 - i/steps), half rounded up."""
    T = _checked(schedule, steps)
    return [(2 * T * (steps - i) + steps) // (2 * steps) for i in range(steps + 1)]


def karras_times(schedule: Schedule, steps: int) -> list[int]:
    """steps + 1 times from T down to 0, strictly decreasing, where sigma^(1/rho) is even (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    sigma = sqrt((1 - alpha_bar) / alpha_bar) runs from SIGMA_MAX to SIGMA_MIN where the schedule reaches so far; T takes the
    place of the first time, and 0 comes after the last.  Each sigma gives the time of the nearest log(sigma), moved where another has
    it already.
    """
    T = _checked(schedule, steps)
    log_sigma = -schedule.log_snr[1:] / 2
    high, low = log_sigma.clamp(math.log(SIGMA_MIN), math.log(SIGMA_MAX))[[-1, 0]].exp() ** (1 / RHO)
    sigmas = (high + (low - high) * torch.linspace(0, 1, steps, dtype=torch.float64)) ** RHO
    nearest = (log_sigma - sigmas.log()[:, None]).abs().argmin(1) + 1
    times = [T]
    for i, t in enumerate(nearest[1:].tolist(), 1):
        times.append(max(min(t, times[-1] - 1), steps - i))  # one for each of the times that follow
    return [*times, 0]


@Sampler
def ddpm(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Sequence[int], noise: Noise, eta: float) -> Tensor:
    """Ancestral sampling from q(x_s | x_t, x_0 = D(x_t)) (Ho et al. 2020, algorithm 2), on any subset of the steps."""
    x_t = x_T
    for t, s in pairwise(times):
        x_t, variance = schedule.q_posterior(D(x_t, t), x_t, t, s)
        if s > 0:
            x_t = x_t + variance.sqrt() * noise()
    return x_t


@Sampler
def ddim(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Sequence[int], noise: Noise, eta: float) -> Tensor:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16); eta = 1 has the transitions of `ddpm`."""
    x_t = x_T
    alpha_bar, one_minus_alpha_bar = schedule.alpha_bar, schedule.one_minus_alpha_bar
    for t, s in pairwise(times):
        x_0 = D(x_t, t)
        eps = schedule.eps_from(x_0, x_t, t)
        # eq. 16, with (1 - alpha_bar_t / alpha_bar_s) / (1 - alpha_bar_t) written as the 1 - SNR_t / SNR_s that it is
        variance = eta**2 * one_minus_alpha_bar[s] * (1 - schedule.snr[t] / schedule.snr[s])
        x_t = alpha_bar[s].sqrt() * x_0 + (one_minus_alpha_bar[s] - variance).sqrt() * eps
        if variance > 0:
            x_t = x_t + variance.sqrt() * noise()
    return x_t


@Sampler
def dpm_solver_pp_2m(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Sequence[int], noise: Noise, eta: float) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order at one evaluation of D a step.

    Deterministic.
    """
    return _dpm_solver_pp_2m(D, schedule, x_T, times, None)


@Sampler
def sde_dpm_solver_pp_2m(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Sequence[int], noise: Noise, eta: float) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, sec. 5): the same for the reverse SDE, as random as `ddpm`.

    Fresh noise washes out the errors of earlier steps, so that few steps come as near to the data as all of the ancestral chain.
    """
    return _dpm_solver_pp_2m(D, schedule, x_T, times, noise)


@Sampler
def heun(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Sequence[int], noise: Noise, eta: float) -> Tensor:
    """Heun's method for dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    Deterministic, second order, max(1, 2 steps - 2) evaluations of D.  x is the paper's x_t / sqrt(alpha_bar_t), sigma its
    noise.  The last step, to sigma = 0, is Euler's as in the paper.  So is the first: where a schedule ends near alpha_bar = 0
    it divides sigma by 10 to 1000 at once, and Heun's correction, which grows with that quotient, would spoil what follows.
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


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm-solver++": dpm_solver_pp_2m,
    "sde-dpm-solver++": sde_dpm_solver_pp_2m,
    "heun": heun,
}
SPACINGS: dict[str, Spacing] = {"even": even_times, "karras": karras_times}


def _checked(schedule: Schedule, steps: int) -> int:
    """T, in which there can be so many steps."""
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps must be between 1 and T ({schedule.T}), got {steps}")
    return schedule.T


def _dpm_solver_pp_2m(D: DenoiseAt, schedule: Schedule, x_T: Tensor, times: Sequence[int], noise: Noise | None) -> Tensor:
    """Exact for a D that is a line in lambda = log(alpha / sigma), up to the second order; of the SDE where there is noise.

    The last step, to lambda = +inf, is of first order: it returns the last D.
    """
    x_t, random = x_T, 0 if noise is None else 1
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
        x_t = sigma[s] / sigma[t] * torch.exp(-random * h) * x_t - alpha[s] * torch.expm1(-(1 + random) * h) * D_s
        if noise is not None:
            x_t = x_t + sigma[s] * torch.expm1(-2 * h).neg().sqrt() * noise()
        x_0_before, h_before = x_0, h
    return D(x_t, times[-2])
