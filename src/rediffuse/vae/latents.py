"""The latents of a trained VAE as the space of a DDPM (Rombach et al. 2022, arXiv:2112.10752).

The code of an image is the mean of q(z|x), (c, h, w).  Each channel is scaled to mean 0 and standard
deviation 1 over the training images, so that a noise schedule has the same meaning as for pixels.
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

VAE_FOLDER = "vae"  # in the folder of latents, and of a DDPM that works in them
STATISTICS = "latents.json"
MIN_STD = 1e-4  # below it a channel is the same for all images


class Latents:
    """The latent space of a VAE.  mean, std: of each channel, over the training images."""

    def __init__(self, vae: VAE, mean: list[float], std: list[float]) -> None:
        self.vae = vae
        self.shape = vae.shape  # of the images
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def encode(self, images: Tensor) -> Tensor:
        """Return the codes, float32 (B, c, h, w), of uint8 images (B, C, H, W)."""
        z = self.vae.encode(to_unit(images))[0].view(-1, *self.vae.latent_shape)
        return (z - self.mean.to(z)) / self.std.to(z)

    def decode(self, x_0: Tensor) -> Tensor:
        """Return the mean of p(x|z), uint8 (B, C, H, W), for codes (B, c, h, w)."""
        z = x_0 * self.std.to(x_0) + self.mean.to(x_0)
        return from_unit(self.vae.decode(z.flatten(1)))


def measure_latents(vae: VAE, images: Tensor) -> Latents:
    """Return the latent space of a VAE, measured on training images, uint8 (N, C, H, W).

    Raises UserError if the latent is not spatial, or if a channel is the same for all images.
    """
    if vae.latent_shape[1:] == (1, 1):
        raise UserError(
            "ddpm.space is latents, which needs a VAE with a spatial latent: set vae.latent_channels, for"
            " example to 4 (params.yaml)"
        )
    z = posterior_means(vae, images).view(-1, *vae.latent_shape).double()
    mean, std = z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist()
    if unused := int((z.std(0).amax((1, 2)) < MIN_STD).sum()):
        raise UserError(
            f"the VAE uses only {len(std) - unused} of its {len(std)} latent channels: lower"
            " vae.latent_channels or vae.beta (params.yaml)"
        )
    return Latents(vae, mean, std)


def save_latents(latents: Latents, folder: Path) -> None:
    """Save the space, including its VAE, in the folder of a model or of latents."""
    save_model(latents.vae, folder / VAE_FOLDER)
    statistics = {"mean": latents.mean.flatten().tolist(), "std": latents.std.flatten().tolist()}
    write_json(folder / VAE_FOLDER / STATISTICS, statistics)


def encode_set(latents: Latents, images: ImageSet) -> ImageSet:
    """Return the codes of the images, float32 (N, c, h, w), with their labels."""
    with torch.no_grad():
        parts = torch.split(on_device(images)[0], CHUNK)
        encoded = torch.cat([latents.encode(part).cpu() for part in parts]).numpy()
    return ImageSet(encoded, images.labels, images.classes)


def has_latents(folder: Path) -> bool:
    """Return whether `save_latents` has saved a space in the folder."""
    return (folder / VAE_FOLDER).is_dir()


def load_latents(folder: Path, device: torch.device) -> Latents:
    """Load what `save_latents` has saved in the folder.  Raises UserError if it is missing or damaged."""
    path = folder / VAE_FOLDER / STATISTICS
    try:
        statistics = json.loads(path.read_text())
        mean, std = statistics["mean"], statistics["std"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): `dvc repro encode` makes it again") from None
    return Latents(load_model(VAE, folder / VAE_FOLDER, device), mean, std)
