"""This project's denoiser as a contender: what params.yaml of the checkout says, through the doors that the stages use."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.peers import SHAPE, random_images
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.diffusion.step import DenoisingStep
from rediffuse.params import Params, load_params
from rediffuse.runtime.device import autocast, device, make_deterministic
from rediffuse.runtime.shards import draw
from rediffuse.sampling.ddpm import ddpm_shards
from rediffuse.sources.fashion_mnist import CLASSES
from rediffuse.training.checkpoint import Checkpoint
from rediffuse.training.loop import Trainer
from stages.train_ddpm import make_denoiser

# About 0.8 GFLOP an image in training.  The default has half of that, at which the documented structures of the peers would be 8 features
# wide, and slow for that reason alone.
LARGE = {"fold": 2, "width": 48, "multipliers": [2, 2], "blocks": 1, "attention": 0}  # twice the features at the first resolution
LOGS = 5  # steps between two readings of the clock


def parameters(precision: str = "auto", *, large: bool = False) -> Params:
    """Those of the checkout, in this precision; large: with a network of the size that the peers can be made in."""
    params = load_params()
    return params.model_copy(update={"precision": precision, "ddpm": params.ddpm.model_copy(update=LARGE if large else {})})


def denoiser(params: Params, shape: tuple[int, int, int] = SHAPE) -> Denoiser:
    """As the stage train_ddpm makes it, with random weights, for images (C, H, W)."""
    torch.manual_seed(params.seed)
    return make_denoiser(params.ddpm, shape, CLASSES)


def network_inputs(model: Denoiser, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_t, t and labels of a batch."""
    labels = torch.arange(batch) % model.classes if model.classes else None
    return torch.randn(batch, *SHAPE), torch.arange(batch) % model.schedule.T + 1, labels


def trainer(
    params: Params,
    images: Tensor,
    labels: Tensor | None,
    *,
    seen: int,
    log: Callable[[int, dict[str, float]], None],
    log_every: int,
    save_every: int | None = None,
) -> Trainer[Denoiser]:
    """As in the stage, for `seen` images; it validates nothing, and saves a checkpoint at the end, and before if asked to."""
    config = params.ddpm.training.model_copy(
        update={"images": seen, "log_every": log_every, "lr_warmup": min(params.ddpm.training.lr_warmup, seen // 10)}
        | {"validate_every": seen, "checkpoint_every": save_every or seen}
    )
    make_deterministic()
    return Trainer(
        denoiser(params, (images.shape[1], images.shape[2], images.shape[3])),
        DenoisingStep(**params.ddpm.select(DenoisingStep)),
        (images.to(device()), None if labels is None else labels.to(device())),
        (images[:0], None),
        config,
        name="ddpm",
        seed=params.seed,
        precision=params.precision,
        compile=params.compile,
        validate=lambda *_: {},
        log=log,
    )


def training_turn(steps: int, precision: str = "auto", *, large: bool = False, params: Params | None = None) -> Callable[[], float]:
    """A turn of `steps` whole steps of the trainer: the seconds from its first log to its last, so that set-up is not counted.

    params: in the place of those of the checkout.
    """
    params, (images, labels) = params or parameters(precision, large=large), random_images()
    batch, logs = params.ddpm.training.batch, min(LOGS, steps)

    def turn() -> float:
        times: list[float] = []
        seen = batch * logs * (1 + steps // logs)
        with TemporaryDirectory() as folder:
            run = trainer(params, images, labels, seen=seen, log=lambda *_: times.append(time.perf_counter()), log_every=batch * logs)
            run.train(Checkpoint(Path(folder, "checkpoint.pt")))
        measured = times[: 1 + steps // logs]  # what comes later is the log of the validation
        return batch * logs * (len(measured) - 1) / (measured[-1] - measured[0])

    return turn


def network_turn(steps: int) -> Callable[[], float]:
    """A turn of forward and backward alone, on inputs that are ready."""
    params = parameters()
    make_deterministic()
    model = denoiser(params).to(device()).to(memory_format=torch.channels_last).train()
    inputs = network_inputs(model, params.ddpm.training.batch)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(device(), params.precision):
            output = model(*(part if part is None else part.to(device()) for part in inputs))
        mse_loss(output, torch.zeros_like(output)).backward()

    step()

    def turn() -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        return steps * params.ddpm.training.batch / (time.perf_counter() - begin)

    return turn


def sampling_turn(n: int, evaluations: int, precision: str = "auto", *, large: bool = False) -> Callable[[], float]:
    """A turn that draws n images as the stage sample_ddpm does, with this many evaluations of the network for each."""
    params = parameters(precision, large=large)
    make_deterministic()
    model = denoiser(params).to(device()).to(memory_format=torch.channels_last).eval()
    settings = params.sample.ddpm.model_copy(update={"steps": evaluations, "guidance_scale": 1.0})
    if settings.sampler == "heun":  # evaluates twice in a step
        settings = settings.model_copy(update={"sampler": "dpm-solver++"})

    def turn() -> float:
        begin = time.perf_counter()
        draw_images(model, params.model_copy(update={"sample": params.sample.model_copy(update={"ddpm": settings})}), n)
        return n / (time.perf_counter() - begin)

    return turn


def draw_images(model: nn.Module, params: Params, n: int) -> Tensor:
    """uint8 (n, C, H, W), labels in turn, by the settings of sample.ddpm."""
    assert isinstance(model, Denoiser)
    with torch.inference_mode():
        return draw(n, ddpm_shards(model, params.sample.ddpm, params.precision), seed=params.sample.seeds[0], title="ours")
