"""What one would take instead: the U-Nets of diffusers and of denoising-diffusion-pytorch, their training steps and their samplers.

Both packages are sized for photographs; here their networks are made as small as ours is.  Equal work is equal counted FLOPs of a forward
pass for an image, within 5 % (backward adds twice as much to all): the width that comes nearest is looked for, in the order of structures
below, which is that of their speed on a CPU.  Images are padded with black to 32x32 where a network halves them too often for 28x28.

Each in two settings:
 * `documented`: float32, contiguous, as the package's own training script has it.  diffusers: examples/unconditional_image_generation,
   with --use_ema (AdamW lr 1e-4, betas 0.95 and 0.999, weight decay 1e-6; gradients clipped at 1; cosine schedule with warm-up; linear
   noise schedule, T = 1000, predicts eps; the loss is read at each step).  denoising-diffusion-pytorch: the Trainer and the numbers of the
   README (Adam lr 8e-5, betas 0.9 and 0.99; clipped at 1; EMA every 10 steps; sigmoid schedule, T = 1000, predicts v; flash attention;
   on CUDA in mixed precision, without which its flash attention does not run there).
 * `best`: the fastest of what its own switches and torch's allow without a change to its code, on a CPU with bfloat16: autocast, fused
   optimizer, EMA by foreach; diffusers contiguous (channels_last is slower there), one attention head a block as in google/ddpm-cifar10-32
   and AttnProcessor, which writes the attention out; denoising-diffusion-pytorch channels_last, with one attention head instead of 4.

In their favour: images are in memory as a tensor already (their scripts open a file for each), no accelerate around the step, and no flips
(a switch of both; with flips, shoes would point the wrong way).  The batch is ours: with their documented 16 both are slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, pad

from rediffuse.images.pixels import from_signed, from_unit, to_signed, to_unit
from rediffuse.runtime.device import autocast, computes_bfloat16, device

Setting = Literal["documented", "best"]
Kind = Literal["diffusers", "denoising-diffusion-pytorch"]

SHAPE = (1, 28, 28)
TOLERANCE = 0.05  # of the FLOPs of ours
T = 1000
NUMBER = 4096  # of random images for measuring speed
WARM = 3  # steps before the clock starts


@dataclass(frozen=True)
class Structure:
    """A U-Net up to its width: levels in widths, residual blocks a level, side of the images, and what its width must be a multiple of."""

    multipliers: tuple[int, ...]
    blocks: int
    side: int
    multiple: int


# The first that can be made within TOLERANCE is taken; in both packages blocks = 2 is documented, and attention at the lowest level.
DIFFUSERS = (
    Structure((1, 2, 4, 4), 2, 32, 8),
    Structure((1, 2, 4), 2, 32, 8),
    Structure((1, 2, 2), 1, 32, 8),
    Structure((1, 2, 4, 4), 2, 32, 4),
    Structure((1, 2, 4), 2, 32, 4),
)
LUCIDRAINS = (Structure((1, 2, 4), 2, 28, 2), Structure((1, 2, 4), 2, 32, 2), Structure((1, 2, 2), 2, 28, 2), Structure((1, 2), 2, 28, 2))
WIDEST = 160


def forward_flops(call: Callable[[], object], images: int = 1) -> float:
    """Floating-point operations for one image, counted by torch.

    Attention is taken apart for it: of the fused kernel of the CPU torch counts nothing.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports the compiler, which takes seconds: not in a worker

    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() / images


def training_flops(call: Callable[[], Tensor], images: int = 1) -> float:
    """Of forward and backward, for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call().sum().backward()
    return counter.get_total_flops() / images


def diffusers_unet(structure: Structure, width: int, setting: Setting) -> nn.Module:
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import AttnProcessor

    levels = len(structure.multipliers)
    unet: nn.Module = UNet2DModel(
        sample_size=structure.side,
        in_channels=1,
        out_channels=1,
        layers_per_block=structure.blocks,
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


def lucidrains_unet(structure: Structure, width: int, setting: Setting) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    unet: nn.Module = Unet(
        width, dim_mults=structure.multipliers, channels=1, attn_heads=4 if setting == "documented" else 1, flash_attn=True
    )
    return unet


UNETS: dict[Kind, tuple[Callable[[Structure, int, Setting], nn.Module], tuple[Structure, ...]]] = {
    "diffusers": (diffusers_unet, DIFFUSERS),
    "denoising-diffusion-pytorch": (lucidrains_unet, LUCIDRAINS),
}


def unet_flops(unet: nn.Module, side: int) -> float:
    """Counted on shapes alone: nothing is computed."""
    unet = unet.to("meta")
    inputs = torch.zeros(1, 1, side, side, device="meta"), torch.ones(1, dtype=torch.int64, device="meta")
    return forward_flops(lambda: unet(*inputs))


@cache
def sized(kind: Kind, setting: Setting, target: float) -> tuple[Structure, int]:
    """The structure and the width whose forward pass takes `target` FLOPs, within TOLERANCE.

    Raises ValueError if there is none: then this project's network is of a size for which a structure must be added above.
    """
    make, structures = UNETS[kind]
    for structure in structures:
        off: dict[int, float] = {}
        for width in range(2 * structure.multiple, WIDEST, structure.multiple):
            off[width] = unet_flops(make(structure, width, setting), structure.side) / target - 1
            if off[width] > TOLERANCE:
                break
        width = min(off, key=lambda w: abs(off[w]))
        if abs(off[width]) <= TOLERANCE:
            return structure, width
    raise ValueError(f"{kind} ({setting}): no width of {structures} takes {target:,.0f} FLOPs within {TOLERANCE:.0%}")


class Contender(Protocol):
    """A peer that trains and draws.  Images are uint8 (B, 1, 28, 28); network: its U-Net."""

    network: nn.Module

    def step(self, images: Tensor) -> float:
        """One whole step of training; returns the loss."""
        ...

    def sample(self, n: int, evaluations: int) -> Tensor:
        """n images, from the averaged weights."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A peer's network and how it is trained.  steps: until the end of the learning rate's schedule; lr None: the documented one."""

    kind: Kind
    setting: Setting
    structure: Structure
    width: int
    batch: int
    steps: int
    lr: float | None = None

    def unet(self) -> nn.Module:
        return UNETS[self.kind][0](self.structure, self.width, self.setting)

    @property
    def context(self) -> AbstractContextManager[object]:
        mixed = self.setting == "best" or (self.kind == "denoising-diffusion-pytorch" and device().type == "cuda")  # its README: amp = True
        return autocast(device(), "auto" if mixed else "float32")

    @property
    def fused(self) -> bool | None:
        return True if self.setting == "best" else None


class Diffusers:
    """examples/unconditional_image_generation/train_unconditional.py, step by step."""

    def __init__(self, recipe: Recipe) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.recipe, self.side = recipe, recipe.structure.side
        self.model = self.network = recipe.unet().to(device()).train()
        self.noising = DDPMScheduler(num_train_timesteps=T, beta_schedule="linear", prediction_type="epsilon")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr or 1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=recipe.fused
        )
        warmup = min(500, recipe.steps // 10)  # 500 are documented, for a training of many thousand steps
        self.rate = get_scheduler("cosine", self.optimizer, num_warmup_steps=warmup, num_training_steps=recipe.steps)
        self.average = EMAModel(
            self.model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=recipe.setting == "best"
        )

    def step(self, images: Tensor) -> float:
        clean = padded(to_signed(images), self.side, -1.0).to(device())
        noise, t = torch.randn_like(clean), torch.randint(0, T, (len(clean),), device=device())
        with self.recipe.context:
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
        """With DDIM, as its DDIMPipeline draws, made from the training's schedule: x_0 is clipped.

        Its DPM-Solver++ does not clip, and after so short a training leaves one image in ten as noise or burnt out.
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
                with self.recipe.context:
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

    def __init__(self, recipe: Recipe) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion
        from ema_pytorch import EMA

        self.recipe, self.side = recipe, recipe.structure.side
        self.network = recipe.unet()
        self.model = GaussianDiffusion(self.network, image_size=self.side, timesteps=T, sampling_timesteps=250).to(device())
        if recipe.setting == "best":
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.lr or 8e-5, betas=(0.9, 0.99), fused=recipe.fused)
        self.average = EMA(self.model, beta=0.995, update_every=10, use_foreach=recipe.setting == "best")

    def step(self, images: Tensor) -> float:
        clean = padded(to_unit(images), self.side, 0.0).to(device())
        self.model.train()
        with self.recipe.context:
            loss = self.model(clean)
        value = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        return float(value)

    def sample(self, n: int, evaluations: int) -> Tensor:
        """With its DDIM."""
        diffusion: Any = self.average.ema_model
        diffusion.eval()
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = evaluations, True

        def draw(batch: int) -> Tensor:
            with self.recipe.context:
                return from_unit(cropped(diffusion.sample(batch_size=batch).float()))

        return in_batches(n, self.recipe.batch, draw)


KINDS: dict[Kind, Callable[[Recipe], Contender]] = {"diffusers": Diffusers, "denoising-diffusion-pytorch": Lucidrains}


def contender(recipe: Recipe) -> Contender:
    torch.manual_seed(1)
    return KINDS[recipe.kind](recipe)


def training_turn(recipe: Recipe, steps: int, *, compiled: bool = False) -> Callable[[], float]:
    """A turn of `steps` whole steps: images a second.  compiled: the network by torch, which changes nothing in it."""
    peer, stream = contender(recipe), batches(random_images()[0].to(device()), recipe.batch)
    if compiled:
        peer.network.compile(dynamic=False)
    for _ in range(min(WARM, steps)):
        peer.step(next(stream))

    def turn() -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            peer.step(next(stream))
        wait()
        return steps * recipe.batch / (time.perf_counter() - begin)

    return turn


def sampling_turn(recipe: Recipe, n: int, evaluations: int) -> Callable[[], float]:
    """A turn that draws n images: images a second."""
    peer = contender(recipe)
    peer.sample(recipe.batch, 1 if recipe.kind == "diffusers" else 2)

    def turn() -> float:
        begin = time.perf_counter()
        peer.sample(n, evaluations)
        return n / (time.perf_counter() - begin)

    return turn


def wait() -> None:
    """Until a GPU, where there is one, has done what it was given."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def random_images() -> tuple[Tensor, Tensor]:
    """Images and labels for measuring speed, which does not hang on what they show."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (NUMBER, *SHAPE), generator=generator, dtype=torch.uint8), torch.arange(NUMBER) % 10


def batches(images: Tensor, size: int, seed: int = 1) -> Iterator[Tensor]:
    """Without end, shuffled anew in each epoch, the incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (images[indices] for indices in torch.randperm(len(images), generator=generator).split(size) if len(indices) == size)


def padded(images: Tensor, side: int, black: float) -> Tensor:
    margin = (side - images.shape[-1]) // 2
    return pad(images, (margin,) * 4, value=black) if margin else images


def cropped(images: Tensor) -> Tensor:
    margin = (images.shape[-1] - SHAPE[-1]) // 2
    return images[..., margin : margin + SHAPE[-1], margin : margin + SHAPE[-1]]


def in_batches(n: int, size: int, draw: Callable[[int], Tensor]) -> Tensor:
    """n images on the CPU, drawn `size` at a time."""
    return torch.cat([draw(min(size, n - start)).cpu() for start in range(0, n, size)])


def recipes(target: float, batch: int, steps: int) -> dict[str, Recipe]:
    """Of each peer in each setting, by name, with networks of `target` FLOPs.  Without bfloat16 in hardware, `best` is in float32."""
    settings: tuple[Setting, ...] = ("documented", "best")
    each = {f"{kind}, {setting}": (kind, setting) for kind, setting in product(KINDS, settings)}
    return {name: Recipe(*pair, *sized(*pair, target), batch, steps) for name, pair in each.items()}


def best_precision() -> str:
    return "bfloat16" if computes_bfloat16(device()) else "float32"
