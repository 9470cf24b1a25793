"""The latents of a trained VAE as the space in which a DDPM works (Rombach et al. 2022, arXiv:2112.10752, LDM).

An image is the mean of q(z|x), (c, h, w), each channel brought to mean 0 and deviation 1 over the training images, so that the
schedules mean what they mean for pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit, on_device, to_unit
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import write_json
from rediffuse.runtime.weights import load_model, save_model
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import CHUNK, posterior_means

VAE_FOLDER = "vae"  # beside latents, and beside the weights of a DDPM that works in them
STATISTICS = "latents.json"


class Latents:
    """The space of a VAE's latents.  mean, std: of each channel, over the training images."""

    def __init__(self, vae: VAE, mean: list[float], std: list[float]) -> None:
        self.vae = vae
        self.shape = vae.shape  # of the images
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, c, h, w)."""
        z = self.vae.encode(to_unit(images))[0].view(-1, *self.vae.latent_shape)
        return (z - self.mean.to(z)) / self.std.to(z)

    def decode(self, x_0: Tensor) -> Tensor:
        """(B, c, h, w) -> uint8 (B, C, H, W), the mean of p(x|z)."""
        z = x_0 * self.std.to(x_0) + self.mean.to(x_0)
        return from_unit(self.vae.decode(z.flatten(1)))


def measure_latents(vae: VAE, images: Tensor) -> Latents:
    """The space of a VAE, measured on training images, uint8 (N, C, H, W).

    Raises UserError if its latent is not spatial, or a channel is the same for all images.
    """
    if vae.latent_shape[1:] == (1, 1):
        raise UserError(
            "ddpm.space is latents, for which the VAE must have a spatial latent: set vae.latent_channels, for example to 4 (params.yaml)"
        )
    z = posterior_means(vae, images).view(-1, *vae.latent_shape).double()
    mean, std = z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist()
    if dead := [channel for channel in z.unbind(1) if channel.std(0).max() < 1e-4]:  # the same for all images
        raise UserError(
            f"the VAE uses only {len(std) - len(dead)} of its {len(std)} latent channels: lower vae.latent_channels or vae.beta"
            " (params.yaml)"
        )
    return Latents(vae, mean, std)


def save_latents(latents: Latents, folder: Path) -> None:
    """Keep the space in the folder of a model or of latents, VAE and all."""
    save_model(latents.vae, folder / VAE_FOLDER)
    write_json(folder / VAE_FOLDER / STATISTICS, {"mean": latents.mean.flatten().tolist(), "std": latents.std.flatten().tolist()})


def encode_set(latents: Latents, images: ImageSet) -> ImageSet:
    """The images in the space, float32 (N, c, h, w), with their labels."""
    with torch.no_grad():
        parts = torch.split(on_device(images)[0], CHUNK)
        encoded = torch.cat([latents.encode(part).cpu() for part in parts]).numpy()
    return ImageSet(encoded, images.labels, images.classes)


def has_latents(folder: Path) -> bool:
    """Whether `save_latents` has kept a space in the folder."""
    return (folder / VAE_FOLDER).is_dir()


def load_latents(folder: Path, device: torch.device) -> Latents:
    """What `save_latents` has kept in the folder.  Raises UserError if it is missing or damaged."""
    path = folder / VAE_FOLDER / STATISTICS
    try:
        statistics = json.loads(path.read_text())
        mean, std = statistics["mean"], statistics["std"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): `dvc repro encode` makes it again") from None
    return Latents(load_model(VAE, folder / VAE_FOLDER, device), mean, std)
