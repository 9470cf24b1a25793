"""What a VAE makes of images, and where it puts them."""

from __future__ import annotations

from pathlib import Path

import torch

from rediffuse.figures.grid import annotate, grid, reconstructions, strip
from rediffuse.figures.latent import latent_map
from rediffuse.images.files import save_png
from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit, on_device, to_unit
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import posterior_means

ROWS, COLUMNS = 3, 10


def draw_vae(vae: VAE, test: ImageSet, folder: Path) -> None:
    """Write latent.png, of all images; of the first ones reconstructions.png, interpolation.png and, with labels, analogies.png.

    A conditional VAE keeps the label of the image that a walk begins at.  The analogies are the same latents with each label: what of an
    image is not its class (Kingma et al. 2014, figure 1).
    """
    images, labels = on_device(test)
    save_png(latent_map(posterior_means(vae, images, labels).numpy(), test.labels, test.classes), folder / "latent.png")
    columns = min(COLUMNS, len(images))
    rows = min(ROWS, len(images) // columns)
    first, given = images[: rows * columns], None if labels is None else labels[: rows * columns]
    z = vae.encode(to_unit(first), given)[0]
    decoded = from_unit(vae.decode(z, given))
    picture = reconstructions(first.cpu().numpy(), decoded.cpu().numpy(), columns)
    save_png(annotate(picture, rows=["image", "VAE"] * rows), folder / "reconstructions.png")
    a, b = z[:columns, None], (z[columns : 2 * columns] if rows > 1 else z.roll(1, 0))[:, None]  # (columns, 1, latent_dim)
    share = torch.linspace(0, 1, COLUMNS, device=z.device)[None, :, None]
    kept = None if given is None else given[:columns].repeat_interleave(COLUMNS)
    walk = from_unit(vae.decode(torch.lerp(a, b, share).flatten(0, 1), kept))
    save_png(grid(walk.cpu().numpy(), COLUMNS, scale=2), folder / "interpolation.png")
    if vae.classes:
        names, shown = [name.strip() for name in vae.class_names[:COLUMNS]], first[:columns]
        each = torch.arange(len(names), device=z.device).repeat_interleave(len(shown))
        pictures = torch.cat([shown, from_unit(vae.decode(z[:columns].repeat(len(names), 1), each))])
        picture = strip(pictures.view(-1, *shown.shape).cpu().numpy())
        save_png(annotate(picture, rows=["image", *names]), folder / "analogies.png")
