"""Whole training steps: images a second at equal FLOPs, and the share of the machine's convolution peak.

A step is all that is done for a batch: data, noise, forward, backward, clipping, optimizer, average of the
weights, logging.  Contenders: those of benchmarks/peers.py in both settings; ours in a size of their FLOPs
(`ours.LARGE`), in bfloat16 and float32; ours as in params.yaml, which is smaller.  All have our batch.
Ratios are per FLOP.  The convolution peak is a contender too, so that it is measured in the same minutes.
Validation, checkpoints and the row in MLflow are not included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import machine, ours, peers
from benchmarks.report import RATIO, Cell, Settings, Table, peak_mib
from benchmarks.workers import Factory, Workers, ratio, spread
from rediffuse.params import Params

DEFAULT = "rediffuse, params.yaml"
OURS, OURS_FLOAT32 = "rediffuse, FLOPs of the peers", "the same in float32"
PEAK = "convolution peak"
STEPS = 20  # in a turn


class Work(NamedTuple):
    """A network, and its FLOPs for one image: forward, and in training (forward and backward)."""

    network: str
    parameters: int
    forward: float
    training: float


def work(network: str, model: nn.Module, inputs: tuple[Tensor | None, ...]) -> Work:
    """Count for inputs of a batch of 2."""

    def call() -> Tensor:
        output = model(*inputs)
        return getattr(output, "sample", output)  # diffusers returns a dataclass

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Work(network, parameters, peers.flops(call, 2), peers.flops(call, 2, backward=True))


def our_work(params: Params) -> Work:
    model, ddpm = ours.denoiser(params), params.ddpm
    network = f"width {ddpm.width} x {tuple(ddpm.multipliers)}, fold {ddpm.fold}"
    return work(network, model, ours.network_inputs(model, 2))


def peer_work(recipe: peers.Recipe) -> Work:
    side = recipe.structure.side
    network = f"width {recipe.width} x {recipe.structure.multipliers}, {side}x{side}"
    return work(network, recipe.unet(), (torch.zeros(2, 1, side, side), torch.ones(2, dtype=torch.int64)))


def large(precision: str = "auto") -> Params:
    """Return the parameters with a network of FLOPs that the peers can be made in."""
    return ours.parameters(precision, **ours.LARGE)


def peer_recipes(steps: int = 1_000_000) -> dict[str, peers.Recipe]:
    """Return the peers with the FLOPs of `large` and our batch.  steps: of the learning rate's schedule."""
    return peers.recipes(our_work(large()).forward, large().ddpm.training.batch, steps)


def variants() -> dict[str, Params]:
    return {OURS: large(), DEFAULT: ours.parameters(), OURS_FLOAT32: large("float32")}


def measure(settings: Settings) -> list[Table]:
    return [compare("Training", variants(), peer_recipes(), settings, peak_mib)]


def compare(
    title: str,
    variants: Mapping[str, Params],
    recipes: Mapping[str, peers.Recipe],
    settings: Settings,
    memory: Callable[[], float],
) -> Table:
    """Compare ours with the peers, and with the convolution peak.  memory: MiB of a process."""
    steps = 2 if settings.quick else STEPS
    contenders: dict[str, Factory] = {PEAK: partial(machine.peak_turn, settings.quick)}
    contenders |= {name: partial(ours.training_turn, steps, params) for name, params in variants.items()}
    contenders |= {name: partial(peers.training_turn, recipe, steps) for name, recipe in recipes.items()}
    with Workers(contenders) as workers:
        rates, peaks = workers.turns(settings.turns), workers.each(memory)
    works = {name: our_work(params) for name, params in variants.items()}
    works |= {name: peer_work(recipe) for name, recipe in recipes.items()}
    batch = next(iter(variants.values())).ddpm.training.batch
    return throughput(f"{title}, turns of {steps} whole steps, batch {batch}", rates, peaks, works)


def throughput(
    title: str, rates: Mapping[str, list[float]], memory: Mapping[str, float], works: Mapping[str, Work]
) -> Table:
    """Compare GFLOP/s with the first's.  rates: images/s of each turn, of PEAK: GFLOP/s; memory: MiB."""
    speed = {name: [rate * work.training / 1e9 for rate in rates[name]] for name, work in works.items()}
    first, rows = next(iter(works)), list[list[Cell]]()
    for name, (network, parameters, forward, training) in works.items():
        row = [name, network, parameters / 1e6, forward / 1e9, training / 1e9, median(rates[name])]
        row += [spread(rates[name]), median(speed[name]), f"{1 / ratio(rates[PEAK], speed[name]):.0%}"]
        rows.append([*row, memory[name], ratio(speed[first], speed[name])])
    columns = ["contender", "network", "million parameters", "GFLOP/image, forward", "and backward"]
    columns += ["images/s", "spread", "GFLOP/s", "of the conv peak", "peak MiB", RATIO]
    note = (
        f"Medians of {len(rates[PEAK])} turns; spread: (max - min) / median.  Ratio: GFLOP/s of {first}"
        f" to these, by round.  The peak, {machine.best_precision()}: {median(rates[PEAK]):,.0f} GFLOP/s."
    )
    return Table(title, columns, rows, note)
