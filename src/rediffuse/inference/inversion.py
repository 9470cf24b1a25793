"""From an image back to the noise it would be drawn from (Song et al. 2021, arXiv:2010.02502, sec. 4.3), and between two noises."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rediffuse.diffusion.schedule import Schedule
from rediffuse.sampling.samplers import Denoise


def invert(denoise: Denoise, schedule: Schedule, x_0: Tensor, labels: Tensor | None, *, times: Sequence[int]) -> Tensor:
    """x_T (B, ...) from which `ddim` with eta = 0 and the same times (T, ..., 0) draws about x_0: the flow, in Euler steps upwards.

    The first step takes x_0 for what the flow would have at the last time before 0.  The more steps, the nearer.
    """
    x, upwards = x_0, list(times)[::-1]
    for s, t in pairwise(upwards):
        at = max(s, upwards[1])
        x_0_seen = denoise(x, torch.full((len(x),), at, device=x.device), labels)
        x = schedule.q_sample(x_0_seen, t, schedule.eps_from(x_0_seen, x, at))
    return x


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Between noises a and b of one shape, share (K,) of the way along the great circle through both, (K, ...): the norm of noise is kept.

    Shoemake 1985.  share 0 is a, 1 is b; where both point the same way, a straight line.
    """
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    share = share.to(a).reshape(-1, *[1] * a.ndim)
    if angle.sin().abs() < 1e-6:
        return torch.lerp(a[None], b[None], share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
