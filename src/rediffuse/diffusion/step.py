"""The denoiser as a task for the trainer: the training step and the validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.objective import QUARTERS, by_quarter, draw_noise, noised_loss, validation_loss
from rediffuse.diffusion.schedule import Weighting
from rediffuse.images.pixels import to_signed
from rediffuse.runtime.processes import my_share, total


def as_x_0(images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) in [-1, 1]; latents, which are floating-point numbers, as they are."""
    return to_signed(images) if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class DenoisingStep:
    """The weighted denoising loss of one batch; logs it as a whole and by quarter of t.

    loss_weight, min_snr_gamma: see `Schedule.loss_weight`.  stratified, label_drop: see `draw_noise`.  flip: mirror half of the images.
    """

    loss_weight: Weighting
    min_snr_gamma: float
    stratified: bool
    label_drop: float
    flip: bool

    def draw(self, model: Denoiser, shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        noise = draw_noise(shape, model.schedule.T, generator, stratified=self.stratified, label_drop=self.label_drop)
        return noise | {"mirrored": torch.rand(shape[0], generator=generator) < 0.5} if self.flip else noise

    def __call__(
        self, model: Denoiser, images: Tensor, labels: Tensor | None, noise: Mapping[str, Tensor], seen: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "mirrored" in noise:
            images = torch.where(noise["mirrored"].to(images.device)[:, None, None, None], images.flip(3), images)
        losses, t = noised_loss(
            model,
            as_x_0(images),
            labels if model.classes else None,
            noise,
            weighting=self.loss_weight,
            gamma=self.min_snr_gamma,
        )
        quarters = by_quarter(losses, t, model.schedule.T)  # (2, QUARTERS): sums and counts
        measures = {"loss": quarters.sum(1)} | {f"loss_q{i + 1}": quarters[:, i] for i in range(QUARTERS)}
        return losses.mean(), measures


def validate(model: Denoiser, images: Tensor, labels: Tensor | None, *, seed: int) -> dict[str, float]:
    """The error of eps on held-out images, on a fixed grid of t and noise.  images: as `as_x_0` takes them."""
    return validation_loss(model, as_x_0(images), labels if model.classes else None, seed=seed, my_share=my_share, total=total)
