"""RePaint (Lugmayr et al. 2022, arXiv:2201.09865): fill in what a mask leaves out, with any denoiser, without training for it."""

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
    """Images like x_T (B, ...) that agree with x_0 in [-1, 1] where `known` (bool, like an image or a batch of them) is true.

    Each of the ancestral steps between `times` (T, ..., 0, strictly decreasing) is gone `rounds` times: after it x_s is noised to t again,
    so that what is known and what is drawn grow together (algorithm 1, with jumps of one step).  rounds * (len(times) - 2) + 1
    evaluations of D: the last step, to 0, is gone once.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    x_t = x_T
    for t, s in pairwise(times):
        for again in range(rounds - 1, -1, -1):
            drawn, variance = schedule.q_posterior(denoise(x_t, torch.full((len(x_t),), t, device=x_t.device), labels), x_t, t, s)
            if s == 0:
                return torch.where(known, x_0, drawn)
            x_s = torch.where(known, schedule.q_sample(x_0, s, noise()), drawn + variance.sqrt() * noise())
            # q(x_t | x_s) = N(sqrt(alpha_bar_t / alpha_bar_s) x_s, 1 - alpha_bar_t / alpha_bar_s)
            kept = (schedule.alpha_bar[t] / schedule.alpha_bar[s]).item()
            x_t = x_s if not again else kept**0.5 * x_s + (1 - kept) ** 0.5 * noise()
    return x_t
