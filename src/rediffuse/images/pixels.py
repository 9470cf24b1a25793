"""Pixels: uint8 on disk, [0, 1] for the VAE, [-1, 1] for diffusion.  All are rounded to the nearest level."""

from __future__ import annotations

import torch
from torch import Tensor

from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.device import device, to_device

# How all images that are scored are rounded.
ROUNDING = "pixels clamped to the range and rounded to the nearest of 256 levels, in uint8"


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.float() / 255


def to_signed(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def from_unit(pixels: Tensor) -> Tensor:
    """[0, 1] -> uint8, rounded to nearest; values outside are clamped."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def from_signed(pixels: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded to nearest; values outside are clamped."""
    return from_unit((pixels + 1) / 2)


def on_device(images: ImageSet) -> tuple[Tensor, Tensor | None]:
    """Return images, uint8 (N, C, H, W), and labels, int64 (N,) or None, as `to_device` does."""
    labels = None if images.labels is None else to_device(images.labels, device())
    return to_device(images.images, device()), labels
