"""Guidance in an interval of t (Kynkäänniemi et al. 2024, arXiv:2404.07724): away from what the model draws
without a label (Ho & Salimans 2022, arXiv:2207.12598), and away from what it drew early in its training
(autoguidance, Karras et al. 2024, arXiv:2406.02507).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rediffuse.diffusion.denoiser import GUIDE, Denoiser
from rediffuse.runtime.device import device
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.weights import load_model
from rediffuse.sampling.samplers import Denoise


def guided(
    denoiser: Denoiser,
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] = (0, 1),
    *,
    guide: Denoiser | None = None,
    autoguidance_scale: float = 1.0,
) -> Denoise:
    """Return D(x_t, t, labels) -> x_0 for the samplers, in [-1, 1] if the denoiser clips.

    The output is that of the denoiser, plus (guidance_scale - 1) times its difference from the output without
    label, plus (autoguidance_scale - 1) times its difference from the output of the guide, an early average
    of its weights.  So 1 is no guidance.  Errors that training was about to remove, the guide has to a larger
    degree: away from it they grow smaller.  Without guide there is no autoguidance.
    guidance_interval: the smallest and largest t / T with guidance. Near T it makes images alike, near 0 it
    costs an evaluation and changes little. All images of a batch must have the same t.
    """
    low, high = (share * denoiser.schedule.T for share in guidance_interval)

    def denoise(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        inside = low <= int(t[0]) <= high
        if guidance_scale == 1 or labels is None or not inside:
            output = conditional = denoiser(x_t, t, labels)
        else:
            none = torch.full_like(labels, denoiser.classes)
            both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, none]))
            conditional, unconditional = both.chunk(2)
            output = torch.lerp(unconditional, conditional, guidance_scale)
        if guide is not None and autoguidance_scale != 1 and inside:
            output = output + (autoguidance_scale - 1) * (conditional - guide(x_t, t, labels))
        x_0 = denoiser.schedule.x_0_from(denoiser.predict, output, x_t, t)
        return x_0.clamp(-1, 1) if denoiser.clip else x_0

    return denoise


def load_guide(folder: Path, autoguidance_scale: float) -> Denoiser | None:
    """Return the guide of the DDPM in the folder, on `device()`; None if the scale is 1, which needs none.

    Raises UserError if it is missing or damaged.
    """
    if autoguidance_scale == 1:
        return None
    if not (folder / GUIDE).is_dir():
        raise UserError(
            f"autoguidance_scale ({autoguidance_scale:g}) must be 1 for the model in {folder}, which"
            " was trained without a guide: set it to 1, or train with ddpm.guide_share above 0"
        )
    return load_model(Denoiser, folder / GUIDE, device())
