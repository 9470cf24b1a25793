"""Images and models that were neither drawn nor trained: enough where the time of a step is asked for, and in trials of the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import SHAPE
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.params import Params
from rediffuse.runtime.weights import save_model
from rediffuse.sources.fashion_mnist import CLASSES
from rediffuse.sources.splits import describe
from rediffuse.training.loop import Trainer
from rediffuse.vae.model import VAE
from rediffuse.vae.step import VAEStep
from stages.train_ddpm import make_denoiser
from stages.train_vae import make_vae

TINY = {"width": 8, "multipliers": [1], "attention": 0}  # a denoiser that takes no time


class NoCheckpoint:
    """What a Trainer keeps its state in where none is to be kept."""

    def load(self) -> None: ...

    def save(self, state: dict[str, Any]) -> None: ...


def image_set(n: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> ImageSet:
    """n images of noise, with labels that mean nothing."""
    random = np.random.RandomState(seed)
    return ImageSet(random.randint(0, 256, (n, *shape), dtype=np.uint8), np.arange(n, dtype=np.int64) % len(CLASSES), CLASSES)


def save_splits(folder: Path, **sizes: int) -> None:
    """What the stage prepare leaves, of made-up images: so many of each split."""
    splits = {name: image_set(n, seed=seed) for seed, (name, n) in enumerate(sizes.items())}
    save_images(folder, splits, describe(splits, {"set": "random", "source": "benchmark"}))


def save_models(folder: Path, params: Params) -> None:
    """Models of these parameters as the stages leave them, untrained, in vae/ and ddpm/."""
    torch.manual_seed(0)
    save_model(make_vae(params.vae, SHAPE), folder / "vae")
    torch.manual_seed(0)
    save_model(make_denoiser(params.ddpm, SHAPE, CLASSES), folder / "ddpm")


def vae_trainer(params: Params, model: VAE, data: torch.Tensor, images: int) -> Trainer[VAE]:
    """The default training of this VAE on uint8 images (N, C, H, W), of which it is to see so many; nothing is validated."""
    whole = params.vae.training
    warmup = min(whole.lr_warmup, images // 10)
    config = whole.model_copy(update={"images": images, "lr_warmup": warmup, "validate_every": images, "checkpoint_every": images})
    return Trainer(
        model,
        VAEStep(**params.vae.select(VAEStep)),
        (data, None),
        (data[:0], None),
        config,
        name="vae",
        seed=params.seed,
        precision=params.precision,
        compile=params.compile,
        validate=lambda *_: {},
        log=lambda *_: None,
    )
