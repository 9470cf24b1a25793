"""The exponential moving average (EMA) of the weights, with a half-life in images."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

WARMUP = 0.1  # the half-life is at most this share of the images seen, so that the first weights soon vanish


class Average(Generic[Model]):
    """A copy of the model whose parameters follow the trained ones.  Buffers are copied, never averaged.

    half_life: images after which a weight counts half, ramped up as in Karras et al. 2022, app. F.2; 0: no
    average.
    """

    def __init__(self, model: Model, half_life: int) -> None:
        self.half_life, self.model = half_life, copy.deepcopy(model)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model, *, seen: int, batch: int) -> None:
        """Move towards the model after a step of `batch` images, `seen` in all."""
        half_life = min(self.half_life, WARMUP * seen)
        first = seen == batch  # there is no average to keep yet
        weight = 1 - 0.5 ** (batch / half_life) if half_life and not first else 1.0
        # Not torch's AveragedModel: its count is on the CPU and goes to the GPU at each step, which waits for
        # it.
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        for kept, current in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(current)
