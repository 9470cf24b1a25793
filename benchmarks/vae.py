"""Whole training steps of the VAE: ours, pythae's and a plain loop, with the same layers and the same batch.

- rediffuse: the trainer as in the stage train_vae: data, noise, forward, backward, clipping, AdamW, average
  of the weights, logging.
- pythae: its `VAE` with our encoder and decoder as the custom architectures that its documentation shows, its
  `BaseTrainer` (Adam, its own DataLoader), one `train_step`, which is an epoch, without the checkpoints that
  `train()` writes around it.  On a CPU it has no switch that makes it faster: its mixed precision is for
  CUDA, and is ignored with a Bernoulli likelihood.
- plain float32: our model and loss, Adam, a permutation of images that are float32 already; no autocast, no
  channels_last, no clipping, no average.
"""

from __future__ import annotations

import tempfile
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.machine import timed
from benchmarks.peers import SHAPE, flops, random_images
from benchmarks.report import RATIO, Settings, Table, peak_mib
from benchmarks.workers import Turn, Workers, ratio
from rediffuse.images.pixels import to_unit
from rediffuse.params import Params, load_params
from rediffuse.runtime.device import device
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import elbo

WARMUP = 10  # batches


def rediffuse(images: int) -> Turn:
    """Time the trainer after its construction."""
    params = load_params()
    return ours.training_turn(images // params.vae.training.batch, params, "vae")


def plain(images: int) -> Turn:
    """Time a loop as one writes it."""
    params = load_params()
    batch, data = params.vae.training.batch, to_unit(random_images(images)[0]).to(device())
    vae = ours.vae(params).to(device())
    optimizer = torch.optim.Adam(vae.parameters(), lr=params.vae.training.lr)

    def epoch(data: Tensor) -> None:
        for indices in torch.randperm(len(data)).split(batch):
            x = data[indices]
            optimizer.zero_grad()
            elbo(vae, x, torch.randn(len(x), vae.latent_dim, device=device())).total.mean().backward()
            optimizer.step()

    epoch(data[: WARMUP * batch])
    return timed(lambda: epoch(data), len(data))


def pythae_model(vae: VAE) -> Any:
    """Return pythae's VAE whose encoder and decoder are the layers of ours."""
    from pythae import models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.mean, self.log_variance = vae.encoder, vae.mean, vae.log_variance

        def forward(self, x: Tensor) -> Any:
            features = self.layers(x)
            return ModelOutput(embedding=self.mean(features), log_covariance=self.log_variance(features))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(vae.decoder, nn.Sigmoid())

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.layers(z))

    loss = {"bernoulli": "bce", "gaussian": "mse"}[vae.likelihood]
    config = models.VAEConfig(input_dim=vae.shape, latent_dim=vae.latent_dim, reconstruction_loss=loss)
    return models.VAE(config, encoder=Encoder(), decoder=Decoder())


def pythae(images: int) -> Turn:
    """Time pythae's own trainer and loader."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    params = load_params()
    batch, data = params.vae.training.batch, to_unit(random_images(images)[0])
    folder = tempfile.TemporaryDirectory()  # removed when the process ends
    length = {"num_epochs": 1, "per_device_train_batch_size": batch, "learning_rate": params.vae.training.lr}
    config = BaseTrainerConfig(output_dir=folder.name, **length)

    def trainer(data: Tensor) -> Any:
        dataset = BaseDataset(data, torch.zeros(len(data)))
        made = BaseTrainer(pythae_model(ours.vae(params)), dataset, training_config=config)
        made.prepare_training()
        return made

    trainer(data[: WARMUP * batch]).train_step(epoch=1)
    timed_trainer = trainer(data)

    def work() -> None:
        assert folder.name  # kept as long as the trainer
        timed_trainer.train_step(epoch=1)

    return timed(work, images)


def our_flops(params: Params) -> float:
    """Return the FLOPs of forward and backward for one image, in the trainer and in the plain loop."""
    noise = torch.zeros(1, params.vae.latent_dim)
    return flops(lambda: elbo(ours.vae(params), torch.rand(1, *SHAPE), noise).total, backward=True)


def pythae_flops(params: Params) -> float:
    inputs = {"data": torch.rand(1, *SHAPE)}
    return flops(lambda: pythae_model(ours.vae(params))(inputs).loss, backward=True)


def measure(settings: Settings) -> list[Table]:
    params = load_params()
    batch = params.vae.training.batch
    images = batch * (2 if settings.quick else 150)
    contenders = {"rediffuse": rediffuse, "pythae, BaseTrainer": pythae, "plain float32 loop": plain}
    with Workers({name: partial(make, images) for name, make in contenders.items()}) as workers:
        rates, memory = workers.turns(settings.turns), workers.each(peak_mib)
    rows = []
    for name, each in rates.items():
        work = (pythae_flops if contenders[name] is pythae else our_flops)(params)
        rows.append([name, median(each), ratio(rates["rediffuse"], each), work / 1e6, memory[name]])
    note = f"{images:,} images of noise a turn, batch {batch}; medians of {settings.turns} turns"
    columns = ["by", "images/s", RATIO, "MFLOP/image", "peak MiB"]
    return [Table("Training the VAE, whole steps", columns, rows, note)]
