"""Where new latents come from: the standard normal prior, or a Gaussian mixture fitted afterwards (Ghosh et al. 2020, section 4).

The posterior means of the training images do not fill the standard normal evenly; a mixture fitted to them does better.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rediffuse.data.pixels import to_unit
from rediffuse.errors import UserError
from rediffuse.vae.model import VAE

CHUNK = 500  # images encoded at once

Prior = Callable[[int, torch.Generator], Tensor]  # count, CPU generator -> z (count, latent_dim), float32 on the CPU


def standard_normal(latent_dim: int) -> Prior:
    """p(z) = N(0, I)."""
    return lambda count, generator: torch.randn(count, latent_dim, generator=generator)


@torch.no_grad()
def posterior_means(vae: VAE, images: Tensor) -> Tensor:
    """The means of q(z|x), (N, latent_dim), float32 on the CPU, of uint8 images (N, C, H, W)."""
    return torch.cat([vae.encode(to_unit(x))[0].cpu() for x in torch.split(images, CHUNK)])


def fit_mixture(means: NDArray[np.float32], *, components: int, seed: int) -> dict[str, Tensor]:
    """What `mixture` draws from: weights (K,), centres (K, latent_dim), Cholesky factors (K, latent_dim, latent_dim), all float64.

    means: posterior means (N, latent_dim).  Fitted by expectation maximisation.  Raises UserError for more components than means.
    """
    from sklearn.mixture import GaussianMixture  # takes a second to import, and only this prior needs it

    if components > len(means):
        raise UserError(f"sample.vae.components ({components}) must not exceed the number of training images ({len(means)})")
    fitted = GaussianMixture(components, random_state=seed, reg_covar=1e-5).fit(means.astype(np.float64))
    factors = torch.linalg.cholesky(torch.from_numpy(fitted.covariances_))
    return {"weights": torch.from_numpy(fitted.weights_), "centres": torch.from_numpy(fitted.means_), "factors": factors}


def mixture(fitted: dict[str, Tensor]) -> Prior:
    """The Gaussian mixture with full covariances that `fit_mixture` found."""
    weights, centres, factors = fitted["weights"], fitted["centres"], fitted["factors"]

    def sample(count: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        eps = torch.randn(count, centres.shape[1], 1, generator=generator, dtype=torch.float64)
        z: Tensor = centres[which] + (factors[which] @ eps).squeeze(-1)
        return z.float()

    return sample
