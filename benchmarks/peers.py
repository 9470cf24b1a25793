"""The peers: U-Nets, training steps and samplers of diffusers and of denoising-diffusion-pytorch.

Both packages are sized for photographs; here their networks are made as small as ours.  Equal work means
equal counted FLOPs of a forward pass for an image, within 5 %; backward adds twice as much to all.  The first
of the structures below that has a width with these FLOPs is used; they are in the order of their speed on a
CPU.  Images are padded with black to 32x32 where a network halves them too often for 28x28.

Each peer has two settings:
 * `documented`: float32, contiguous, as in the package's own training script.  diffusers:
   examples/unconditional_image_generation, with --use_ema (AdamW lr 1e-4, betas 0.95 and 0.999, weight decay
   1e-6; gradients clipped at 1; cosine schedule with warm-up; linear noise schedule, T = 1000, predicts eps;
   the loss is read at each step).  denoising-diffusion-pytorch: the Trainer and the numbers of the README
   (Adam lr 8e-5, betas 0.9 and 0.99; clipped at 1; EMA every 10 steps; sigmoid schedule, T = 1000, predicts
   v; flash attention; on CUDA in mixed precision, without which its flash attention does not run there).
 * `best`: the fastest of what its own switches and torch's allow without a change to its code, on a CPU with
   bfloat16: autocast, fused optimizer, EMA by foreach; diffusers contiguous (channels_last is slower there),
   one attention head a block as in google/ddpm-cifar10-32, and AttnProcessor, which writes the attention out;
   denoising-diffusion-pytorch channels_last, with one attention head instead of 4.

In their favour: images are in memory as a tensor (their scripts open a file for each), no accelerate around
the step, and no flips.  The batch is ours: with their documented 16 both are slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, pad

from benchmarks.machine import timed
from rediffuse.images.pixels import from_signed, from_unit, to_signed, to_unit
from rediffuse.runtime.device import autocast, device

Setting = Literal["documented", "best"]
Kind = Literal["diffusers", "denoising-diffusion-pytorch"]

Shape = tuple[int, int, int]
SHAPE: Shape = (1, 28, 28)
TOLERANCE = 0.05  # of the FLOPs
T = 1000
NUMBER = 4096  # random images for measuring speed
WARM = 3  # steps before the clock starts
WIDEST = 160


class Structure(NamedTuple):
    """A U-Net up to its width, which must be a multiple of `multiple`; side: of the images."""

    multipliers: tuple[int, ...]  # the levels in widths
    side: int
    multiple: int


@dataclass(frozen=True)
class Recipe:
    """A peer's network and its training.  steps: of the learning rate's schedule; lr None: documented.

    compiled: the network, by torch.
    """

    kind: Kind
    setting: Setting
    structure: Structure
    width: int
    batch: int
    steps: int
    lr: float | None = None
    compiled: bool = False

    def unet(self) -> nn.Module:
        return KINDS[self.kind].unet(self.structure, self.width, self.setting)

    def context(self) -> AbstractContextManager[object]:
        amp = self.kind == "denoising-diffusion-pytorch" and device().type == "cuda"  # as in its README
        return autocast(device(), "auto" if amp or self.setting == "best" else "float32")


class Diffusers:
    """examples/unconditional_image_generation/train_unconditional.py, step by step."""

    structures = Structure((1, 2, 4, 4), 32, 8), Structure((1, 2, 4, 4), 32, 4)

    @staticmethod
    def unet(structure: Structure, width: int, setting: Setting) -> nn.Module:
        from diffusers import UNet2DModel
        from diffusers.models.attention_processor import AttnProcessor

        levels = len(structure.multipliers)
        unet = UNet2DModel(
            sample_size=structure.side,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=[width * multiplier for multiplier in structure.multipliers],
            down_block_types=["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
            norm_num_groups=structure.multiple,
            attention_head_dim=8 if setting == "documented" else None,  # None: one head
        )
        if setting == "best" and device().type == "cpu":
            for module in unet.modules():
                if hasattr(module, "set_processor"):
                    module.set_processor(AttnProcessor())
        return unet

    def __init__(self, recipe: Recipe) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.recipe, self.side = recipe, recipe.structure.side
        self.model = self.network = recipe.unet().to(device()).train()
        self.noising = DDPMScheduler(num_train_timesteps=T, beta_schedule="linear", prediction_type="epsilon")
        adam = {"betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
        adam |= {"fused": recipe.setting == "best" or None}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr or 1e-4, **adam)
        warmup = min(500, recipe.steps // 10)  # 500 are documented, for a training of many thousand steps
        length = {"num_warmup_steps": warmup, "num_training_steps": recipe.steps}
        self.rate = get_scheduler("cosine", self.optimizer, **length)
        ema = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
        self.average = EMAModel(self.model.parameters(), **ema, foreach=recipe.setting == "best")

    def step(self, images: Tensor) -> float:
        clean = padded(to_signed(images), self.side, -1.0).to(device())
        noise, t = torch.randn_like(clean), torch.randint(0, T, (len(clean),), device=device())
        with self.recipe.context():
            output = self.model(self.noising.add_noise(clean, noise, t), t).sample
            loss = mse_loss(output.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())
        return loss.item()

    def sample(self, n: int, evaluations: int) -> Tensor:
        """Draw with DDIM as DDIMPipeline does, from the training's schedule: x_0 is clipped.

        DPM-Solver++ of diffusers does not clip, and after so short a training leaves one image in ten as
        noise.
        """
        from diffusers import DDIMScheduler

        solver = DDIMScheduler.from_config(self.noising.config)
        self.average.store(self.model.parameters())
        self.average.copy_to(self.model.parameters())
        self.model.eval()

        def draw(batch: int) -> Tensor:
            solver.set_timesteps(evaluations)
            x_t = torch.randn(batch, 1, self.side, self.side, device=device())
            for t in solver.timesteps:
                with self.recipe.context():
                    eps = self.model(x_t, t).sample
                x_t = solver.step(eps.float(), t, x_t).prev_sample
            return from_signed(cropped(x_t))

        with torch.inference_mode():
            images = in_batches(n, self.recipe.batch, draw)
        self.average.restore(self.model.parameters())
        self.model.train()
        return images


class Lucidrains:
    """denoising_diffusion_pytorch.Trainer, step by step."""

    structures = Structure((1, 2, 4), 28, 2), Structure((1, 2, 4), 32, 2)

    @staticmethod
    def unet(structure: Structure, width: int, setting: Setting) -> nn.Module:
        from denoising_diffusion_pytorch import Unet

        heads = 4 if setting == "documented" else 1
        return Unet(width, dim_mults=structure.multipliers, channels=1, attn_heads=heads, flash_attn=True)

    def __init__(self, recipe: Recipe) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion
        from ema_pytorch import EMA

        self.recipe, self.side = recipe, recipe.structure.side
        self.network = recipe.unet()
        diffusion = GaussianDiffusion(self.network, image_size=self.side, timesteps=T, sampling_timesteps=250)
        self.model = diffusion.to(device())
        if recipe.setting == "best":
            self.model.to(memory_format=torch.channels_last)
        adam = {"betas": (0.9, 0.99), "fused": recipe.setting == "best" or None}
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.lr or 8e-5, **adam)
        self.average = EMA(self.model, beta=0.995, update_every=10, use_foreach=recipe.setting == "best")

    def step(self, images: Tensor) -> float:
        clean = padded(to_unit(images), self.side, 0.0).to(device())
        self.model.train()
        with self.recipe.context():
            loss = self.model(clean)
        value = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        return float(value)

    def sample(self, n: int, evaluations: int) -> Tensor:
        """Draw with its DDIM."""
        diffusion: Any = self.average.ema_model
        diffusion.eval()
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = evaluations, True

        def draw(batch: int) -> Tensor:
            with self.recipe.context():
                return from_unit(cropped(diffusion.sample(batch_size=batch).float()))

        return in_batches(n, self.recipe.batch, draw)


KINDS = {"diffusers": Diffusers, "denoising-diffusion-pytorch": Lucidrains}


def contender(recipe: Recipe) -> Diffusers | Lucidrains:
    torch.manual_seed(1)
    peer = KINDS[recipe.kind](recipe)
    if recipe.compiled:
        peer.network.compile(dynamic=False)
    return peer


# Equal work


def flops(call: Callable[[], Tensor], images: int = 1, *, backward: bool = False) -> float:
    """Return the FLOPs for one image, as torch counts them; backward: those of the backward pass as well.

    Attention is written out for it, because torch counts nothing of the CPU's fused kernel.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports the compiler, for seconds: not in a worker

    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(backward), counter, sdpa_kernel(SDPBackend.MATH):
        output = call()
        if backward:
            output.sum().backward()
    return counter.get_total_flops() / images


@cache
def sized(kind: Kind, setting: Setting, target: float) -> tuple[Structure, int]:
    """Return the structure and the width whose forward pass takes `target` FLOPs, within TOLERANCE.

    Raises ValueError if there is none: then a structure for networks of this size must be added above.
    """
    structures, unet = KINDS[kind].structures, KINDS[kind].unet

    def excess(structure: Structure, width: int) -> float:
        network = unet(structure, width, setting).to("meta")  # nothing is computed there
        x = torch.zeros(1, 1, structure.side, structure.side, device="meta")
        t = torch.ones(1, dtype=torch.long, device="meta")
        return flops(lambda: network(x, t)) / target - 1

    for structure in structures:
        off: dict[int, float] = {}
        for width in range(2 * structure.multiple, WIDEST, structure.multiple):
            off[width] = excess(structure, width)
            if off[width] > TOLERANCE:
                break
        width = min(off, key=lambda w: abs(off[w]))
        if abs(off[width]) <= TOLERANCE:
            return structure, width
    raise ValueError(f"{kind} ({setting}): no width of {structures} takes {target:,.0f} FLOPs")


def recipes(target: float, batch: int, steps: int) -> dict[str, Recipe]:
    """Return the recipe of each peer in each setting, by name, with networks of `target` FLOPs.

    Without bfloat16 in hardware, `best` is in float32.
    """
    pairs = product(KINDS, ("documented", "best"))
    return {f"{pair[0]}, {pair[1]}": Recipe(*pair, *sized(*pair, target), batch, steps) for pair in pairs}


# Turns


def training_turn(recipe: Recipe, steps: int) -> Callable[[], float]:
    """Return a turn of `steps` whole steps, which gives images a second."""
    peer, stream = contender(recipe), batches(random_images()[0].to(device()), recipe.batch)

    def work(steps: int) -> None:
        for _ in range(steps):
            peer.step(next(stream))

    work(min(WARM, steps))
    return timed(lambda: work(steps), steps * recipe.batch)


def sampling_turn(recipe: Recipe, n: int, evaluations: int) -> Callable[[], float]:
    """Return a turn that draws n images, which gives images a second."""
    peer = contender(recipe)
    peer.sample(recipe.batch, 1 if recipe.kind == "diffusers" else 2)
    return timed(lambda: peer.sample(n, evaluations), n)


def random_images(n: int = NUMBER, shape: Shape = SHAPE, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return n images of noise, uint8, and labels: speed does not depend on what images show."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    return images, torch.arange(n) % 10


def batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Yield batches without end, shuffled anew in each epoch; an incomplete last batch is left out."""
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(images), generator=generator)
        yield from (images[indices] for indices in order.split(size) if len(indices) == size)


def padded(images: Tensor, side: int, black: float) -> Tensor:
    margin = (side - images.shape[-1]) // 2
    return pad(images, (margin,) * 4, value=black) if margin else images


def cropped(images: Tensor) -> Tensor:
    margin = (images.shape[-1] - SHAPE[-1]) // 2
    return images[..., margin : margin + SHAPE[-1], margin : margin + SHAPE[-1]]


def in_batches(n: int, size: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Return n images on the CPU, drawn `size` at a time."""
    return torch.cat([draw(min(size, n - start)).cpu() for start in range(0, n, size)])
