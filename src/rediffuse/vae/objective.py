"""The evidence lower bound (ELBO) of the VAE and its measures, in nats per image.

Every bound is on a negative log-likelihood: lower is better.  Pixels x are in [0, 1].  A Bernoulli likelihood
takes grey values as probabilities, so its nats compare only among Bernoulli models on the same images.
With labels y, int64 (B,), the bounds are on -log p(x|y); adding -log p(y) gives bounds on -log p(x).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rediffuse.vae.model import VAE, reparameterise

ACTIVE_UNIT_VARIANCE = 0.01  # Burda et al. 2016, section 5.1


class ELBO(NamedTuple):
    """The terms, in nats: reconstruction -log p(x|z), (B,); kl of each latent dimension, (B, latent_dim)."""

    reconstruction: Tensor
    kl: Tensor

    @property
    def total(self) -> Tensor:
        """The negative ELBO, (B,), with KL weight 1."""
        return self.reconstruction + self.kl.sum(1)


def elbo(vae: VAE, x: Tensor, eps: Tensor, labels: Tensor | None = None) -> ELBO:
    """Return the negative ELBO of x for eps ~ N(0, I), (B, latent_dim) (Kingma & Welling 2014, eq. 10)."""
    mean, log_variance = vae.encode(x, labels)
    z = reparameterise(mean, log_variance, eps)
    return ELBO(negative_log_likelihood(vae, x, z, labels), kl_divergence(mean, log_variance))


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, sigma^2) || N(0, 1)) of each dimension, in nats (Kingma & Welling 2014, app. B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def negative_log_likelihood(vae: VAE, x: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return -log p(x|z) in nats, summed over pixels, (B,)."""
    logits = vae.decode_logits(z, labels)
    if vae.likelihood == "bernoulli":
        return binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    sigma = vae.sigma()
    squares = ((x - logits.sigmoid()) / sigma).square()
    return (0.5 * squares + sigma.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def entropy_floor(x: Tensor) -> Tensor:
    """Return the entropy of grey values as probabilities, in nats, (B,): no decoder with a Bernoulli
    likelihood has a smaller -log p(x|z), nor a smaller negative ELBO.
    """
    x = x.double()
    of_pixels: Tensor = -torch.xlogy(x, x) - torch.xlogy(1 - x, 1 - x)
    return of_pixels.flatten(1).sum(1)


def training_loss(
    terms: ELBO,
    *,
    kl_weight: float,
    free_bits: float,
    mean_of_all: Callable[[Tensor], Tensor] = lambda kl: kl,
) -> Tensor:
    """Return the scalar that training minimises: reconstruction + kl_weight * KL (Higgins et al. 2017).

    free_bits: nats of each dimension's mean KL over the batch that cost nothing (Kingma et al. 2016, eq. 15).
    mean_of_all: turns the mean over a process's part of the batch into the mean over the whole batch.
    """
    kl = terms.kl.mean(0)
    free = mean_of_all(kl.detach()) < free_bits
    return terms.reconstruction.mean() + kl_weight * kl.masked_fill(free, free_bits).sum()


def kl_weight(images_seen: int, *, beta: float, warmup: int) -> float:
    """Return the weight of the KL: it rises linearly to beta over the first `warmup` images."""
    return beta * min(1.0, images_seen / warmup) if warmup else beta


def bits_per_dim(vae: VAE, nats: float) -> float:
    """Convert nats per image to bits per pixel and channel.

    A Gaussian density on [0, 1] becomes the probability of a grey level by the width of a level, 1/255.
    """
    per_dim = nats / math.prod(vae.shape)
    return (per_dim + (math.log(255) if vae.likelihood == "gaussian" else 0.0)) / math.log(2)


def active_units(means: Tensor) -> int:
    """Count the latent dimensions that the encoder uses (Burda et al. 2016).

    means: posterior means (N, latent_dim); an active dimension has a variance above 0.01 over the data.
    """
    if len(means) == 1:  # a single image has no variance
        return 0
    return int((means.var(0) > ACTIVE_UNIT_VARIANCE).sum())


def importance_weighted_bound(
    vae: VAE, x: Tensor, labels: Tensor | None = None, *, k: int, generator: torch.Generator
) -> Tensor:
    """Bound -log p(x) more tightly, with k samples of q(z|x) (Burda et al. 2016, eq. 8), in nats, (B,)."""
    mean, log_variance = vae.encode(x, labels)
    log_weights = []
    for _ in range(k):
        eps = torch.randn(mean.shape, generator=generator).to(mean.device)
        z = reparameterise(mean, log_variance, eps)
        # The factors (2 pi)^(-d/2) of prior and posterior cancel.
        log_prior = -0.5 * z.square().sum(1)
        log_posterior = -0.5 * (eps.square() + log_variance).sum(1)
        log_weights.append(log_prior - log_posterior - negative_log_likelihood(vae, x, z, labels))
    return math.log(k) - torch.stack(log_weights).logsumexp(0)
