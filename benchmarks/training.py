"""Whole training steps: images a second at equal FLOPs, what share of the machine's peak that is, and what the step adds to the network.

A step is all that is done for a batch: data, noise, forward, backward, clipping, optimizer, average of the weights, logging.
Contenders are those of benchmarks/peers.py in both settings, and ours in a size of their FLOPs (`ours.LARGE`), in bfloat16 and in float32,
all with our batch; and ours as params.yaml has it, which is smaller.  Ratios are per FLOP.  The
convolution peak is a contender too, so that it is measured in the same minutes.  Validation, checkpoints and the MLflow row are not in it
(see the parts `startup` and `growth`).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import Any, cast

import torch

from benchmarks import machine, ours, peers
from benchmarks.report import RATIO, Cell, Settings, Table
from benchmarks.workers import Factory, Turn, Workers, ratio, spread
from rediffuse.params import Params

TITLE = "Training, whole steps at equal FLOPs"
DEFAULT = "rediffuse, params.yaml"
OURS, OURS_FLOAT32 = "rediffuse, FLOPs of the peers", "the same in float32"
NETWORK, PEAK = "forward and backward alone", "convolution peak"
STEPS = 20  # in a turn


def measure(settings: Settings) -> list[Table]:
    steps = 2 if settings.quick else STEPS
    recipes = peers.recipes(our_flops(large=True), our_batch(), steps=1_000_000)
    contenders: dict[str, Factory] = {
        PEAK: functools.partial(peak_turn, settings.quick),
        OURS: functools.partial(ours.training_turn, steps, large=True),
        DEFAULT: functools.partial(ours.training_turn, steps),
        NETWORK: functools.partial(ours.network_turn, steps),
        OURS_FLOAT32: functools.partial(ours.training_turn, steps, "float32", large=True),
        **{name: functools.partial(peers.training_turn, recipe, steps) for name, recipe in recipes.items()},
    }
    with Workers(contenders) as workers:
        rates = cast("dict[str, list[float]]", workers.turns(settings.turns))
        peaks = workers.peaks()
    large = work_of_ours(large=True)
    work = {OURS: large, DEFAULT: work_of_ours(), OURS_FLOAT32: large, **{name: work_of(recipe) for name, recipe in recipes.items()}}
    return [_throughput(rates, peaks, work, steps), _overhead(rates)]


def our_batch() -> int:
    return ours.parameters().ddpm.training.batch


def our_flops(*, large: bool = False) -> float:
    """Of a forward pass of our denoiser, for one image."""
    return work_of_ours(large=large)["forward"]


@functools.cache
def work_of_ours(*, large: bool = False) -> dict[str, Any]:
    """FLOPs for one image: `forward`, and `training`, forward and backward; and what the network is.  large: `ours.LARGE`."""
    return work_of_params(ours.parameters(large=large))


def work_of_params(params: Params) -> dict[str, Any]:
    """The same of the denoiser that these parameters describe."""
    model = ours.denoiser(params)
    inputs = ours.network_inputs(model, 2)
    return {
        "forward": peers.forward_flops(lambda: model(*inputs), 2),
        "training": peers.training_flops(lambda: model(*inputs), 2),
        "network": f"width {params.ddpm.width} x {tuple(params.ddpm.multipliers)}, fold {params.ddpm.fold}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


@functools.cache
def work_of(recipe: peers.Recipe) -> dict[str, Any]:
    """The same of a peer."""
    unet, side = recipe.unet(), recipe.structure.side
    inputs = torch.zeros(2, 1, side, side), torch.ones(2, dtype=torch.int64)

    def call() -> torch.Tensor:
        output: Any = unet(*inputs)
        return cast("torch.Tensor", getattr(output, "sample", output))

    return {
        "forward": peers.forward_flops(call, 2),
        "training": peers.training_flops(call, 2),
        "network": f"width {recipe.width} x {recipe.structure.multipliers}, {side}x{side}",
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
    }


def peak_turn(quick: bool) -> Turn:
    dtype = torch.bfloat16 if peers.best_precision() == "bfloat16" else torch.float32
    return lambda: machine.conv_peak(dtype, quick=quick)[0]


def _throughput(rates: Mapping[str, list[float]], peaks: Mapping[str, float], work: Mapping[str, dict[str, Any]], steps: int) -> Table:
    speed = {name: [rate * work[name]["training"] / 1e9 for rate in rates[name]] for name in work}  # GFLOP/s
    rows: list[list[Cell]] = [
        [
            name,
            work[name]["network"],
            work[name]["parameters"] / 1e6,
            work[name]["forward"] / 1e9,
            work[name]["training"] / 1e9,
            statistics.median(rates[name]),
            f"{spread(rates[name]):.0%}",
            statistics.median(speed[name]),
            f"{1 / ratio(rates[PEAK], speed[name]):.0%}",
            peaks[name],
            ratio(speed[OURS], speed[name]),
        ]
        for name in work
    ]
    columns = ["contender", "network", "million parameters", "GFLOP/image, forward", "and backward", "images/s", "spread", "GFLOP/s"]
    note = (
        f"Median of {len(rates[OURS])} turns of {steps} steps with batch {our_batch()}; spread: (max - min) / median.  Ratio: GFLOP/s of"
        f" ours to those of the same round.  Share of the {peers.best_precision()} convolution peak of the same rounds,"
        f" {statistics.median(rates[PEAK]):.0f} GFLOP/s (spread {spread(rates[PEAK]):.0%}).  Peak memory: of the whole process."
    )
    return Table(TITLE, [*columns, "of the conv peak", "peak MiB", RATIO], rows, note)


def _overhead(rates: Mapping[str, list[float]]) -> Table:
    outside = [1 - step / alone for step, alone in zip(rates[DEFAULT], rates[NETWORK], strict=True)]
    rows: list[list[Cell]] = [
        ["whole step, images/s", statistics.median(rates[DEFAULT])],
        ["forward and backward alone, images/s", statistics.median(rates[NETWORK])],
        ["share of the step outside them", f"{statistics.median(outside):.1%}"],
    ]
    note = "Turns of the two alternate; the share is the median over rounds, " + ", ".join(f"{share:.1%}" for share in outside) + "."
    return Table("What a training step of ours is besides forward and backward", ["what", "measured"], rows, note)
