"""This project's models as contenders: as in params.yaml, built and trained by the code of the stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import SHAPE, random_images
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.step import DenoisingStep
from rediffuse.images.image_set import ImageSet
from rediffuse.params import Params, load_params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.runtime.shards import draw
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sources.fashion_mnist import CLASSES
from rediffuse.training.loop import Log, Trainer
from rediffuse.vae.model import VAE
from rediffuse.vae.step import VAEStep
from stages.train_ddpm import make_denoiser
from stages.train_vae import make_vae

# 0.8 GFLOP an image in training.  With half of that, as the default has, the documented structures of the
# peers would be 8 features wide, and slow for that reason alone.
LARGE = {"fold": 2, "width": 48, "multipliers": [2, 2], "blocks": 1, "attention": 0}
TINY = {"width": 8, "multipliers": [1], "attention": 0}  # a denoiser that takes no time
LOGS = 5  # steps between two readings of the clock


class NoCheckpoint:
    """A checkpoint that keeps nothing."""

    def load(self) -> None: ...

    def save(self, state: dict[str, Any]) -> None: ...


class Clock(list[float]):
    """A log that keeps the time of each entry."""

    def log_curve(self, *_: object) -> None:
        self.append(time.perf_counter())

    def log_model(self, *_: object) -> None: ...


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
    name: str,
    params: Params,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    seen: int,
    log: Log | None = None,
    log_every: int | None = None,
) -> Trainer[Any]:
    """Return a trainer as in the stage train_`name` that stops after `seen` images and validates nothing."""
    make_deterministic()
    group, shape = getattr(params, name), (images.shape[1], images.shape[2], images.shape[3])
    changes = {"images": seen, "validate_every": seen, "checkpoint_every": seen}
    changes |= {"log_every": log_every or group.training.log_every}
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
        log=log,
    )


def training_turn(steps: int, params: Params) -> Callable[[], float]:
    """Return a turn of `steps` whole steps, which gives images a second.

    The clock runs from the trainer's first log to its last, so that its construction is not counted.
    """
    images, labels = random_images()
    every = params.ddpm.training.batch * min(LOGS, steps)
    counted = steps // min(LOGS, steps)

    def turn() -> float:
        clock, seen = Clock(), every * (1 + counted)
        trainer("ddpm", params, images, labels, seen=seen, log=clock, log_every=every).train(NoCheckpoint())
        return every * counted / (clock[counted] - clock[0])  # the log of the validation comes after these

    return turn


def sampling_turn(n: int, steps: int, params: Params) -> Callable[[], float]:
    """Return a turn that draws n images in so many steps, which gives images a second."""
    make_deterministic()
    model = denoiser(params).to(device()).to(memory_format=torch.channels_last).eval()

    def turn() -> float:
        begin = time.perf_counter()
        draw_images(model, params, n, steps=steps, guidance_scale=1.0)
        return n / (time.perf_counter() - begin)

    return turn


def draw_images(model: Denoiser, params: Params, n: int, **changes: Any) -> Tensor:
    """Return uint8 (n, C, H, W) with labels in turn, by the settings of sample.ddpm with these changes."""
    shards = ddpm_shards(model, params.sample.ddpm.model_copy(update=changes), params.precision)
    with torch.inference_mode():
        return draw(n, shards, seed=params.sample.seeds[0], title="images")
