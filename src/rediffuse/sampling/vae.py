"""Images from the VAE: latents from the prior, decoded.  Each image is the mean of p(x|z).

The stage `sample_vae` fits the mixture prior once and keeps it with the hash of the weights it belongs to.
Fitted again on another machine, it could differ in its last bits.
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
    """Return a function that draws a shard of images from the VAE, which is on `device()`.

    label: of all images, without effect on the latents; None: 0, 1, 2, ... in turn if there are classes.
    """

    def draw_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        z = prior(len(indices), generator).to(device())
        with autocast(device(), precision):
            return from_unit(vae.decode(z, asked_labels(indices.to(device()), vae.classes, label)))

    return draw_shard


def reconstruct_shards(vae: VAE, images: ImageSet, precision: Precision) -> DrawShard:
    """Return a function that reconstructs a shard without noise: the mean of p(x|z) at the mean of q(z|x)."""

    def reconstruct_shard(indices: Tensor, generator: torch.Generator) -> Tensor:
        x, labels = on_device(images.take(indices.numpy() % len(images)))
        with autocast(device(), precision):
            return from_unit(vae.decode(vae.encode(to_unit(x), labels)[0], labels))

    return reconstruct_shard


def save_mixture(path: Path, fitted: dict[str, Tensor], model: Path) -> None:
    """Save the mixture with the SHA-256 of the weights, in the folder `model`, that it was fitted to."""
    tensors = {name: tensor.contiguous() for name, tensor in fitted.items()}
    replace_file(path, save(tensors, {"model": _digest(model)}))


def load_prior(vae: VAE, settings: SampleVAE, path: Path, model: Path) -> Prior:
    """Return the prior that the settings name.  path: the file of the mixture, read only for that prior.

    Raises UserError if the mixture is missing, damaged, or not of these settings and the weights in `model`.
    """
    if settings.prior == "normal":
        return standard_normal(vae.latent_dim)
    remedy = "the stage fits it: `dvc repro sample_vae`"
    try:
        with safe_open(path, framework="pt") as file:
            about, fitted = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}, the mixture prior, cannot be read ({error}): {remedy}") from None
    asked = int(
        fitted.get("asked", len(fitted["weights"]))
    )  # a mixture can have fewer components than asked for
    if about.get("model") != _digest(model) or asked != settings.components:
        wanted = f"of the VAE in {model} and {settings.components} components"
        raise UserError(f"{path}, the mixture prior, is not {wanted}: {remedy}")
    return mixture(fitted)


def _digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
