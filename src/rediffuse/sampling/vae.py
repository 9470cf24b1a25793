"""Images from the VAE: latents from the prior, decoded; each image is the mean of p(x|z).

The mixture prior is fitted once, by the stage `sample_vae`, and kept with the weights that it was fitted to: another fit on another
machine could differ in its bits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit, on_device, to_unit
from rediffuse.params import SampleVAE
from rediffuse.runtime.device import Precision, autocast, device
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file
from rediffuse.runtime.shards import DrawShard, asked_labels
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import Prior, mixture, standard_normal

PRIOR = "prior.safetensors"  # the fitted mixture of a VAE, beside the images drawn from it


def vae_shards(vae: VAE, prior: Prior, precision: Precision, *, label: int | None = None) -> DrawShard:
    """What draws a shard from the VAE, which is on `device()`.

    label: of all images; None: 0, 1, 2, ... in turn.  It changes no latent.  A model without labels takes None only.
    """

    def draw_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        z = prior(len(indices), generator).to(device())
        with autocast(device(), precision):
            return from_unit(vae.decode(z, asked_labels(indices.to(device()), vae.classes, label)))

    return draw_shard


def reconstruct_shards(vae: VAE, images: ImageSet, precision: Precision) -> DrawShard:
    """What decodes a shard of images, of which it draws nothing: the mean of p(x|z) at the mean of q(z|x)."""

    def reconstruct_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        x, labels = on_device(images.take(indices.numpy() % len(images)))
        with autocast(device(), precision):
            return from_unit(vae.decode(vae.encode(to_unit(x), labels)[0], labels))

    return reconstruct_shard


def save_mixture(path: Path, fitted: dict[str, Tensor], model: Path) -> None:
    """Keep the mixture, and the SHA-256 of the weights in the folder `model` that it was fitted to."""
    replace_file(path, save({name: tensor.contiguous() for name, tensor in fitted.items()}, {"model": _digest(model)}))


def load_prior(vae: VAE, settings: SampleVAE, path: Path, model: Path) -> Prior:
    """The prior that the settings name; `path` holds the mixture, if it is that.

    Raises UserError if the mixture is missing, damaged, of other settings or fitted to other weights than those in `model`.
    """
    if settings.prior == "normal":
        return standard_normal(vae.latent_dim)
    remedy = "the stage fits it: `dvc repro sample_vae`"
    try:
        with safe_open(path, framework="pt") as file:
            about, fitted = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}, the mixture prior of the VAE, is missing: {remedy}") from None
    except SafetensorError as error:
        raise UserError(f"{path}, the mixture prior of the VAE, is damaged ({error}): {remedy}") from None
    asked = int(fitted.get("asked", len(fitted["weights"])))  # there are fewer where there were fewer training images
    if about.get("model") != _digest(model) or asked != settings.components:
        raise UserError(f"{path}, the mixture prior, is not of the VAE in {model} and {settings.components} components: {remedy}")
    return mixture(fitted)


def _digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
