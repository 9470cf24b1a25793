"""The variance schedule: how much of the image is left after t steps of noise.

Everything follows from one table, log SNR(t) = log(alpha_bar_t / (1 - alpha_bar_t)), t = 0..T.  alpha_bar is
its sigmoid and 1 - alpha_bar the sigmoid of its negative, so neither is a difference of nearly equal numbers.

    DDPM: Ho et al. 2020, arXiv:2006.11239          cosine: Nichol & Dhariwal 2021, arXiv:2102.09672
    v:    Salimans & Ho 2022, arXiv:2202.00512      sigmoid: Jabri et al. 2022, arXiv:2212.11972
    VDM:  Kingma et al. 2021, arXiv:2107.00630      min-SNR: Hang et al. 2023, arXiv:2303.09556
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Name = Literal["linear", "cosine", "sigmoid"]
Predict = Literal["eps", "x0", "v"]
Weighting = Literal["simple", "min-snr"]

MAX_BETA = 0.999  # Nichol & Dhariwal 2021: without it, a schedule that ends at alpha_bar = 0 divides by zero


def linear(u: Tensor) -> Tensor:
    """Return log alpha_bar at u = t/T of Ho's linear betas, 1e-4 to 0.02 at T = 1000, for many steps.

    With beta(u) = 0.1 + 19.9 u, the VP-SDE of Song et al. 2021 (arXiv:2011.13456, app. C), every T, not only
    1000, ends at nearly pure noise, alpha_bar_T = 4e-5.
    """
    return -(0.1 * u + 0.5 * 19.9 * u**2)


def cosine(u: Tensor) -> Tensor:
    """Return log alpha_bar at u = t/T of Nichol & Dhariwal 2021, eq. 17, s = 0.008."""
    s = 0.008
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return torch.log(f / f[0])


def sigmoid(u: Tensor) -> Tensor:
    """Return log alpha_bar at u = t/T of Jabri et al. 2022, start = -3, end = 3, tau = 1."""
    gamma = torch.sigmoid(-3 + 6 * u)
    return torch.log((gamma[-1] - gamma) / (gamma[-1] - gamma[0]))


LOG_ALPHA_BAR = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance schedule over T steps.

    log_snr: float64 (T + 1,), strictly decreasing; log_snr[0] = +inf, the clean image.  See `Schedule.make`.

    In the methods t and s are int or int64 (B,); x's are (B, ...).  Coefficients are computed in float64 and
    applied in the dtype and on the device of x.
    """

    log_snr: Tensor
    _log_snr_on: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def make(cls, name: Name, T: int) -> Schedule:
        """Make the schedule of this name over T >= 1 steps.  No step has a beta above 0.999."""
        if name not in LOG_ALPHA_BAR:
            raise ValueError(f"schedule must be one of {', '.join(LOG_ALPHA_BAR)}, got {name!r}")
        if T < 1:
            raise ValueError(f"T must be at least 1, got {T}")
        log_alpha_bar = LOG_ALPHA_BAR[name](torch.arange(T + 1, dtype=torch.float64) / T)
        log_alpha = log_alpha_bar.diff().clamp(min=math.log(1 - MAX_BETA))  # alpha_t = 1 - beta_t
        log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha.cumsum(0)])
        return cls(log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar)))

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.log_snr) - 1

    @cached_property
    def snr(self) -> Tensor:
        """alpha_bar / (1 - alpha_bar), float64 (T + 1,); inf at 0."""
        return self.log_snr.exp()

    @cached_property
    def alpha_bar(self) -> Tensor:
        """The variance of the image that is left, float64 (T + 1,); 1 at 0."""
        return torch.sigmoid(self.log_snr)

    @cached_property
    def one_minus_alpha_bar(self) -> Tensor:
        """The variance of the noise, float64 (T + 1,), exact also where alpha_bar rounds to 1; 0 at 0."""
        return torch.sigmoid(-self.log_snr)

    @cached_property
    def beta(self) -> Tensor:
        """The variance added by each step, 1 - alpha_bar_t / alpha_bar_{t-1}, float64 (T + 1,); 0 at 0."""
        log_alpha_bar = logsigmoid(self.log_snr)
        return -torch.expm1(log_alpha_bar.diff(prepend=log_alpha_bar[:1]))

    def q_sample(self, x_0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """Return x_t ~ q(x_t | x_0) for eps ~ N(0, I) (DDPM, eq. 4)."""
        alpha, sigma = self._alpha_sigma(t, x_0)
        return alpha * x_0 + sigma * eps

    def q_posterior(
        self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance of q(x_s | x_t, x_0) for s < t (DDPM, eq. 6-7; VDM, app. A, for any s).

        s: t - 1 by default.  The mean is like x_t, the variance broadcasts against it.  At s = 0: x_0 and 0.
        """
        l_t, l_s = self._log_snr_at(t, x_t), self._log_snr_at(t - 1 if s is None else s, x_t)
        ratio = -torch.expm1(l_t - l_s)  # 1 - SNR_t / SNR_s = beta_{t|s} / (1 - alpha_bar_t)
        alpha_ts = torch.exp(logsigmoid(l_t) - logsigmoid(l_s))  # alpha_bar_t / alpha_bar_s
        of_x_0 = torch.sigmoid(l_s).sqrt() * ratio
        of_x_t = alpha_ts.sqrt() * torch.sigmoid(-l_s) / torch.sigmoid(-l_t)
        variance = torch.sigmoid(-l_s) * ratio
        return of_x_0.to(x_t.dtype) * x_0 + of_x_t.to(x_t.dtype) * x_t, variance.to(x_t.dtype)

    def eps_from(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """Return the eps that leads from x_0 to x_t, t >= 1."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        return (x_t - alpha * x_0) / sigma

    def x_0_from(self, predict: Predict, output: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """Return the x_0 that a network's output, in any precision, implies, in x_t's dtype."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        output = output.to(x_t.dtype)
        match predict:
            case "eps":
                return (x_t - sigma * output) / alpha
            case "x0":
                return output
            case "v":
                return alpha * x_t - sigma * output
        raise _unknown("predict", predict, Predict)

    def target(self, predict: Predict, x_0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Return the target of a network; v = alpha eps - sigma x_0 (Salimans & Ho 2022, sec. 4)."""
        alpha, sigma = self._alpha_sigma(t, x_0)
        match predict:
            case "eps":
                return eps
            case "x0":
                return x_0
            case "v":
                return alpha * eps - sigma * x_0
        raise _unknown("predict", predict, Predict)

    def error_scale(self, predict: Predict, t: Tensor) -> Tensor:
        """Return the squared error of the output over that of the x_0 it implies, float64 like t, t >= 1."""
        snr = self._log_snr_at(t, t).exp()
        match predict:
            case "eps":
                return snr
            case "x0":
                return torch.ones_like(snr)
            case "v":
                return snr + 1
        raise _unknown("predict", predict, Predict)

    def loss_weight(self, predict: Predict, weighting: Weighting, gamma: float, t: Tensor) -> Tensor:
        """Return the weight of the squared error of the network's output, float64 like t (B,), t >= 1.

        simple: 1 for every prediction (for eps: DDPM, eq. 14).  min-snr: min(SNR, gamma) on x_0, hence
        min(SNR, gamma) / SNR on eps and / (SNR + 1) on v: one and the same loss (Hang et al. 2023, sec. 3).
        """
        snr = self._log_snr_at(t, t).exp()
        match weighting:
            case "simple":
                return torch.ones_like(snr)
            case "min-snr":
                return snr.clamp(max=gamma) / self.error_scale(predict, t)
        raise _unknown("weighting", weighting, Weighting)

    def _alpha_sigma(self, t: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) as factors of x."""
        log_snr = self._log_snr_at(t, x)
        return torch.sigmoid(log_snr).sqrt().to(x.dtype), torch.sigmoid(-log_snr).sqrt().to(x.dtype)

    def _log_snr_at(self, t: int | Tensor, x: Tensor) -> Tensor:
        """Return log SNR(t), float64 on x's device, (B, 1, ..., 1) to broadcast against x; () for an int."""
        if x.device not in self._log_snr_on:
            self._log_snr_on[x.device] = self.log_snr.to(x.device)
        log_snr = self._log_snr_on[x.device]
        if isinstance(t, int):
            return log_snr[t]
        return log_snr[t.to(x.device)].reshape(-1, *[1] * (x.ndim - 1))


def _unknown(what: str, got: str, allowed: object) -> ValueError:
    return ValueError(f"{what} must be one of {', '.join(get_args(allowed))}, got {got!r}")
