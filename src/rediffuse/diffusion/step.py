"""The denoiser as a task for the trainer: the training step and the validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rediffuse.diffusion import objective
from rediffuse.diffusion.augmentation import augment, draw_augmentation
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.objective import (
    QUARTERS,
    TimeDensity,
    by_quarter,
    draw_noise,
    laplace_times,
    noised_loss,
    uniform_times,
)
from rediffuse.diffusion.schedule import Weighting
from rediffuse.images.pixels import to_signed
from rediffuse.runtime.processes import my_share, total

DRAWS = 1000  # the fewest noised images in a validation


def as_x_0(images: Tensor) -> Tensor:
    """Return uint8 images (N, C, H, W) in [-1, 1], and latents (floating-point numbers) unchanged."""
    return to_signed(images) if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class DenoisingStep:
    """The weighted denoising loss of one batch.  Logs it, also by quarter of t.

    flip: mirror half of the images, which the network is not told.  augment: see `draw_augmentation`.
    t_density: of t; log_snr_mean and log_snr_scale are those of `laplace_times`.  For the other settings see
    `Schedule.loss_weight` and `draw_noise`.
    """

    loss_weight: Weighting
    min_snr_gamma: float
    t_density: TimeDensity
    log_snr_mean: float
    log_snr_scale: float
    stratified: bool
    label_drop: float
    flip: bool
    augment: float

    def draw(self, model: Denoiser, shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        if self.t_density == "laplace":
            times = laplace_times(model.schedule, self.log_snr_mean, self.log_snr_scale)
        else:
            times = uniform_times(model.schedule.T)
        noise = draw_noise(shape, times, generator, stratified=self.stratified, label_drop=self.label_drop)
        if self.flip:
            noise["mirrored"] = torch.rand(shape[0], generator=generator) < 0.5
        if self.augment:
            noise["augmentation"] = draw_augmentation(shape[0], self.augment, generator)
        return noise

    def __call__(
        self, model: Denoiser, images: Tensor, labels: Tensor | None, noise: Mapping[str, Tensor], seen: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "mirrored" in noise:
            mirrored = noise["mirrored"].to(images.device)[:, None, None, None]
            images = torch.where(mirrored, images.flip(3), images)
        labels = labels if model.classes else None
        x_0, weighting, gamma = as_x_0(images), self.loss_weight, self.min_snr_gamma
        if "augmentation" in noise:
            x_0 = augment(x_0, noise["augmentation"].to(x_0))
        losses, t = noised_loss(model, x_0, labels, noise, weighting=weighting, gamma=gamma)
        quarters = by_quarter(losses, t, model.schedule.T)  # (2, QUARTERS): sums and counts
        measures = {"loss": quarters.sum(1)} | {f"loss_q{i + 1}": quarters[:, i] for i in range(QUARTERS)}
        return losses.mean(), measures


@torch.no_grad()
def validate(
    model: Denoiser, images: Tensor, labels: Tensor | None, *, seed: int, chunk: int = 256
) -> dict[str, float]:
    """Return the mean squared error of eps (DDPM's L_simple): "eps_mse", and by quarter of t "eps_mse_q1"...

    Image i always gets the same noise at the same t/T, with t stratified over the images, and every output is
    rated as the eps it implies.  So losses compare between epochs, runs, weightings and predictions; not
    between schedules, where the same t/T is another SNR.  Quarters without any t are left out.

    Fewer than DRAWS images are rated several times each, so that few give a steady number too.

    images: as `as_x_0` takes them.  chunk: images evaluated at once; changes only memory and rounding.  The
    caller puts the network into eval mode.  The processes share the work, and all get the same result.
    """
    rows = torch.arange(len(images) * math.ceil(DRAWS / len(images)), device=images.device) % len(images)
    x_0, labels, schedule = as_x_0(images), labels if model.classes else None, model.schedule
    generator = torch.Generator().manual_seed(seed)
    t = objective.stratified_t(len(rows), uniform_times(schedule.T), generator).to(x_0.device)
    losses = x_0.new_zeros(len(rows))
    starts = range(0, len(rows), chunk)
    for i, start in enumerate(starts):
        here = rows[start : start + chunk]
        x, y = x_0[here], None if labels is None else labels[here]
        # One image at a time: what torch.randn draws for an image would otherwise depend on the chunk.
        eps = torch.stack([torch.randn(x.shape[1:], generator=generator) for _ in x]).to(x)
        if i in my_share(len(starts)):
            part = slice(start, start + chunk)
            losses[part] = objective.squared_error(model, x, y, t[part], eps)
    in_eps = schedule.error_scale("eps", t) / schedule.error_scale(model.predict, t)
    all_losses = total(losses) * in_eps
    quarters = objective.quarter_means(by_quarter(all_losses, t, schedule.T))
    return {"eps_mse": all_losses.mean().item()} | {f"eps_mse_{name}": mse for name, mse in quarters.items()}
