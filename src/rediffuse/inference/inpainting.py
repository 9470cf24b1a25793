"""RePaint (Lugmayr et al. 2022, arXiv:2201.09865): fill in a part of an image with any trained denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule
from rediffuse.sampling.samplers import Denoise, Noise


def repaint(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Tensor,
    known: Tensor,
    x_T: Tensor,
    labels: Tensor | None,
    *,
    times: Sequence[int],
    rounds: int = 10,
    noise: Noise,
) -> Tensor:
    """Return images like x_T (B, ...) that agree with x_0 in [-1, 1] where `known`, bool, is true.

    Each ancestral step between `times` (T, ..., 0, strictly decreasing) is taken `rounds` times.  In between,
    x_s is noised to t again, so that the drawn part comes to fit the known one (algorithm 1, with jumps of
    one step).  The last step, to 0, is taken once.  D is evaluated rounds * (len(times) - 2) + 1 times.
    """
    x_t = x_T
    for t, s in pairwise(times):
        for rounds_left in range(rounds - 1, -1, -1):
            x_0_hat = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device), labels)
            drawn, variance = schedule.q_posterior(x_0_hat, x_t, t, s)
            if s == 0:
                return torch.where(known, x_0, drawn)
            x_s = torch.where(known, schedule.q_sample(x_0, s, noise()), drawn + variance.sqrt() * noise())
            # q(x_t | x_s) = N(sqrt(alpha_bar_t / alpha_bar_s) x_s, 1 - alpha_bar_t / alpha_bar_s)
            kept = (schedule.alpha_bar[t] / schedule.alpha_bar[s]).item()
            x_t = x_s if not rounds_left else kept**0.5 * x_s + (1 - kept) ** 0.5 * noise()
    return x_t
