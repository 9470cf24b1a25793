"""The denoiser as a task for the trainer: model, training step and validation, made from the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.objective import QUARTERS, by_quarter, draw_noise, noised_loss, validation_loss
from rediffuse.images.pixels import to_signed
from rediffuse.params import DDPM
from rediffuse.runtime.processes import dealt, total


def denoiser_config(params: DDPM, shape: tuple[int, int, int], class_names: Sequence[str]) -> dict[str, Any]:
    """The arguments of the Denoiser for images (C, H, W) with these classes."""
    architecture = {"T", "schedule", "predict", "fold", "width", "multipliers", "blocks", "attention", "dropout"}
    names = list(class_names) if params.conditional else []
    return {"shape": list(shape), "class_names": names, "clip": params.space == "pixels"} | params.model_dump(include=architecture)


def as_x_0(images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) in [-1, 1]; latents, which are floating-point numbers, as they are."""
    return to_signed(images) if images.dtype == torch.uint8 else images


class DenoisingStep:
    """The weighted denoising loss of one batch; logs it as a whole and by quarter of t."""

    def __init__(self, params: DDPM) -> None:
        self.params = params

    def draw(self, model: Denoiser, shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        params = self.params
        noise = draw_noise(shape, model.schedule.T, generator, stratified=params.stratified, label_drop=params.label_drop)
        return noise | {"mirrored": torch.rand(shape[0], generator=generator) < 0.5} if params.flip else noise

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
            weighting=self.params.loss_weight,
            gamma=self.params.min_snr_gamma,
        )
        quarters = by_quarter(losses, t, model.schedule.T)  # (2, QUARTERS): sums and counts
        measures = {"loss": quarters.sum(1)} | {f"loss_q{i + 1}": quarters[:, i] for i in range(QUARTERS)}
        return losses.mean(), measures


def validate(model: Denoiser, images: Tensor, labels: Tensor | None, *, seed: int) -> dict[str, float]:
    """The error of eps on held-out images, on a fixed grid of t and noise.  images: as `as_x_0` takes them."""
    return validation_loss(model, as_x_0(images), labels if model.classes else None, seed=seed, dealt=dealt, total=total)
