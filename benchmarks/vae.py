"""Whole training steps of the VAE: ours, pythae's, and a plain float32 loop, with the same layers and the same batch.

- rediffuse: `Trainer` with `VAEStep`, as the stage train_vae: data, noise, forward, backward, clipping, AdamW,
  average of the weights, logging.
- pythae: its `VAE` with our encoder and decoder as the custom architectures that its documentation shows, its `BaseTrainer` (Adam, its
  own DataLoader), one `train_step`, which is an epoch, without the saving of checkpoints that `train()` does around it.  On a CPU it
  has no switch that makes it faster: its mixed precision is for CUDA and is ignored with a Bernoulli likelihood.
- plain float32: our model and loss in a loop as one writes it: Adam, a permutation of images that are float32 already; no autocast, no
  channels_last, no clipping, no average.

In turn (A B C A B C ...), each in a process of its own; images/s and ratios are medians over the turns.  FLOPs are torch's count of one
forward and backward pass.  Without pythae that contender is left out, and the note says so.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.made_up import NoCheckpoint, image_set, vae_trainer
from benchmarks.peers import SHAPE, training_flops
from benchmarks.report import RATIO, Settings, Table
from benchmarks.workers import Turn, Workers, ratio
from rediffuse.images.pixels import to_unit
from rediffuse.params import Params, load_params
from rediffuse.runtime.device import device, make_deterministic
from rediffuse.vae.model import VAE
from rediffuse.vae.objective import elbo
from stages.train_vae import make_vae as vae_of_stage

OURS = "rediffuse"
WARMUP = 10  # batches
LEFT_OUT = "pythae is not installed (pip install pythae): left out"


def make_vae(params: Params) -> VAE:
    """The VAE of params.yaml; the same weights for every contender."""
    torch.manual_seed(params.seed)
    return vae_of_stage(params.vae, SHAPE)


def rediffuse(images: int) -> Turn:
    """The Trainer, from its construction on; the construction is not timed."""
    params = load_params()
    make_deterministic()
    data = torch.from_numpy(image_set(images).images).to(device())
    vae_trainer(params, make_vae(params), data, WARMUP * params.vae.training.batch).train(NoCheckpoint())

    def turn() -> float:
        trainer = vae_trainer(params, make_vae(params), data, images)
        return _rate(lambda: trainer.train(NoCheckpoint()), trainer.steps * params.vae.training.batch)

    return turn


def plain(images: int) -> Turn:
    """A loop as one writes it."""
    params = load_params()
    batch, data = params.vae.training.batch, to_unit(torch.from_numpy(image_set(images).images)).to(device())
    vae = make_vae(params).to(device())
    optimizer = torch.optim.Adam(vae.parameters(), lr=params.vae.training.lr)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss = elbo(vae, x, torch.randn(len(x), vae.latent_dim, device=device())).total.mean()
        loss.backward()
        optimizer.step()

    def epoch(of: Tensor) -> None:
        for indices in torch.randperm(len(of)).split(batch):
            step(of[indices])

    epoch(data[: WARMUP * batch])
    return lambda: _rate(lambda: epoch(data), len(data))


def pythae_model(vae: VAE) -> Any:
    """pythae's VAE whose encoder and decoder are the layers of ours."""
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

    reconstruction = {"bernoulli": "bce", "gaussian": "mse"}[vae.likelihood]
    config = models.VAEConfig(input_dim=vae.shape, latent_dim=vae.latent_dim, reconstruction_loss=reconstruction)
    return models.VAE(config, encoder=Encoder(), decoder=Decoder())


def pythae(images: int) -> Turn:
    """pythae's own trainer and loader."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    params = load_params()
    training = params.vae.training
    data = to_unit(torch.from_numpy(image_set(images).images))
    folder = tempfile.TemporaryDirectory()  # removed when the process ends
    config = BaseTrainerConfig(output_dir=folder.name, num_epochs=1, per_device_train_batch_size=training.batch, learning_rate=training.lr)

    def trainer(of: Tensor) -> Any:
        made = BaseTrainer(pythae_model(make_vae(params)), BaseDataset(of, torch.zeros(len(of))), training_config=config)
        made.prepare_training()
        return made

    trainer(data[: WARMUP * training.batch]).train_step(epoch=1)
    timed = trainer(data)

    def turn() -> float:
        assert folder.name  # kept as long as the trainer
        return _rate(lambda: timed.train_step(epoch=1), images)

    return turn


def our_flops(params: Params) -> float:
    """Of forward and backward for one image, in the Trainer and in the plain loop."""
    noise = torch.zeros(1, params.vae.latent_dim)
    return training_flops(lambda: elbo(make_vae(params), torch.rand(1, *SHAPE), noise).total)


def pythae_flops(params: Params) -> float:
    return training_flops(lambda: pythae_model(make_vae(params))({"data": torch.rand(1, *SHAPE)}).loss)


def _rate(work: Callable[[], object], images: int) -> float:
    begin = time.perf_counter()
    work()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - begin)


CONTENDERS: dict[str, Callable[[int], Turn]] = {OURS: rediffuse, "pythae, BaseTrainer": pythae, "plain float32 loop": plain}


def measure(settings: Settings) -> list[Table]:
    params = load_params()
    batch = params.vae.training.batch
    images, turns = (batch * 2, 1) if settings.quick else (batch * 150, settings.turns)
    there = importlib.util.find_spec("pythae") is not None
    contenders = {name: partial(make, images) for name, make in CONTENDERS.items() if there or make is not pythae}
    with Workers(contenders) as workers:
        rates, peaks = workers.turns(turns), workers.peaks()
    flops = {name: (pythae_flops if CONTENDERS[name] is pythae else our_flops)(params) for name in contenders}
    rows = [[name, median(rates[name]), ratio(rates[OURS], rates[name]), flops[name] / 1e6, peaks[name]] for name in contenders]
    note = f"{images:,} images of noise a turn, batch {batch}; median of {turns} turns" + ("" if there else f".  {LEFT_OUT}")
    return [Table("training the VAE, whole steps", ["by", "images/s", RATIO, "MFLOP/image", "peak MiB"], rows, note)]
