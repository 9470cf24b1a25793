"""This project's models as contenders: as in params.yaml, built and trained by the code of the stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import timed
from benchmarks.peers import SHAPE, WARM, random_images
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.step import DenoisingStep
from rediffuse.images.image_set import ImageSet
from rediffuse.params import Params, load_params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.runtime.shards import draw
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sources.fashion_mnist import CLASSES
from rediffuse.training.loop import Trainer
from rediffuse.vae.model import VAE
from rediffuse.vae.step import VAEStep
from stages.train_ddpm import make_denoiser
from stages.train_vae import make_vae

# 0.8 GFLOP an image in training.  With half of that, as the default has, the documented structures of the
# peers would be 8 features wide, and slow for that reason alone.
LARGE = {"fold": 2, "width": 48, "multipliers": [2, 2], "blocks": 1, "attention": 0}
TINY = {"width": 8, "multipliers": [1], "attention": 0}  # a denoiser that takes no time
ENDLESS = 10**9  # images: a training that does not end


class NoCheckpoint:
    """A checkpoint that keeps nothing."""

    def load(self) -> None: ...

    def save(self, state: dict[str, Any]) -> None: ...


def parameters(precision: str = "auto", **ddpm: Any) -> Params:
    """Return those of the checkout, with this precision and these settings of the denoiser."""
    params = load_params()
    return params.model_copy(update={"precision": precision, "ddpm": params.ddpm.model_copy(update=ddpm)})


def denoiser(params: Params, shape: tuple[int, int, int] = SHAPE) -> Denoiser:
    """Return an untrained denoiser of images (C, H, W)."""
    torch.manual_seed(params.seed)
    return make_denoiser(params.ddpm, shape, CLASSES)


def vae(params: Params) -> VAE:
    """Return an untrained VAE."""
    torch.manual_seed(params.seed)
    return make_vae(params.vae, SHAPE)


def image_set(n: int, seed: int = 1) -> ImageSet:
    """Return n labelled images of noise."""
    images, labels = random_images(n, seed=seed)
    return ImageSet(images.numpy(), labels.numpy(), CLASSES)


def network_inputs(model: Denoiser, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x_t, t and labels of a batch."""
    labels = torch.arange(batch) % model.classes if model.classes else None
    return torch.randn(batch, *SHAPE), torch.arange(batch) % model.schedule.T + 1, labels


def trainer(
    name: str, params: Params, images: Tensor, labels: Tensor | None = None, *, seen: int = ENDLESS
) -> Trainer[Any]:
    """Return a trainer as in the stage train_`name` that stops after `seen` images and validates nothing."""
    make_deterministic()
    group, shape = getattr(params, name), (images.shape[1], images.shape[2], images.shape[3])
    changes = {"images": seen, "validate_every": seen, "checkpoint_every": seen}
    changes |= {"lr_warmup": min(group.training.lr_warmup, seen // 10)}
    return Trainer(
        denoiser(params, shape) if name == "ddpm" else vae(params),
        DenoisingStep(**group.select(DenoisingStep)) if name == "ddpm" else VAEStep(**group.select(VAEStep)),
        (images.to(device()), None if labels is None else labels.to(device())),
        (images[:0], None),
        group.training.model_copy(update=changes),
        name=name,
        seed=params.seed,
        precision=params.precision,
        compile=params.compile,
        validate=lambda *_: {},
    )


def training_turn(
    steps: int, params: Params, name: str = "ddpm", images: Tensor | None = None
) -> Callable[[], float]:
    """Return a turn of `steps` whole steps and a reading of the losses, which gives images a second."""
    images = random_images()[0] if images is None else images
    labels = torch.arange(len(images)) % 10 if name == "ddpm" else None
    run = trainer(name, params, images, labels)

    def work(steps: int) -> None:
        for _ in range(steps):
            run._step()
        run._log()

    work(min(WARM, steps))
    return timed(lambda: work(steps), steps * run.config.batch)


def sampling_turn(n: int, steps: int, params: Params) -> Callable[[], float]:
    """Return a turn that draws n images in so many steps, which gives images a second."""
    make_deterministic()
    model = denoiser(params).to(device()).to(memory_format=torch.channels_last).eval()

    return timed(lambda: draw_images(model, params, n, steps=steps, guidance_scale=1.0), n)


def draw_images(model: Denoiser, params: Params, n: int, **changes: Any) -> Tensor:
    """Return uint8 (n, C, H, W) with labels in turn, by the settings of sample.ddpm with these changes."""
    shards = ddpm_shards(model, params.sample.ddpm.model_copy(update=changes), params.precision)
    with torch.inference_mode():
        return draw(n, shards, seed=params.sample.seeds[0], title="images")
