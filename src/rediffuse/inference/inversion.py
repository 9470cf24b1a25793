"""From an image to the noise it would be drawn from, and between two noises."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule
from rediffuse.sampling.samplers import Denoise


def invert(
    denoise: Denoise, schedule: Schedule, x_0: Tensor, labels: Tensor | None, *, times: Sequence[int]
) -> Tensor:
    """Return x_T (B, ...) from which `ddim` with eta = 0 and the same times (T, ..., 0) draws about x_0.

    This is the probability flow in Euler steps from 0 to T (Song et al. 2021, arXiv:2010.02502, sec. 4.3).
    The first step evaluates D at the last time before 0.  More steps are more exact.
    """
    x, upwards = x_0, list(times)[::-1]
    for s, t in pairwise(upwards):
        seen_at = max(s, upwards[1])
        x_0_hat = denoise(x, torch.full((len(x),), seen_at, device=x.device), labels)
        x = schedule.q_sample(x_0_hat, t, schedule.eps_from(x_0_hat, x, seen_at))
    return x


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Return the noises (K, ...) that lie share (K,) of the way from a to b on the great circle.

    Keeps the norm of noise (Shoemake 1985).  Where a and b point the same way, it is a straight line.
    """
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    share = share.to(a).reshape(-1, *[1] * a.ndim)
    if angle.sin().abs() < 1e-6:
        return torch.lerp(a[None], b[None], share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
