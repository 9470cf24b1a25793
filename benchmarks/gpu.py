"""Training on a GPU: images a second at equal FLOPs, for the network of the recipe fashion-mnist-gpu.

A step is what the part `training` says, and so are the peers, each in both settings; their `best` also compiled by torch, as ours is.
Their images lie on the GPU already, and on CUDA `best` keeps the packages' own attention (torch's fused kernels).  A turn ends when the
GPU has done its work.  Memory: what torch has allocated on the GPU at most, weights, optimizer and activations.
"""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import conv2d

from benchmarks import ours, peers, training
from benchmarks.report import RATIO, Cell, Settings, Table
from benchmarks.workers import Factory, Result, Turn, Workers, ratio, spread
from rediffuse.params import Params, load_params
from rediffuse.runtime.errors import UserError

RECIPE = Path(__file__).resolve().parents[1] / "recipes/fashion-mnist-gpu.yaml"
STEPS, STEPS_QUICK = 20, 2  # in a turn
BATCH_QUICK = 8
SMALL = {"width": 32}  # the network of a quick run
OURS, EAGER, FLOAT32, PEAK = "rediffuse", "rediffuse, not compiled", "rediffuse, float32", "convolution peak"


def measure(settings: Settings) -> list[Table]:
    if not torch.cuda.is_available() and not settings.quick:
        raise UserError("it needs a GPU; --quick runs its code on a CPU")
    quick = settings.quick
    params, steps = parameters(quick), STEPS_QUICK if quick else STEPS
    flops = training.work_of_params(params)
    recipes = peers.recipes(flops["forward"], params.ddpm.training.batch, steps=1_000_000)
    contenders: dict[str, Factory] = {
        PEAK: functools.partial(peak_turn, quick),
        OURS: functools.partial(our_turn, quick, steps, {}),
        EAGER: functools.partial(our_turn, quick, steps, {"compile": "never"}),
        FLOAT32: functools.partial(our_turn, quick, steps, {"precision": "float32"}),
    }
    for name, recipe in recipes.items():
        contenders[name] = functools.partial(peer_turn, recipe, steps, compiled=False)
        if recipe.setting == "best":
            contenders[f"{name}, compiled"] = functools.partial(peer_turn, recipe, steps, compiled=not quick)
    with Workers(contenders) as workers:
        turns = cast("dict[str, list[dict[str, float]]]", workers.turns(settings.turns))
    of_all = dict.fromkeys((OURS, EAGER, FLOAT32), flops) | {name: training.work_of(recipe) for name, recipe in recipes.items()}
    return [table(turns, of_all, params.ddpm.training.batch)]


def parameters(quick: bool) -> Params:
    params = load_params(RECIPE)
    if not quick:
        return params
    smaller = SMALL | {"training": params.ddpm.training.model_copy(update={"batch": BATCH_QUICK})}
    return params.model_copy(update={"ddpm": params.ddpm.model_copy(update=smaller), "compile": "never"})


def table(turns: dict[str, list[dict[str, float]]], flops: dict[str, dict[str, Any]], batch: int) -> Table:
    """turns: of each contender, images/s (of PEAK: GFLOP/s) and MiB.  flops: of each network, as `training.work_of`."""
    rates = {name: [turn["rate"] for turn in each] for name, each in turns.items()}
    flops = {name: flops[name.removesuffix(", compiled")] for name in rates if name != PEAK}
    speed = {name: [rate * flops[name]["training"] / 1e9 for rate in rates[name]] for name in flops}  # GFLOP/s
    rows: list[list[Cell]] = [
        [
            name,
            flops[name]["parameters"] / 1e6,
            flops[name]["training"] / 1e9,
            statistics.median(rates[name]),
            f"{spread(rates[name]):.0%}",
            statistics.median(speed[name]) / 1000,
            f"{1 / ratio(rates[PEAK], speed[name]):.0%}",
            max(turn["mib"] for turn in turns[name]),
            ratio(speed[OURS], speed[name]),
        ]
        for name in flops
    ]
    columns = [
        "contender",
        "million parameters",
        "GFLOP/image, forward and backward",
        "images/s",
        "spread",
        "TFLOP/s",
        "of the conv peak",
        "MiB",
        RATIO,
    ]
    peak = statistics.median(rates[PEAK]) / 1000
    note = (
        f"Median of {len(rates[OURS])} turns with batch {batch}; spread: (max - min) / median.  Ratio: TFLOP/s of ours"
        f" to those of the same round.  Peak: a 3x3 convolution of 256 channels at 28x28 in {peers.best_precision()}, {peak:.0f} TFLOP/s."
    )
    return Table("Training on a GPU, whole steps at equal FLOPs", columns, rows, note)


def our_turn(quick: bool, steps: int, changes: dict[str, Any]) -> Turn:
    turn = ours.training_turn(steps, params=parameters(quick).model_copy(update=changes if not quick else {}))
    return lambda: with_memory(turn())


def peer_turn(recipe: peers.Recipe, steps: int, *, compiled: bool) -> Turn:
    turn = peers.training_turn(recipe, steps, compiled=compiled)
    return lambda: with_memory(turn())


def with_memory(rate: float) -> Result:
    return {"rate": rate, "mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0}


def peak_turn(quick: bool) -> Turn:
    """GFLOP/s of one convolution, by the fastest algorithm that cuDNN finds."""
    torch.backends.cudnn.benchmark = True
    on, batch, channels, side, times = peers.device(), 2 if quick else 512, 256, 28, 2 if quick else 50
    dtype = torch.bfloat16 if peers.best_precision() == "bfloat16" else torch.float32
    x = torch.randn(batch, channels, side, side, device=on).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=on).to(dtype).to(memory_format=torch.channels_last)

    def turn() -> Result:
        with torch.inference_mode():
            conv2d(x, weight, padding=1)
            peers.wait()
            begin = time.perf_counter()
            for _ in range(times):
                conv2d(x, weight, padding=1)
            peers.wait()
        return with_memory(times * 2 * 9 * batch * channels**2 * side**2 / 1e9 / (time.perf_counter() - begin))

    return turn
