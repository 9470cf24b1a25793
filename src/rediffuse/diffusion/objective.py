"""The training objective: noise an image to a random time, predict the noise, score the squared error.

All random numbers come from the caller's CPU generator, in float32 and in an order that depends only on the
shapes, so that a CPU and a GPU train on the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.schedule import Weighting

QUARTERS = 4  # losses are also reported by quarter of t: (0, T/4], ..., (3T/4, T]


def stratified_t(batch: int, T: int, generator: torch.Generator) -> Tensor:
    """Draw t, int64 (batch,) in 1..T, one from each of `batch` equal strata, in random order.

    Each t is uniform on 1..T, but their mean loss varies less than with independent t (VDM, app. I.1).
    """
    u = torch.rand(batch, dtype=torch.float64, generator=generator)
    u = (torch.randperm(batch, generator=generator) + u) / batch
    return (u * T).long().clamp(max=T - 1) + 1  # rounding may make u 1


def draw_noise(
    shape: Sequence[int], T: int, generator: torch.Generator, *, stratified: bool, label_drop: float
) -> dict[str, Tensor]:
    """Draw all that is random in the loss of a batch (B, C, H, W) = shape.

    Returns t (B,), eps (B, C, H, W), and dropped (B,), the labels to hide.  t is stratified over the whole
    batch.
    """
    B = shape[0]
    t = stratified_t(B, T, generator) if stratified else torch.randint(1, T + 1, (B,), generator=generator)
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

    noise: of `draw_noise`, or a slice of it.  A dropped label becomes `classes` (Ho & Salimans 2022).
    """
    t = noise["t"].to(x_0.device)
    if labels is not None:
        labels = labels.masked_fill(noise["dropped"].to(labels.device), denoiser.classes)
    losses = squared_error(denoiser, x_0, labels, t, noise["eps"].to(x_0))
    weight = denoiser.schedule.loss_weight(denoiser.predict, weighting, gamma, t)
    return weight.to(losses.dtype) * losses, t


def squared_error(denoiser: Denoiser, x_0: Tensor, labels: Tensor | None, t: Tensor, eps: Tensor) -> Tensor:
    """Return the squared error of the network's output, averaged over C, H, W, (B,)."""
    schedule, predict = denoiser.schedule, denoiser.predict
    output: Tensor = denoiser(schedule.q_sample(x_0, t, eps), t, labels)
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
