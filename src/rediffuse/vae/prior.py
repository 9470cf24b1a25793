"""Where new latents come from: the standard normal prior, or a Gaussian mixture fitted afterwards (Ghosh et al. 2020, section 4).

The posterior means of the training images do not fill the standard normal evenly; a mixture fitted to them does better.

A conditional VAE has one prior for all classes: p(z) knows no label (Kingma et al. 2014, M2), and the KL draws the aggregate posterior of
each class to it, so that one mixture fits all as far as training succeeded.  One a class would need many images of each.
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

Prior = Callable[[int, torch.Generator], Tensor]  # count, CPU generator -> z (count, latent_dim), float32 on the CPU


def standard_normal(latent_dim: int) -> Prior:
    """p(z) = N(0, I)."""
    return lambda count, generator: torch.randn(count, latent_dim, generator=generator)


def in_chunks(images: Tensor, labels: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """At most CHUNK images at once, with their labels, if there are any."""
    parts = torch.split(images, CHUNK)
    return list(zip(parts, [None] * len(parts) if labels is None else torch.split(labels, CHUNK), strict=True))


@torch.no_grad()
def posterior_means(vae: VAE, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """The means of q(z|x), (N, latent_dim), float32 on the CPU, of uint8 images (N, C, H, W)."""
    return torch.cat([vae.encode(to_unit(x), y)[0].cpu() for x, y in in_chunks(images, labels)])


def fit_mixture(means: NDArray[np.float32], *, components: int, seed: int) -> dict[str, Tensor]:
    """What `mixture` draws from: weights (K,), centres (K, latent_dim), Cholesky factors (K, latent_dim, latent_dim), all float64.

    means: posterior means (N, latent_dim).  Fitted by expectation maximisation.  There are no more components than means: with fewer
    than were asked for, their number is kept as `asked`.
    """
    from sklearn.mixture import GaussianMixture  # takes a second to import, and only this prior needs it

    fewer = min(components, len(means))
    fitted = GaussianMixture(fewer, random_state=seed, reg_covar=1e-5).fit(means.astype(np.float64))
    factors = torch.linalg.cholesky(torch.from_numpy(fitted.covariances_))
    found = {"weights": torch.from_numpy(fitted.weights_), "centres": torch.from_numpy(fitted.means_), "factors": factors}
    if fewer == components:
        return found
    print(f"warning: sample.vae.components ({components}) is lowered to the number of training images, {fewer}", file=sys.stderr)
    return found | {"asked": torch.tensor(components)}


def mixture(fitted: dict[str, Tensor]) -> Prior:
    """The Gaussian mixture with full covariances that `fit_mixture` found."""
    weights, centres, factors = fitted["weights"], fitted["centres"], fitted["factors"]

    def sample(count: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        eps = torch.randn(count, centres.shape[1], 1, generator=generator, dtype=torch.float64)
        z: Tensor = centres[which] + (factors[which] @ eps).squeeze(-1)
        return z.float()

    return sample
