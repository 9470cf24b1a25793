"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

All directions of a weight matrix then move by the same length, also those in which the gradient is weak.
It trains the weights of convolutions and dense layers; AdamW trains the rest: biases, norms, embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of the polynomial that brings singular values near 1 in five steps.
A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5
MOMENTUM = 0.95


def matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of convolutions and dense layers."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def orthogonalise(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices (m, n) with the same singular vectors and singular values near 1, 0.7 to 1.2.

    Newton-Schulz iteration: odd polynomials of a matrix X act on its singular values alone.  X p(X^T X) =
    q(X X^T) X, so the steps work on the Gram matrix X X^T of the smaller side, all those of one size in one
    multiplication, and the large matrix is multiplied once at the end.  That needs the precision of float32.
    """
    wide = [matrix if len(matrix) <= matrix.shape[1] else matrix.mT for matrix in matrices]
    wide = [x / (x.norm() + 1e-7) for x in wide]  # no singular value is then above 1
    alike: dict[int, list[int]] = {}
    for i, x in enumerate(wide):
        alike.setdefault(len(x), []).append(i)
    for members in alike.values():
        gram = torch.stack([wide[i] @ wide[i].mT for i in members])
        product = one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        for _ in range(STEPS):
            factor = A * one + B * gram + C * gram @ gram
            product, gram = factor @ product, factor @ gram @ factor
        for i, factor in zip(members, product, strict=True):
            wide[i] = factor @ wide[i]
    return [x if x.shape == matrix.shape else x.mT for x, matrix in zip(wide, matrices, strict=True)]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum.  A convolution is the matrix (out, in x height x width).

    lr: length of a step for a square matrix; one with more rows than columns moves sqrt(rows / columns)
    times as far.  weight_decay: decoupled, as in AdamW.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, *, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            directions = orthogonalise([self._nesterov(parameter).flatten(1) for parameter in parameters])
            for parameter, direction in zip(parameters, directions, strict=True):
                rows, columns = direction.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                length = group["lr"] * max(1, rows / columns) ** 0.5
                parameter.sub_(direction.view(parameter.shape), alpha=length)

    def _nesterov(self, parameter: Tensor) -> Tensor:
        """Update the momentum; return the gradient that looks ahead by it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return torch.lerp(parameter.grad, state["momentum"], MOMENTUM)
