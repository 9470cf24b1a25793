"""Augmentation that does not leak into what is drawn (Karras et al. 2022, arXiv:2206.00364, app. F.2).

Training images are mirrored, scaled, turned, stretched and shifted, each with one probability, and the
network is told how.  It draws with the description of an image that is left as it is: zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

SPREAD, SHIFT = (
    0.2,
    1 / 8,
)  # standard deviations: of log2 of scale and stretch; of shifts, in heights and widths


def draw_augmentation(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """Draw how to augment each image, float32 (batch, TOLD = 9), zeros where it is left as it is.

    By column: whether mirrored left to right, and top to bottom; log2 of the scale over SPREAD; cos - 1 and
    sin of the turn; cos and sin of twice the direction of a stretch, times its log2 over SPREAD; shifts over
    SHIFT to the right and down.
    """
    applied = torch.rand(batch, 6, generator=generator) < probability
    turn, direction = 2 * math.pi * torch.rand(2, batch, generator=generator)
    mirrored = (torch.rand(2, batch, generator=generator) < 0.5).float()
    scale, stretch, right, down = torch.randn(4, batch, generator=generator)
    by_kind = [
        mirrored[:1],
        mirrored[1:],
        scale[None],
        torch.stack([turn.cos() - 1, turn.sin()]),
        stretch * torch.stack([direction.cos(), direction.sin()]),
        torch.stack([right, down]),
    ]
    return torch.cat([kind * on for kind, on in zip(by_kind, applied.T, strict=True)]).T


def augment(x: Tensor, told: Tensor) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1], augmented as told (B, TOLD); those told zeros are unchanged.

    By bicubic interpolation; what lies outside of an image is its mirror image.
    """
    height, width = x.shape[2:]
    mirror_x, mirror_y, scale, cos, sin, along, across, right, down = told.double().unbind(1)
    cos, none = cos + 1, torch.zeros_like(scale)

    def matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)

    # exp of [[a, b], [b, -a]] stretches by e^r, r = |(a, b)|, along half the angle of (a, b), and shrinks as
    # much across.
    a, b = (-SPREAD * math.log(2) * each for each in (along, across))
    r = torch.hypot(a, b)
    grown, ratio = torch.cosh(r), torch.where(r > 0, torch.sinh(r) / r.clamp(min=1e-12), 1.0)
    stretched = matrix(grown + ratio * a, ratio * b, ratio * b, grown - ratio * a)
    turned, scaled = matrix(cos, -sin, sin, cos), torch.exp2(-SPREAD * scale)[:, None, None]
    mirrored = matrix(1 - 2 * mirror_x, none, none, 1 - 2 * mirror_y)
    # From the pixels of the result to those of the image; affine_grid counts in halves of width and height.
    halves = torch.tensor([width / 2, height / 2], dtype=torch.float64, device=x.device)
    linear = (stretched @ turned @ mirrored) * scaled * halves / halves[:, None]
    shift = -2 * SHIFT * torch.stack([right, down], 1)[:, :, None]
    grid = affine_grid(torch.cat([linear, linear @ shift], 2), list(x.shape), align_corners=False).to(x.dtype)
    moved = grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
    return torch.where(told.any(1)[:, None, None, None], moved, x)
