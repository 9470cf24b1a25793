"""What limits a training step: each convolution of the default denoiser by itself, on one core, beside forward and backward of the whole.

Every convolution runs alone on its own shape, in the precision and memory layout of training: forward, the gradient of its input and the
gradient of its weights.  What the whole takes beyond their sum is normalisation, activation, sums and the launching of many short
operations; what two cores take beyond half of one core's time is waiting for each other between them.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import ours
from benchmarks.machine import best_seconds, conv_peak
from benchmarks.peers import best_precision
from benchmarks.report import Cell, Settings, Table
from benchmarks.workers import Turn, Workers


@dataclass(frozen=True)
class Convolution:
    """A shape that the denoiser convolves: of the input and of the weight, with stride and padding."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def __str__(self) -> str:
        outputs, inputs, size, _ = self.weight
        stride = f", stride {self.stride[0]}" if self.stride[0] > 1 else ""
        return f"{size}x{size}, {inputs} to {outputs} features, {self.x[2]}x{self.x[3]}{stride}"

    @property
    def gflop(self) -> float:
        """Forward, of the whole batch; each gradient has as many."""
        positions = self.x[0] * (self.x[2] // self.stride[0]) * (self.x[3] // self.stride[1])
        return 2e-9 * positions * self.weight[0] * self.weight[1] * self.weight[2] * self.weight[3]


def convolutions(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None]) -> Counter[Convolution]:
    """Those of a forward pass, and how often each occurs."""
    found = Counter[Convolution]()

    def note(module: Any, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        found[Convolution(tuple(arguments[0].shape), tuple(module.weight.shape), module.stride, module.padding)] += 1

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.inference_mode():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


def seconds(shape: Convolution, dtype: torch.dtype, *, quick: bool) -> tuple[float, float, float]:
    """The best time of forward, of the input's gradient and of the weight's."""
    x, weight = (torch.randn(size).to(dtype).to(memory_format=torch.channels_last) for size in (shape.x, shape.weight))
    bias = torch.zeros(shape.weight[0], dtype=dtype)
    forward = functools.partial(torch.conv2d, x, weight, bias, shape.stride, shape.padding)
    gradient = torch.randn_like(forward())

    def backward(*mask: bool) -> object:
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None, shape.stride, shape.padding, (1, 1), False, (0, 0), 1, [*mask, False]
        )

    calls = forward, functools.partial(backward, True, False), functools.partial(backward, False, True)
    of_forward, of_input, of_weight = (best_seconds(call, quick) for call in calls)
    return of_forward, of_input, of_weight


def measure(settings: Settings) -> list[Table]:
    steps = 2 if settings.quick else 20
    contenders = {
        "alone": functools.partial(_alone, settings.quick),
        "one core": functools.partial(_network, 1, steps),
        "all cores": functools.partial(_network, torch.get_num_threads(), steps),
    }
    with Workers(contenders) as workers:
        turns = cast("dict[str, list[Any]]", workers.turns(settings.turns))
    rates = {name: max(turns[name]) for name in ("one core", "all cores")}
    # The best of each shape over the turns: what the machine can do, beside whatever else it did
    peak = max(found["peak"] for found in turns["alone"])
    batch = ours.parameters().ddpm.training.batch
    rows: list[list[Cell]] = []
    whole, work = [0.0, 0.0, 0.0], 0.0
    for i, (name, count, gflop, _) in enumerate(turns["alone"][0]["shapes"]):
        times = [min(found["shapes"][i][3][part] for found in turns["alone"]) for part in range(3)]
        rows.append([name, count, gflop, *(gflop / each for each in times)])
        whole = [total + count * each for total, each in zip(whole, times, strict=True)]
        work += count * gflop
    rows.append(["all of them", sum(int(row[1] or 0) for row in rows), work, *(work / each for each in whole)])
    note = (
        f"Batch {batch}, {best_precision()}, channels_last, one core, whose convolution peak is {peak:.0f} GFLOP/s; best of"
        f" {settings.turns} turns."
    )
    columns = ["convolution", "times", "GFLOP", "GFLOP/s, forward", "gradient of the input", "of the weights"]
    step = batch / rates["one core"]
    shares: list[list[Cell]] = [
        ["convolutions alone, one core, ms", 1e3 * sum(whole)],
        ["forward and backward of the network, one core, ms", 1e3 * step],
        ["share of the convolutions", f"{sum(whole) / step:.0%}"],
        ["the same if they ran at the peak", f"{3 * work / peak / step:.0%}"],
        [f"{torch.get_num_threads()} threads against 1", rates["all cores"] / rates["one core"]],
    ]
    return [Table("The convolutions of a training step", columns, rows, note), Table("What limits it", ["what", "measured"], shares)]


def _alone(quick: bool) -> Turn:
    torch.set_num_threads(1)
    params = ours.parameters()
    model = ours.denoiser(params)
    shapes = convolutions(model, ours.network_inputs(model, params.ddpm.training.batch))
    dtype = getattr(torch, best_precision())
    return lambda: {
        "peak": conv_peak(dtype, quick=quick)[0],
        "shapes": [(str(shape), count, shape.gflop, seconds(shape, dtype, quick=quick)) for shape, count in shapes.items()],
    }


def _network(threads: int, steps: int) -> Turn:
    torch.set_num_threads(threads)
    return ours.network_turn(steps)
