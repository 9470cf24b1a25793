"""How a DDPM takes images apart and makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.schedule import Schedule
from rediffuse.figures.grid import strip
from rediffuse.figures.text import annotate, legible
from rediffuse.images.files import save_png
from rediffuse.params import SampleDDPM
from rediffuse.runtime.device import Precision, seed_for
from rediffuse.runtime.shards import SHARD, shard_generator
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.samplers import even_times
from rediffuse.sampling.space import Space

NOISING_ROWS, NOISING_COLUMNS = 3, 11
DENOISING_ROWS, DENOISING_STEPS = 10, 10


def draw_noising(schedule: Schedule, space: Space, images: Tensor, *, seed: int, folder: Path) -> None:
    """Write noising.png: the first images at evenly spaced t from 0 to T, with the same noise at each t.

    Latents are shown decoded.
    """
    x_0 = space.encode(images[:NOISING_ROWS])
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed_for(seed))).to(x_0.device)
    times = even_times(schedule, min(NOISING_COLUMNS - 1, schedule.T))[::-1]
    columns = [space.decode(schedule.q_sample(x_0, t, eps)).cpu() for t in times]
    picture = annotate(strip(torch.stack(columns, 1).numpy()), columns=[f"t={t}" for t in times])
    save_png(picture, folder / "noising.png")


def draw_denoising(
    denoiser: Denoiser,
    guide: Denoiser | None,
    space: Space,
    sampling: Mapping[str, Any],
    precision: Precision,
    folder: Path,
) -> None:
    """Write denoising.png: the first images of the first seed while they are drawn.

    sampling: the record of the evaluation, with the settings and the seeds.
    """
    settings = SampleDDPM(**{name: sampling[name] for name in SampleDDPM.model_fields})
    steps: list[tuple[int, Tensor]] = []
    draw_shard = ddpm_shards(
        denoiser,
        settings,
        precision,
        space=space,
        guide=guide,
        observe=lambda t, x_t, _: steps.append((t, x_t)),
    )
    last = draw_shard(torch.arange(SHARD), shard_generator(sampling["seeds"][0], 0))
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, DENOISING_STEPS).astype(int))]
    columns = [images[:DENOISING_ROWS].cpu() for images in (*(space.decode(x_t) for _, x_t in shown), last)]
    names = legible(denoiser.class_names)
    rows = [names[i % len(names)] for i in range(DENOISING_ROWS)] if names else []
    picture = annotate(strip(torch.stack(columns, 1).numpy()), rows, [*(f"t={t}" for t, _ in shown), "t=0"])
    save_png(picture, folder / "denoising.png")
