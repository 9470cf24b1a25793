"""The training objective: noise an image to a random time, let the network undo it, score the squared error.

Every random number comes from a CPU generator of the caller's, in float32 and in an order that depends only on the shapes, so
that a CPU and a GPU train on the same noise.  Knows the denoiser only through `Network`; nothing of optimizers or loops.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Predict, Schedule, Weighting

QUARTERS = 4  # losses are also reported by quarter of t: (0, T/4], ..., (3T/4, T]


class Network(Protocol):
    """What the objective needs of a denoiser.  Labels run from 0 to classes - 1; the label `classes` means none."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def predict(self) -> Predict: ...

    @property
    def classes(self) -> int: ...

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The raw output, an estimate of `schedule.target(predict, ...)`.  x_t: (B, C, H, W), t: int64 (B,), labels: int64 (B,)."""
        ...


def stratified_t(batch: int, T: int, generator: torch.Generator) -> Tensor:
    """int64 (batch,) in 1..T, one from each of `batch` equal strata, in random order.

    Each single t is uniform on 1..T, but their mean loss varies less than that of independent ones (Kingma et al. 2021, app. I.1).
    """
    u = torch.rand(batch, dtype=torch.float64, generator=generator)
    u = (torch.randperm(batch, generator=generator) + u) / batch
    return (u * T).long().clamp(max=T - 1) + 1  # u itself may round up to 1


def draw_noise(
    shape: Sequence[int], T: int, generator: torch.Generator, *, stratified: bool = True, label_drop: float = 0.0
) -> dict[str, Tensor]:
    """All that is random in the loss of a batch (B, C, H, W) = shape: t (B,), eps (B, C, H, W), and dropped (B,), the labels to hide.

    Apart from the loss, because t is stratified over the whole batch and processes that share one must agree on it.
    """
    t = stratified_t(shape[0], T, generator) if stratified else torch.randint(1, T + 1, (shape[0],), generator=generator)
    eps = torch.randn(*shape, generator=generator)
    return {"t": t, "eps": eps, "dropped": torch.rand(shape[0], generator=generator) < label_drop}


def noised_loss(
    denoiser: Network, x_0: Tensor, labels: Tensor | None, noise: Mapping[str, Tensor], *, weighting: Weighting, gamma: float
) -> tuple[Tensor, Tensor]:
    """The loss of each image under the noise of `draw_noise` or a slice of it, and the time it was noised to (Ho et al. 2020, algorithm 1).

    Returns losses (B,), weighted, averaged over C, H, W; and t int64 (B,); both on x_0's device.

    A dropped label becomes `classes`, independently of the others (Ho & Salimans 2022, arXiv:2207.12598).
    """
    schedule, predict, t = denoiser.schedule, denoiser.predict, noise["t"].to(x_0.device)
    if labels is not None:
        labels = labels.masked_fill(noise["dropped"].to(labels.device), denoiser.classes)
    losses = _squared_error(denoiser, x_0, labels, t, noise["eps"].to(x_0))
    return schedule.loss_weight(predict, weighting, gamma, t).to(losses.dtype) * losses, t


@torch.no_grad()
def validation_loss(
    denoiser: Network,
    x_0: Tensor,
    labels: Tensor | None,
    *,
    seed: int,
    chunk: int = 256,
    my_share: Callable[[int], Container[int]] = range,
    total: Callable[[Tensor], Tensor] = lambda losses: losses,
) -> dict[str, float]:
    """Mean squared error of eps, DDPM's L_simple, on a fixed (t, noise) grid: {"eps_mse": all, "eps_mse_q1": ..., "eps_mse_q4": ...}.

    Image i always meets the same noise at the same t/T, t stratified over the images, so that losses compare between epochs,
    runs, weightings and kinds of prediction (not between schedules: the same t/T is another SNR there).  Whatever the network
    puts out is rated as the eps it implies.  Nothing but memory and rounding depends on `chunk`, the number of images
    evaluated at once.  The caller puts the network into eval mode.

    Processes may share the work: `my_share` says which of so many chunks are this one's, `total` adds up what all have found.
    x_0: (N, C, H, W) in [-1, 1]; labels: int64 (N,), none dropped, or None.  Quarters that no t falls into are left out.
    """
    schedule, predict = denoiser.schedule, denoiser.predict
    generator = torch.Generator().manual_seed(seed)
    t = stratified_t(len(x_0), schedule.T, generator).to(x_0.device)
    losses = x_0.new_zeros(len(x_0))
    starts = range(0, len(x_0), chunk)
    for i, start in enumerate(starts):
        rows = slice(start, start + chunk)
        x, y = x_0[rows], None if labels is None else labels[rows]
        # Image by image: what torch.randn draws for an image would otherwise depend on the size of the chunk.
        eps = torch.stack([torch.randn(x.shape[1:], generator=generator) for _ in x]).to(x)
        if i in my_share(len(starts)):
            losses[rows] = _squared_error(denoiser, x, y, t[rows], eps)
    in_eps = schedule.error_scale("eps", t) / schedule.error_scale(predict, t)
    all_losses = total(losses) * in_eps
    quarters = quarter_means(by_quarter(all_losses, t, schedule.T))
    return {"eps_mse": all_losses.mean().item()} | {f"eps_mse_{name}": value for name, value in quarters.items()}


def by_quarter(losses: Tensor, t: Tensor, T: int) -> Tensor:
    """(2, 4) on the losses' device: sum and count of the losses (B,) in each quarter of t.  Add these up over steps, without a sync."""
    quarter = (t - 1) * QUARTERS // T
    inside = (quarter == torch.arange(QUARTERS, device=t.device)[:, None]).to(losses.dtype)  # (4, B)
    return torch.stack([(inside * losses.detach()).sum(1), inside.sum(1)])


def quarter_means(totals: Tensor) -> dict[str, float]:
    """{"q1": mean loss at the smallest t, ..., "q4": at the largest} from sums of `by_quarter`; quarters without a loss are left out."""
    sums, counts = totals.tolist()
    return {f"q{i}": total / n for i, (total, n) in enumerate(zip(sums, counts, strict=True), start=1) if n}


def _squared_error(denoiser: Network, x_0: Tensor, labels: Tensor | None, t: Tensor, eps: Tensor) -> Tensor:
    """(B,): the network's error on its own target, averaged over C, H, W."""
    schedule, predict = denoiser.schedule, denoiser.predict
    output = denoiser(schedule.q_sample(x_0, t, eps), t, labels)
    return (output.to(x_0.dtype) - schedule.target(predict, x_0, eps, t)).square().flatten(1).mean(1)
