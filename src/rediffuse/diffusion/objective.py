"""The training objective: noise an image to a random time, predict the noise, score the squared error.

All random numbers come from the caller's CPU generator, in float32 and in an order that depends only on the
shapes, so that a CPU and a GPU train on the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.schedule import Schedule, Weighting

TimeDensity = Literal["uniform", "laplace"]
UNIFORM = 0.05  # of the training is spent on all t alike, so that none is left out
QUARTERS = 4  # losses are also reported by quarter of t: (0, T/4], ..., (3T/4, T]


def uniform_times(T: int) -> Tensor:
    """Return P(t <= 1), ..., P(t <= T) for t uniform on 1..T, float64 (T,)."""
    return torch.arange(1, T + 1, dtype=torch.float64) / T


@lru_cache(maxsize=1)  # each step of a training asks for the same
def laplace_times(schedule: Schedule, mean: float, scale: float) -> Tensor:
    """Return P(t <= 1), ..., P(t <= T), float64 (T,), for a log SNR at t that has a Laplace distribution.

    Hang et al. 2024, arXiv:2407.03297, who set the mean to 0.  Each t also has `UNIFORM` of its uniform
    probability.
    """
    log_snr = schedule.log_snr[1:]
    between = (log_snr[:-1] + log_snr[1:]) / 2  # t and t + 1
    z = (between - mean) / scale
    above = torch.where(z > 0, 0.5 * torch.exp(-z.abs()), 1 - 0.5 * torch.exp(-z.abs()))
    laplace = torch.cat([above, torch.ones(1, dtype=torch.float64)])
    return torch.lerp(laplace, uniform_times(schedule.T), UNIFORM)


def stratified_t(batch: int, times: Tensor, generator: torch.Generator) -> Tensor:
    """Draw t, int64 (batch,) in 1..T, one from each of `batch` equally probable strata, in random order.

    times: P(t <= 1), ..., P(t <= T).  Each t is distributed so, but their mean loss varies less than with
    independent t (VDM, app. I.1).
    """
    u = torch.rand(batch, dtype=torch.float64, generator=generator)
    return _t_at((torch.randperm(batch, generator=generator) + u) / batch, times)


def _t_at(u: Tensor, times: Tensor) -> Tensor:
    """Return the t whose interval of probability u in [0, 1] lies in, int64."""
    return torch.searchsorted(times, u, right=True).clamp(max=len(times) - 1) + 1  # rounding may make u 1


def draw_noise(
    shape: Sequence[int], times: Tensor, generator: torch.Generator, *, stratified: bool, label_drop: float
) -> dict[str, Tensor]:
    """Draw all that is random in the loss of a batch (B, C, H, W) = shape.

    times: as in `stratified_t`.  Returns t (B,), eps (B, C, H, W), and dropped (B,), the labels to hide.
    stratified: t over the whole batch.
    """
    B = shape[0]
    if stratified:
        t = stratified_t(B, times, generator)
    else:
        t = _t_at(torch.rand(B, dtype=torch.float64, generator=generator), times)
    eps = torch.randn(*shape, generator=generator)
    return {"t": t, "eps": eps, "dropped": torch.rand(B, generator=generator) < label_drop}


def noised_loss(
    denoiser: Denoiser,
    x_0: Tensor,
    labels: Tensor | None,
    noise: Mapping[str, Tensor],
    *,
    weighting: Weighting,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each image (Ho et al. 2020, algorithm 1), weighted, and its t, both (B,).

    noise: of `draw_noise`, or a slice of it; with `augmentation`, how the images were augmented.  A dropped
    label becomes `classes` (Ho & Salimans 2022).
    """
    t = noise["t"].to(x_0.device)
    if labels is not None:
        labels = labels.masked_fill(noise["dropped"].to(labels.device), denoiser.classes)
    told = noise["augmentation"].to(x_0) if "augmentation" in noise else None
    losses = squared_error(denoiser, x_0, labels, t, noise["eps"].to(x_0), told)
    weight = denoiser.schedule.loss_weight(denoiser.predict, weighting, gamma, t)
    return weight.to(losses.dtype) * losses, t


def squared_error(
    denoiser: Denoiser, x_0: Tensor, labels: Tensor | None, t: Tensor, eps: Tensor, told: Tensor | None = None
) -> Tensor:
    """Return the squared error of the network's output, averaged over C, H, W, (B,)."""
    schedule, predict = denoiser.schedule, denoiser.predict
    output: Tensor = denoiser(schedule.q_sample(x_0, t, eps), t, labels, told)
    return (output.to(x_0.dtype) - schedule.target(predict, x_0, eps, t)).square().flatten(1).mean(1)


def by_quarter(losses: Tensor, t: Tensor, T: int) -> Tensor:
    """Return sum and count of the losses (B,) in each quarter of t, (2, 4), without a sync of the device."""
    quarter = (t - 1) * QUARTERS // T
    inside = (quarter == torch.arange(QUARTERS, device=t.device)[:, None]).to(losses.dtype)  # (4, B)
    return torch.stack([(inside * losses.detach()).sum(1), inside.sum(1)])


def quarter_means(totals: Tensor) -> dict[str, float]:
    """Return {"q1": mean loss at the smallest t, ...} from sums of `by_quarter`, without empty quarters."""
    sums, counts = totals.tolist()
    return {f"q{i}": total / n for i, (total, n) in enumerate(zip(sums, counts, strict=True), start=1) if n}
