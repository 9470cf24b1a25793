"""The space in which a trained DDPM works: pixels, or the latents of the VAE in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rediffuse.images.pixels import from_signed, to_signed
from rediffuse.vae.latents import has_latents, load_latents


class Space(Protocol):
    """Maps images to codes, which the denoiser calls x_0, and back.  shape: (C, H, W) of the images."""

    shape: tuple[int, int, int]

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, x_0: Tensor) -> Tensor: ...


class Pixels:
    """The codes are the images in [-1, 1]."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def encode(self, images: Tensor) -> Tensor:
        return to_signed(images)

    def decode(self, x_0: Tensor) -> Tensor:
        return from_signed(x_0)


def load_space(folder: Path, shape: tuple[int, int, int], device: torch.device) -> Space:
    """Load the space of the DDPM in the folder.  shape: (C, H, W) of its x_0."""
    return load_latents(folder, device) if has_latents(folder) else Pixels(shape)
