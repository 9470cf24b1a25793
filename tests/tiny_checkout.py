"""A checkout with models as far as drawing images needs it: random weights, few channels, small images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rediffuse.diffusion.denoiser import GUIDE
from rediffuse.images.image_set import ImageSet, save_images
from rediffuse.params import Params, load_params
from rediffuse.runtime.weights import save_model
from stages.train_ddpm import make_denoiser
from stages.train_vae import make_vae

PROJECT = Path(__file__).resolve().parents[1]
CLASSES = ("T-shirt/top", "Ankle boot", "Bag")
SHAPE = (1, 8, 8)
T = 12


def write_params(root: Path, changes: Mapping[str, Any]) -> Params:
    """params.yaml of the project with tiny models, and with these leaves, by their dotted names."""
    raw = yaml.safe_load((PROJECT / "params.yaml").read_text())
    tiny = {
        "vae.latent_dim": 4,
        "vae.channels": [8, 8],
        "vae.hidden": 16,
        "ddpm.T": T,
        "ddpm.width": 8,
        "ddpm.multipliers": [1],
        "ddpm.attention": 0,
        "sample.seeds": [3],
        "sample.n": 1000,
        "reference.instruments": ["fashion-mnist-cnn-v1", "random-conv-v1"],
        "sample.ddpm.guidance_scale": 1.0,
        "sample.ddpm.autoguidance_scale": 1.0,
        "sample.ddpm.steps": 3,
        "sample.vae.components": 3,
    }
    for name, value in (tiny | dict(changes)).items():
        *groups, leaf = name.split(".")
        node = raw
        for group in groups:
            node = node[group]
        node[leaf] = value
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    return load_params(root / "params.yaml")


def make_checkout(root: Path, **changes: Any) -> Params:
    """Write parameters, data and both models.  changes: leaves of params.yaml, with "__" for the dot."""
    (root / ".dvc").mkdir(parents=True)
    params = write_params(root, {name.replace("__", "."): value for name, value in changes.items()})
    rng = np.random.RandomState(0)
    splits = ("train", "test")
    images = {split: ImageSet(rng.randint(0, 256, (90, *SHAPE)).astype(np.uint8)) for split in splits}
    save_images(root / "data/pixels", images, {"classes": CLASSES})
    save_vae(root, params, seed=1)
    torch.manual_seed(2)
    for folder in ("", GUIDE):
        denoiser = make_denoiser(params.ddpm, SHAPE, CLASSES)
        for parameter in denoiser.parameters():  # an untrained network gives zeros for any label
            torch.nn.init.normal_(parameter, std=0.2)
        save_model(denoiser, root / "data/models/ddpm" / folder)
    return params


def save_vae(root: Path, params: Params, *, seed: int) -> None:
    torch.manual_seed(seed)
    vae = make_vae(params.vae, SHAPE, CLASSES)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(vae, root / "data/models/vae")
