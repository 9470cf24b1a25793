"""Muon against the singular value decomposition that it approximates."""

from __future__ import annotations

import torch
from torch import nn

from rediffuse.training.muon import MOMENTUM, STEPS, A, B, C, Muon, matrices, orthogonalise


def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values() -> None:
    random = torch.Generator().manual_seed(1)
    shapes = [(8, 8), (6, 30), (30, 6), (6, 31)]  # of equal smaller side, together
    matrices = [100 * torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    for matrix, even in zip(matrices, orthogonalise(matrices), strict=True):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.mT @ even @ vh.mT
        values = inside.diagonal()
        torch.testing.assert_close(inside, values.diag())
        assert values.min() > 0.65 and values.max() < 1.25


def test_weak_directions_follow_the_polynomial_in_float32() -> None:
    """Singular values over four decades, against the scalar polynomial: the Gram matrix squares them."""
    random = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(12, 12, generator=random, dtype=torch.float64))[0] for _ in range(2))
    values = torch.logspace(0, -4, 12, dtype=torch.float64)
    found = u.mT @ orthogonalise([(u * values @ v.mT).float()])[0].double() @ v
    expected = values / values.norm()
    for _ in range(STEPS):
        expected = A * expected + B * expected**3 + C * expected**5
    torch.testing.assert_close(found, expected.diag(), rtol=0, atol=1e-3)


def test_a_step_goes_along_the_orthogonalised_nesterov_momentum() -> None:
    random = torch.Generator().manual_seed(2)
    convolution, wide, untouched = nn.Conv2d(2, 24, 3), nn.Linear(7, 5), nn.Linear(4, 4)
    modules, lengths = (convolution, wide), (0.1 * (24 / 18) ** 0.5, 0.1)
    expected, momenta = [module.weight.detach().clone() for module in modules], [torch.zeros(())] * 2
    same = untouched.weight.detach().clone()
    weights = [module.weight for module in (*modules, untouched)]
    optimizer = Muon(weights, 0.1, weight_decay=0.5)
    for _ in range(3):
        for i, module in enumerate(modules):
            gradient = torch.randn(module.weight.shape, generator=random)
            module.weight.grad = gradient
            momenta[i] = MOMENTUM * momenta[i] + (1 - MOMENTUM) * gradient
            ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momenta[i]
            direction = orthogonalise([ahead.flatten(1)])[0].view(ahead.shape)
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
