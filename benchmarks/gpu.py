"""Training on a GPU: images a second at equal FLOPs, for the network of the recipe fashion-mnist-gpu.

Steps and peers are those of the part `training`; the peers' `best` is also compiled by torch, as ours is.
Images are on the GPU already, and on CUDA `best` keeps the packages' own attention (torch's fused kernels).
Memory: the highest that torch has allocated on the GPU.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from benchmarks import machine, ours, peers
from benchmarks.report import Settings, Table
from benchmarks.training import PEAK, STEPS, our_work, peer_work, throughput
from benchmarks.workers import Factory, Workers
from rediffuse.params import Params, load_params
from rediffuse.runtime.errors import UserError

RECIPE = Path(__file__).resolve().parents[1] / "recipes/fashion-mnist-gpu.yaml"


def measure(settings: Settings) -> list[Table]:
    if not torch.cuda.is_available() and not settings.quick:
        raise UserError("it needs a GPU; --quick runs its code on a CPU")
    quick, steps, params = settings.quick, 2 if settings.quick else STEPS, parameters(settings.quick)
    work, batch = our_work(params), params.ddpm.training.batch
    variants = {"rediffuse": {}, "rediffuse, not compiled": {"compile": "never"}}
    variants |= {"rediffuse, float32": {"precision": "float32"}}
    contenders: dict[str, Factory] = {PEAK: partial(machine.peak_turn, quick)}
    for name, changes in variants.items():
        contenders[name] = partial(ours.training_turn, steps, params.model_copy(update=changes))
    works = dict.fromkeys(variants, work)
    for name, recipe in peers.recipes(work.forward, batch, 1_000_000).items():
        contenders[name], works[name] = partial(peers.training_turn, recipe, steps), peer_work(recipe)
        if recipe.setting == "best":
            compiled = f"{name}, compiled"
            contenders[compiled] = partial(peers.training_turn, recipe, steps, compiled=not quick)
            works[compiled] = works[name]
    with Workers(contenders) as workers:
        rates, memory = workers.turns(settings.turns), workers.each(gpu_mib)
    return [throughput(f"Training on a GPU, {steps} whole steps a turn, batch {batch}", rates, memory, works)]


def parameters(quick: bool) -> Params:
    """Return those of the recipe; quick: a small network that is not compiled."""
    params = load_params(RECIPE)
    if not quick:
        return params
    small = {"width": 32, "training": params.ddpm.training.model_copy(update={"batch": 8})}
    return params.model_copy(update={"ddpm": params.ddpm.model_copy(update=small), "compile": "never"})


def gpu_mib() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
