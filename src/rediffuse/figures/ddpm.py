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
from rediffuse.figures.grid import annotate, strip
from rediffuse.images.files import save_png
from rediffuse.params import SampleDDPM
from rediffuse.runtime.device import Precision, seed_for
from rediffuse.runtime.shards import SHARD, shard_generator
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sampling.samplers import even_times
from rediffuse.sampling.space import Space

ROWS, TIMES = 3, 11  # of the noising strip
IMAGES, MOMENTS = 10, 10  # of the denoising strip


def draw_noising(schedule: Schedule, space: Space, images: Tensor, *, seed: int, folder: Path) -> None:
    """Write noising.png: the first images at evenly spaced t from 0 to T, the same noise in each column; latents are shown decoded."""
    x_0 = space.encode(images[:ROWS])
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed_for(seed))).to(x_0.device)
    times = even_times(schedule, min(TIMES - 1, schedule.T))[::-1]
    columns = [space.decode(schedule.q_sample(x_0, t, eps)).cpu() for t in times]
    save_png(annotate(strip(torch.stack(columns, 1).numpy()), columns=[f"t={t}" for t in times]), folder / "noising.png")


def draw_denoising(denoiser: Denoiser, space: Space, sampling: Mapping[str, Any], precision: Precision, folder: Path) -> None:
    """Write denoising.png: the first images of the first seed at moments of their drawing.  sampling: as in sampling.json."""
    settings = SampleDDPM(**{name: sampling[name] for name in SampleDDPM.model_fields})
    seen: list[tuple[int, Tensor]] = []
    observed = ddpm_shards(denoiser, settings, precision, space=space, observe=lambda t, x_t, _: seen.append((t, x_t)))
    last = observed(torch.arange(SHARD), shard_generator(sampling["seeds"][0], 0))
    moments = [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, MOMENTS).astype(int))]
    columns = [*(space.decode(x_t)[:IMAGES].cpu() for _, x_t in moments), last[:IMAGES].cpu()]
    names = [name.strip() for name in denoiser.class_names]
    rows = [names[i % len(names)] for i in range(IMAGES)] if names else []
    picture = annotate(strip(torch.stack(columns, 1).numpy()), rows, [*(f"t={t}" for t, _ in moments), "t=0"])
    save_png(picture, folder / "denoising.png")
