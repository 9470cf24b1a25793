"""The VAE as a task for the trainer: the training step, the validation, and the final measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rediffuse.images.pixels import to_unit
from rediffuse.runtime.processes import mean_of_processes, my_share, total
from rediffuse.vae import objective
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import elbo, kl_weight, training_loss
from rediffuse.vae.prior import CHUNK, in_chunks, posterior_means

Split = tuple[Tensor, Tensor | None]  # images, and labels if there are any

IWAE_SAMPLES, IWAE_IMAGES = 100, 1000  # K of the importance-weighted bound, and the images it is measured on


@dataclass(frozen=True)
class VAEStep:
    """The loss of one batch: reconstruction + weighted KL, in nats per image.

    Logs both terms and the ELBO with weight 1.  For the settings see `kl_weight` and `training_loss`.
    """

    beta: float
    kl_warmup: int
    free_bits: float

    def draw(self, model: VAE, shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        return {"eps": torch.randn(shape[0], model.latent_dim, generator=generator)}

    def __call__(
        self, model: VAE, images: Tensor, labels: Tensor | None, noise: Mapping[str, Tensor], seen: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = elbo(model, to_unit(images), noise["eps"].to(images.device), labels)
        weight = kl_weight(seen, beta=self.beta, warmup=self.kl_warmup)
        # Without free bits processes need not agree: a KL is below 0 by rounding at most.
        mean_of_all = mean_of_processes if self.free_bits else lambda kl: kl
        loss = training_loss(terms, kl_weight=weight, free_bits=self.free_bits, mean_of_all=mean_of_all)
        measures = {"elbo": terms.total, "reconstruction": terms.reconstruction, "kl": terms.kl.sum(1)}
        count = loss.new_full((), len(images))
        return loss, {name: torch.stack([value.detach().sum(), count]) for name, value in measures.items()}


@torch.no_grad()
def measure(vae: VAE, images: Tensor, labels: Tensor | None = None, *, seed: int) -> dict[str, float]:
    """Return negative ELBO, reconstruction and KL in nats per image, with KL weight 1 and the seed's noise.

    images: uint8 (N, C, H, W).  Always in float32.  The processes share the work, and all get the same
    result.
    """
    generator = torch.Generator().manual_seed(seed)
    reconstruction = torch.zeros(len(images), device=images.device)
    kl = torch.zeros(len(images), vae.latent_dim, device=images.device)
    chunks = in_chunks(images, labels)
    for i, (x, y) in enumerate(chunks):
        eps = torch.randn(len(x), vae.latent_dim, generator=generator).to(x.device)
        if i in my_share(len(chunks)):
            rows = slice(i * CHUNK, i * CHUNK + len(x))
            reconstruction[rows], kl[rows] = elbo(vae, to_unit(x), eps, y)
    nats = total(reconstruction).double().mean().item(), total(kl).double().sum(1).mean().item()
    return {"elbo": sum(nats), "reconstruction": nats[0], "kl": nats[1]}


@torch.no_grad()
def final_measures(vae: VAE, train: Split, test: Split, *, seed: int) -> dict[str, Any]:
    """Return the content of metrics/train_vae.json.  All processes must call it: they share part of the work.

    train, test: uint8 images and labels.  Of train, as many images are measured as test has.
    """
    generator = torch.Generator().manual_seed(seed)
    bounds = [
        objective.importance_weighted_bound(vae, to_unit(x), y, k=IWAE_SAMPLES, generator=generator)
        for x, y in in_chunks(*_first(test, IWAE_IMAGES))
    ]
    on_test, on_train = measure(vae, *test, seed=seed), measure(vae, *_first(train, len(test[0])), seed=seed)
    report: dict[str, Any] = {
        "test": on_test | {"bits_per_dim": objective.bits_per_dim(vae, on_test["elbo"])},
        "train": {"elbo": on_train["elbo"]},
        f"iwae_{IWAE_SAMPLES}": torch.cat(bounds).double().mean().item(),
        "active_units": objective.active_units(posterior_means(vae, *test)),
    }
    if vae.likelihood == "gaussian":
        report["sigma"] = vae.sigma().item()
    else:
        floors = [objective.entropy_floor(to_unit(x)) for x, _ in in_chunks(*test)]
        report["test"]["floor"] = torch.cat(floors).mean().item()
    assert all(math.isfinite(value) for value in report["test"].values())
    return report


def _first(split: Split, n: int) -> Split:
    images, labels = split
    return images[:n], None if labels is None else labels[:n]
