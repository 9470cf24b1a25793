"""The prior of the latents: standard normal, or a Gaussian mixture fitted later (Ghosh et al. 2020, sec. 4).

The posterior means of the training images do not fill the standard normal; a mixture fitted to them does
better.  A conditional VAE has one prior for all classes: p(z) is independent of the label (Kingma et al.
2014, M2), and the KL pulls the posterior of each class towards it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rediffuse.images.pixels import to_unit
from rediffuse.vae.model import VAE

CHUNK = 500  # images encoded at once

# Takes a count and a CPU generator; returns z (count, latent_dim), float32 on the CPU.
Prior = Callable[[int, torch.Generator], Tensor]


def standard_normal(latent_dim: int) -> Prior:
    """Return p(z) = N(0, I)."""
    return lambda count, generator: torch.randn(count, latent_dim, generator=generator)


def in_chunks(images: Tensor, labels: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Split images, and labels if there are any, into chunks of at most CHUNK."""
    parts = torch.split(images, CHUNK)
    label_parts = [None] * len(parts) if labels is None else torch.split(labels, CHUNK)
    return list(zip(parts, label_parts, strict=True))


@torch.no_grad()
def posterior_means(vae: VAE, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the means of q(z|x), (N, latent_dim), float32 on the CPU, for uint8 images (N, C, H, W)."""
    return torch.cat([vae.encode(to_unit(x), y)[0].cpu() for x, y in in_chunks(images, labels)])


def fit_mixture(means: NDArray[np.float32], *, components: int, seed: int) -> dict[str, Tensor]:
    """Fit a Gaussian mixture to posterior means (N, latent_dim) by expectation maximisation.

    Returns weights (K,), centres (K, latent_dim) and Cholesky factors (K, latent_dim, latent_dim), all
    float64.  K is at most N; if it is lower than `components`, that number is kept as `asked`.
    """
    from sklearn.mixture import GaussianMixture  # takes a second to import, and only this prior needs it

    fewer = min(components, len(means))
    fitted = GaussianMixture(fewer, random_state=seed, reg_covar=1e-5).fit(means.astype(np.float64))
    found = {
        "weights": torch.from_numpy(fitted.weights_),
        "centres": torch.from_numpy(fitted.means_),
        "factors": torch.linalg.cholesky(torch.from_numpy(fitted.covariances_)),
    }
    if fewer < components:
        lowered = f"sample.vae.components ({components}) is lowered to the number of training images, {fewer}"
        print(f"warning: {lowered}", file=sys.stderr)
        found["asked"] = torch.tensor(components)
    return found


def mixture(fitted: dict[str, Tensor]) -> Prior:
    """Return the Gaussian mixture with full covariances that `fit_mixture` found."""
    weights, centres, factors = fitted["weights"], fitted["centres"], fitted["factors"]

    def sample(count: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        eps = torch.randn(count, centres.shape[1], 1, generator=generator, dtype=torch.float64)
        z: Tensor = centres[which] + (factors[which] @ eps).squeeze(-1)
        return z.float()

    return sample
