"""How a DDPM takes images apart and makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule
from rediffuse.figures.films import SHOWN, Painter, noised
from rediffuse.figures.grid import strip
from rediffuse.figures.text import annotate, legible
from rediffuse.images.files import save_png
from rediffuse.sampling.samplers import even_times
from rediffuse.sampling.space import Space

NOISING_ROWS, NOISING_COLUMNS = 3, 11
DENOISING_STEPS = 10


def draw_noising(schedule: Schedule, space: Space, images: Tensor, *, seed: int, folder: Path) -> None:
    """Write noising.png: the first images at evenly spaced t from 0 to T, with the same noise at each t."""
    times = even_times(schedule, min(NOISING_COLUMNS - 1, schedule.T))[::-1]
    columns = noised(schedule, space, images[:NOISING_ROWS], times, seed)
    picture = annotate(strip(columns.transpose(0, 1).cpu().numpy()), columns=[f"t={t}" for t in times])
    save_png(picture, folder / "noising.png")


def draw_denoising(painter: Painter, folder: Path) -> None:
    """Write denoising.png: the first images of the first seed while they are drawn."""
    *steps, last = painter.steps
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, DENOISING_STEPS).astype(int))]
    columns = [x_t.cpu() for _, x_t, _ in [*shown, last]]
    names = legible(painter.denoiser.class_names)
    rows = [names[i % len(names)] for i in range(SHOWN)] if names else []
    times = [f"t={t}" for t, _, _ in [*shown, last]]
    save_png(annotate(strip(torch.stack(columns, 1).numpy()), rows, times), folder / "denoising.png")
