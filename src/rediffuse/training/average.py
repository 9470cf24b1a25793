"""The exponential moving average (EMA) of the weights, its memory counted in images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Model = TypeVar("Model", bound=nn.Module)

WARMUP = 0.1  # the half-life is at most this share of the images seen, so that the first weights are soon forgotten


class Average(Generic[Model]):
    """A copy of the model whose parameters follow the trained ones; its buffers are copied, never averaged.

    half_life: images after which a weight counts half (Karras et al. 2022, appendix F.2, ramp it up likewise); 0: no averaging.
    """

    def __init__(self, model: Model, half_life: int) -> None:
        self.half_life, self.weight = half_life, 1.0
        self.averaged = AveragedModel(model, multi_avg_fn=self._lerp)
        self.averaged.requires_grad_(False)

    @property
    def model(self) -> Model:
        """The averaged model."""
        return cast("Model", self.averaged.module)

    def update(self, model: Model, *, seen: int, batch: int) -> None:
        """Move towards the model after a step of `batch` images, `seen` in all."""
        half_life = min(self.half_life, WARMUP * seen)
        self.weight = 1 - 0.5 ** (batch / half_life) if half_life else 1.0
        self.averaged.update_parameters(model)

    def _lerp(self, averaged: Sequence[Any], trained: Sequence[Any], _: Tensor | int) -> None:
        torch._foreach_lerp_(list(averaged), list(trained), self.weight)
