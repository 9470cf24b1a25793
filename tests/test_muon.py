"""Muon against the singular value decomposition that it approximates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rediffuse.training.muon import MOMENTUM, Muon, matrices, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (6, 30), (30, 6), (3, 12, 40)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonalise(100 * matrix) @ vh.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inside, torch.diag_embed(values))
    assert values.min() > 0.65 and values.max() < 1.25


def test_a_step_goes_along_the_orthogonalised_nesterov_momentum() -> None:
    random = torch.Generator().manual_seed(2)
    convolution, wide, untouched = nn.Conv2d(2, 24, 3), nn.Linear(7, 5), nn.Linear(4, 4)
    modules, lengths = (convolution, wide), (0.1 * (24 / 18) ** 0.5, 0.1)
    expected, momenta = [module.weight.detach().clone() for module in modules], [torch.zeros(())] * 2
    same = untouched.weight.detach().clone()
    weights = [module.weight for module in (*modules, untouched)]
    optimizer = Muon(weights, 0.1, weight_decay=0.5, dtype=torch.float32)
    for _ in range(3):
        for i, module in enumerate(modules):
            gradient = torch.randn(module.weight.shape, generator=random)
            module.weight.grad = gradient
            momenta[i] = MOMENTUM * momenta[i] + (1 - MOMENTUM) * gradient
            ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momenta[i]
            direction = orthogonalise(ahead.flatten(1)).view(ahead.shape)
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - lengths[i] * direction
        optimizer.step()
    for module, weight in zip(modules, expected, strict=True):
        torch.testing.assert_close(module.weight.detach(), weight)
    assert torch.equal(untouched.weight, same)


def test_it_trains_convolutions_and_dense_layers_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 3))
    embedding = nn.Embedding(3, 4)
    found = matrices(nn.ModuleList([model, embedding]))
    assert [id(weight) for weight in found] == [id(model[0].weight), id(model[3].weight)]
