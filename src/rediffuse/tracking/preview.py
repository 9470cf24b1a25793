"""A few images from a model in training, drawn from the same noise each time.

Tracking only: they change no result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rediffuse.figures.grid import grid
from rediffuse.images.files import to_pil
from rediffuse.params import Params
from rediffuse.runtime.device import device
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.space import load_space
from rediffuse.sampling.vae import vae_shards
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import standard_normal

if TYPE_CHECKING:
    from PIL.Image import Image

    from rediffuse.diffusion.denoiser import Denoiser

IMAGES, COLUMNS = 20, 10
STEPS = 10  # of the DDPM's sampler at most: 20 images then take 0.1 s on 2 cores


@torch.no_grad()
def draw_preview(model: VAE | Denoiser, params: Params) -> tuple[str, Image]:
    """Return the picture's name in the row, vae/training or ddpm/training, and the picture.

    Uses no global random state.
    """
    if isinstance(model, VAE):
        kind, draw = "vae", vae_shards(model, standard_normal(model.latent_dim), params.precision)
    else:
        settings = params.sample.ddpm
        settings = settings.model_copy(update={"steps": min(settings.steps, STEPS)})
        space = load_space(Path("data", params.ddpm.space), model.shape, device())
        kind, draw = "ddpm", ddpm_shards(model, settings, params.precision, space=space)
    images = draw(torch.arange(IMAGES), torch.Generator().manual_seed(params.seed))
    picture = grid(images.cpu().numpy(), COLUMNS, scale=2)
    return f"{kind}/training", to_pil(picture.transpose(2, 0, 1))
