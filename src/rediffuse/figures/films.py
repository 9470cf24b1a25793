"""Films: pictures of which the page shows one frame at a time, under a slider.

A film is uint8 (frames, C, H, W); all its frames are one PNG, in rows of `columns`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.schedule import Schedule
from rediffuse.figures.latent import principal_components
from rediffuse.images.image_set import ImageSet
from rediffuse.images.pixels import from_unit, on_device, to_unit
from rediffuse.params import SampleDDPM
from rediffuse.runtime.device import Precision, seed_for
from rediffuse.runtime.shards import SHARD, shard_generator
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.samplers import SAMPLERS, Observe
from rediffuse.sampling.space import Space
from rediffuse.vae.model import VAE
from rediffuse.vae.prior import posterior_means

SHOWN = 10  # images in a frame
STEPS = 5, 10, 20, 50  # of each sampler
SCALES = 0.0, 0.5, 1.0, 1.5, 2.0, 3.0  # of guidance
SIDE = 21  # frames a side of the map
DOTS = 1500  # of the map, at most
WALK = 11  # frames between two images
MARGIN = 0.02  # of the points lie outside of the map, on each side


class Film(NamedTuple):
    """Frames uint8 (n, C, H, W), in rows of `columns`, and what each of them shows."""

    frames: NDArray[np.uint8]
    labels: list[str]
    columns: int = 1


def beside(images: Tensor) -> NDArray[np.uint8]:
    """Return images (n, k, C, H, W) as frames (n, C, H, k W), the k of a frame side by side."""
    n, k, c, h, w = images.shape
    return images.permute(0, 2, 3, 1, 4).reshape(n, c, h, k * w).cpu().numpy()


class Painter:
    """Draws the same images, from the same noise, with any settings."""

    def __init__(
        self,
        denoiser: Denoiser,
        guide: Denoiser | None,
        space: Space,
        sampling: Mapping[str, Any],
        precision: Precision,
    ) -> None:
        self.denoiser, self.guide, self.space, self.precision = denoiser, guide, space, precision
        self.settings = SampleDDPM(**{name: sampling[name] for name in SampleDDPM.model_fields})
        self.seed = sampling["seeds"][0]

    def draw(self, n: int = SHOWN, observe: Observe | None = None, **changes: Any) -> Tensor:
        """Return n images, uint8 (n, C, H, W), with other settings; their noise depends only on n."""
        settings = self.settings.model_copy(update=changes)
        shard = ddpm_shards(
            self.denoiser, settings, self.precision, space=self.space, guide=self.guide, observe=observe
        )
        return shard(torch.arange(n), shard_generator(self.seed, 0))

    @cached_property
    def steps(self) -> list[tuple[int, Tensor, Tensor]]:
        """t, x_t and D(x_t, t), uint8 (SHOWN, C, H, W), at each step, and the result, at t = 0, as both.

        They become the first images of the sample set.
        """
        found: list[tuple[int, Tensor, Tensor]] = []

        def observe(t: int, x_t: Tensor, x_0: Tensor) -> None:
            found.append((t, self.space.decode(x_t)[:SHOWN], self.space.decode(x_0)[:SHOWN]))

        last = self.draw(SHARD, observe)[:SHOWN]
        return [*found, (0, last, last)]

    def denoising(self) -> tuple[Film, Film, list[int]]:
        """Return films of x_t and D(x_t, t) at each of the steps, and their times."""
        times, noisy, guessed = zip(*self.steps, strict=True)
        labels = [f"t = {t} of {self.denoiser.schedule.T}" for t in times]
        x_t, x_0 = (Film(beside(torch.stack(frames)), labels) for frames in (noisy, guessed))
        return x_t, x_0, list(times)

    def samplers(self) -> Film:
        """Return the images by each sampler in each number of steps."""
        steps = sorted({min(n, self.denoiser.schedule.T) for n in STEPS})
        ways = list(product(SAMPLERS, steps))
        drawn = [self.draw(sampler=name, steps=n, eta=0.0) for name, n in ways]
        labels = [f"{name}, {n} steps" for name, n in ways]
        return Film(beside(torch.stack(drawn)), labels)

    def guidance(self) -> Film | None:
        """Return the images at each scale of guidance; None for a model without labels."""
        if not self.denoiser.classes:
            return None
        drawn = [self.draw(guidance_scale=scale) for scale in SCALES]
        return Film(beside(torch.stack(drawn)), [f"guidance {scale:g}" for scale in SCALES])


def noised(schedule: Schedule, space: Space, images: Tensor, times: Sequence[int], seed: int) -> Tensor:
    """Return images (k, C, H, W) at these times, with the same noise at each, (times, k, C, H, W).

    Latents are decoded.
    """
    x_0 = space.encode(images)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed_for(seed))).to(x_0.device)
    return torch.stack([space.decode(schedule.q_sample(x_0, t, eps)) for t in times])


def noising(schedule: Schedule, space: Space, images: Tensor, times: Sequence[int], seed: int) -> Film:
    """Return the film of the first images at these times."""
    frames = noised(schedule, space, images[:SHOWN], times, seed)
    return Film(beside(frames), [f"t = {t} of {schedule.T}" for t in times])


class Map(NamedTuple):
    """The plane of a latent space.

    film: what is decoded at SIDE x SIDE points, the first row at the top.  points: (n, 2) of test images, in
    shares of the width and height, from the left and the top; labels: (n,), or None.
    """

    film: Film
    points: NDArray[np.float64]
    labels: NDArray[np.int64] | None


def latent_plane(vae: VAE, test: ImageSet) -> Map | None:
    """Return the map of the plane of the first two principal components; None for a single dimension.

    Images are decoded at the mean of the other components, with the first label if the VAE has labels.
    """
    if vae.latent_dim < 2:
        return None
    images, labels = on_device(test)
    means = posterior_means(vae, images, labels).double().cpu().numpy()
    points, _ = principal_components(means)
    centre = means.mean(0)
    low, high = np.quantile(points, [MARGIN, 1 - MARGIN], axis=0)
    # The axes, by least squares: principal_components gives coordinates only.
    axes = np.linalg.lstsq(points, means - centre, rcond=None)[0]  # (2, latent_dim)
    x, y = (np.linspace(low[i], high[i], SIDE) for i in range(2))
    plane = np.stack([np.tile(x, SIDE), np.repeat(y[::-1], SIDE)], 1)
    z = torch.tensor(centre + plane @ axes, dtype=torch.float32, device=images.device)
    label = torch.zeros(len(z), dtype=torch.int64, device=z.device) if vae.classes else None
    film = Film(from_unit(vae.decode(z, label)).cpu().numpy(), [], SIDE)
    shares = (points[:DOTS] - low) / np.where(high > low, high - low, 1)
    shares[:, 1] = 1 - shares[:, 1]
    return Map(film, shares, None if test.labels is None else test.labels[:DOTS])


def walk(vae: VAE, test: ImageSet) -> Film | None:
    """Return the way between pairs of test images through the latents, a pair below another in a frame's row.

    None for fewer than two images.
    """
    pairs = min(SHOWN, len(test) // 2)
    if not pairs:
        return None
    images, labels = on_device(test.take(np.arange(2 * pairs)))
    z = vae.encode(to_unit(images), labels)[0]
    label = None if labels is None else labels[:pairs]
    shares = np.linspace(0, 1, WALK)
    frames = [from_unit(vae.decode(torch.lerp(z[:pairs], z[pairs:], float(s)), label)) for s in shares]
    return Film(beside(torch.stack(frames)), [f"{s:.0%} of the way" for s in shares])
