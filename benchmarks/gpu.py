"""Training on a GPU: images a second at equal FLOPs, for the network of the recipe fashion-mnist-gpu.

Steps and peers are those of the part `training`; the peers' `best` is also compiled by torch, as ours is.
Images are on the GPU already, and on CUDA `best` keeps the packages' own attention (torch's fused kernels).
Memory: the highest that torch has allocated on the GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import ours, peers, training
from benchmarks.report import Settings, Table
from rediffuse.params import Params, load_params
from rediffuse.runtime.errors import UserError

RECIPE = Path(__file__).resolve().parents[1] / "recipes/fashion-mnist-gpu.yaml"


def measure(settings: Settings) -> list[Table]:
    if not torch.cuda.is_available() and not settings.quick:
        raise UserError("it needs a GPU; --quick runs its code on a CPU")
    params = parameters(settings.quick)
    variants = {
        "rediffuse": params,
        "rediffuse, not compiled": params.model_copy(update={"compile": "never"}),
        "rediffuse, float32": params.model_copy(update={"precision": "float32"}),
    }
    recipes = peers.recipes(training.our_work(params).forward, params.ddpm.training.batch, steps=1_000_000)
    best = {name: recipe for name, recipe in recipes.items() if recipe.setting == "best"}
    if not settings.quick:
        recipes |= {f"{name}, compiled": replace(recipe, compiled=True) for name, recipe in best.items()}
    return [training.compare("Training on a GPU", variants, recipes, settings, gpu_mib)]


def parameters(quick: bool) -> Params:
    """Return those of the recipe; quick: a small network that is not compiled."""
    params = load_params(RECIPE)
    if not quick:
        return params
    small = ours.LARGE | {"training": params.ddpm.training.model_copy(update={"batch": 8})}
    return params.model_copy(update={"ddpm": params.ddpm.model_copy(update=small), "compile": "never"})


def gpu_mib() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
