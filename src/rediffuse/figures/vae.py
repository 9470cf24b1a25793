"""What a VAE makes of images, and where it puts them."""

from __future__ import annotations

from pathlib import Path

import torch

from rediffuse.figures.grid import grid, reconstructions, strip
from rediffuse.figures.latent import latent_map
from rediffuse.figures.text import annotate, legible
from rediffuse.images.files import save_png
from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit, on_device, to_unit
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import posterior_means

ROWS, COLUMNS = 3, 10


def draw_vae(vae: VAE, test: ImageSet, folder: Path) -> None:
    """Write latent.png (all images), reconstructions.png, interpolation.png and analogies.png (the first).

    A conditional VAE keeps the label of the first image of a walk.  It alone has analogies: the same latents
    with each label, which show what of an image is not its class (Kingma et al. 2014, figure 1).
    """
    images, labels = on_device(test)
    means = posterior_means(vae, images, labels).numpy()
    save_png(latent_map(means, test.labels, test.classes), folder / "latent.png")

    columns = min(COLUMNS, len(images))
    rows = min(ROWS, len(images) // columns)
    first, first_labels = images[: rows * columns], None if labels is None else labels[: rows * columns]
    z = vae.encode(to_unit(first), first_labels)[0]
    decoded = from_unit(vae.decode(z, first_labels))
    picture = reconstructions(first.cpu().numpy(), decoded.cpu().numpy(), columns)
    save_png(annotate(picture, rows=["image", "VAE"] * rows), folder / "reconstructions.png")

    a, b = z[:columns], z[columns : 2 * columns] if rows > 1 else z.roll(1, 0)
    share = torch.linspace(0, 1, COLUMNS, device=z.device)[None, :, None]
    codes = torch.lerp(a[:, None], b[:, None], share).flatten(0, 1)  # (columns * COLUMNS, latent_dim)
    code_labels = None if first_labels is None else first_labels[:columns].repeat_interleave(COLUMNS)
    walk = from_unit(vae.decode(codes, code_labels))
    save_png(grid(walk.cpu().numpy(), COLUMNS), folder / "interpolation.png")

    if vae.classes:
        names, shown = legible(vae.class_names)[:COLUMNS], first[:columns]
        classes = torch.arange(len(names), device=z.device).repeat_interleave(columns)
        analogies = from_unit(vae.decode(a.repeat(len(names), 1), classes))
        picture = strip(torch.cat([shown, analogies]).view(-1, *shown.shape).cpu().numpy())
        save_png(annotate(picture, rows=["image", *names]), folder / "analogies.png")
