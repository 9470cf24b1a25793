"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

All directions of a weight matrix then move by the same length, also those in which the gradient is weak.
It trains the weights of convolutions and dense layers; AdamW trains the rest: biases, norms, embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Of the polynomial that brings singular values near 1 in five steps.
A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5
MOMENTUM = 0.95


def matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of convolutions and dense layers."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return matrices (..., m, n) with the same singular vectors and singular values near 1, 0.7 to 1.2.

    Newton-Schulz iteration: odd polynomials of the matrix act on the singular values alone.  In the dtype of
    the matrix; bfloat16 is enough.
    """
    x: Tensor = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix  # the smaller Gram matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the largest singular value is then at most 1
    for _ in range(STEPS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum.  A convolution is the matrix (out, in x height x width).

    lr: length of a step for a square matrix; one with more rows than columns moves sqrt(rows / columns)
    times as far.  weight_decay: decoupled, as in AdamW.  dtype: of the Newton-Schulz iteration.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, *, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = self._nesterov(parameter).flatten(1)
                    alike.setdefault(gradient.shape, []).append((parameter, gradient))
            for (rows, columns), pairs in alike.items():  # matrices of one shape in one multiplication
                directions = orthogonalise(torch.stack([gradient for _, gradient in pairs]).to(self.dtype))
                length = group["lr"] * max(1, rows / columns) ** 0.5
                for (parameter, _), direction in zip(pairs, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(direction.view(parameter.shape).to(parameter.dtype), alpha=length)

    def _nesterov(self, parameter: Tensor) -> Tensor:
        """Update the momentum; return the gradient that looks ahead by it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return torch.lerp(parameter.grad, state["momentum"], MOMENTUM)
