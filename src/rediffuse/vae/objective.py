"""The evidence lower bound (ELBO) of the VAE and what is measured of it, in nats per image.

Every bound here is a negative log-likelihood: lower is better.  Pixels x are in [0, 1].  A Bernoulli likelihood takes grey
values for probabilities, so its nats are comparable among Bernoulli models on the same images, and with nothing else.
Given labels y, int64 (B,), those of a conditional VAE bound -log p(x|y); -log p(y) more, and they bound -log p(x) too.
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
    """The two terms, in nats: reconstruction -log p(x|z), (B,); kl of each latent dimension, (B, latent_dim)."""

    reconstruction: Tensor
    kl: Tensor

    @property
    def total(self) -> Tensor:
        """The negative ELBO, (B,), with KL weight 1."""
        return self.reconstruction + self.kl.sum(1)


def elbo(vae: VAE, x: Tensor, eps: Tensor, labels: Tensor | None = None) -> ELBO:
    """The negative ELBO of x with one sample of q(z|x) (Kingma & Welling 2014, eq. 10).  eps: (B, latent_dim), standard normal."""
    mean, log_variance = vae.encode(x, labels)
    z = reparameterise(mean, log_variance, eps)
    return ELBO(negative_log_likelihood(vae, x, z, labels), kl_divergence(mean, log_variance))


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) of each dimension, in nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def negative_log_likelihood(vae: VAE, x: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
    """-log p(x|z) in nats, summed over pixels, (B,)."""
    logits = vae.decode_logits(z, labels)
    if vae.likelihood == "bernoulli":
        return binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    sigma = vae.sigma()
    squares = ((x - logits.sigmoid()) / sigma).square()
    return (0.5 * squares + sigma.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def training_loss(terms: ELBO, *, kl_weight: float, free_bits: float, mean_of_all: Callable[[Tensor], Tensor] = lambda kl: kl) -> Tensor:
    """What training minimises, a scalar: reconstruction + kl_weight * KL (Higgins et al. 2017).

    free_bits: nats of each latent dimension's KL, averaged over the batch, that cost nothing (Kingma et al. 2016, eq. 15).
    mean_of_all: of a mean over these terms, the mean over the whole batch that they are a share of.
    """
    kl = terms.kl.mean(0)
    free = mean_of_all(kl.detach()) < free_bits
    return terms.reconstruction.mean() + kl_weight * kl.masked_fill(free, free_bits).sum()


def kl_weight(images_seen: int, *, beta: float, warmup: int) -> float:
    """The weight of the KL after so many images: rises linearly to beta over `warmup` images."""
    return beta * min(1.0, images_seen / warmup) if warmup else beta


def bits_per_dim(vae: VAE, nats: float) -> float:
    """Nats per image as bits per pixel and channel.

    A Gaussian density on [0, 1] is turned into the probability of a grey level by the width of one, 1/255.
    """
    per_dim = nats / math.prod(vae.shape)
    return (per_dim + (math.log(255) if vae.likelihood == "gaussian" else 0.0)) / math.log(2)


def active_units(means: Tensor) -> int:
    """Latent dimensions whose posterior mean varies over the data: variance above 0.01 (Burda et al. 2016).  means: (N, latent_dim)."""
    if len(means) == 1:  # nothing varies
        return 0
    return int((means.var(0) > ACTIVE_UNIT_VARIANCE).sum())


def importance_weighted_bound(vae: VAE, x: Tensor, labels: Tensor | None = None, *, k: int, generator: torch.Generator) -> Tensor:
    """-log p(x) bounded with k samples of q(z|x) (Burda et al. 2016, eq. 8), in nats, (B,); tighter than the ELBO."""
    mean, log_variance = vae.encode(x, labels)
    log_weights = []
    for _ in range(k):
        eps = torch.randn(mean.shape, generator=generator).to(mean.device)
        z = reparameterise(mean, log_variance, eps)
        log_prior = -0.5 * z.square().sum(1)
        log_posterior = -0.5 * (eps.square() + log_variance).sum(1)  # the factors (2 pi)^(-d/2) of both cancel
        log_weights.append(log_prior - log_posterior - negative_log_likelihood(vae, x, z, labels))
    return math.log(k) - torch.stack(log_weights).logsumexp(0)
