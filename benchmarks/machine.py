"""What this machine can do at most: the marks that the other parts are read against.

Convolutions: 3x3, 64 to 256 channels to as many, 7x7 to 28x28 positions, batch 64, channels_last, forward only, through torch as everything
here; the best shape counts.  Products of matrices: 1024 to 2048 square.  Each figure is the best of several repetitions, because a peak is
what the machine can do, not what it does beside other work.  2 floating-point operations for a multiplication with its addition.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import conv2d

from benchmarks.report import Settings, Table
from rediffuse.runtime.device import computes_bfloat16

BATCH = 64
CHANNELS, SIDES = (64, 128, 256), (7, 14, 28)
SQUARES = 1024, 2048
BYTES = 2**28  # of the copied block: beyond every cache
REPETITIONS = 5
LEAST = 0.1  # seconds of one repetition: the clock and a switch of context are small beside it


@dataclass(frozen=True)
class Peaks:
    """GFLOP/s of convolutions and products of matrices in each type; the shape of the best convolution; GB/s of a copy, read + written."""

    conv: dict[str, float]
    matmul: dict[str, float]
    shape: dict[str, str]
    copy: float


def measure(settings: Settings) -> list[Table]:
    found = peaks(quick=settings.quick)
    rows: list[list[str | float | int | None]] = []
    for dtype in found.conv:
        rows.append([f"convolution 3x3, {dtype}", found.conv[dtype], "GFLOP/s", found.shape[dtype]])
        rows.append([f"product of matrices, {dtype}", found.matmul[dtype], "GFLOP/s", ""])
    rows.append(["copy of memory, read + written", found.copy, "GB/s", ""])
    note = f"Best of {REPETITIONS} repetitions of at least {LEAST} s each."
    if not computes_bfloat16(torch.device("cpu")):
        note += "  This processor has no bfloat16 in hardware: torch emulates it."
    return [Table("Peaks of this machine", ["what", "at most", "unit", "shape"], rows, note)]


@functools.cache
def peaks(*, quick: bool = False) -> Peaks:
    """Measured once in a process."""
    types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    convs = {name: conv_peak(dtype, quick=quick) for name, dtype in types.items()}
    return Peaks(
        conv={name: rate for name, (rate, _) in convs.items()},
        matmul={name: matmul_peak(dtype, quick=quick) for name, dtype in types.items()},
        shape={name: shape for name, (_, shape) in convs.items()},
        copy=_copy_rate(quick=quick),
    )


def conv_peak(dtype: torch.dtype, *, quick: bool = False) -> tuple[float, str]:
    """GFLOP/s of the best convolution, and its shape."""
    rates = {}
    for channels in CHANNELS[:1] if quick else CHANNELS:
        for side in SIDES[:1] if quick else SIDES:
            x = torch.randn(BATCH, channels, side, side).to(dtype).to(memory_format=torch.channels_last)
            weight = torch.randn(channels, channels, 3, 3).to(dtype).to(memory_format=torch.channels_last)
            operations, convolve = 2 * 9 * BATCH * channels**2 * side**2, functools.partial(conv2d, x, weight, padding=1)
            rates[f"{channels} channels, {side}x{side}"] = operations / best_seconds(convolve, quick) / 1e9
    best = max(rates, key=lambda shape: rates[shape])
    return rates[best], best


def matmul_peak(dtype: torch.dtype, *, quick: bool = False) -> float:
    """GFLOP/s of the best product of square matrices."""
    rates = []
    for size in (128,) if quick else SQUARES:
        a, b = torch.randn(2, size, size).to(dtype)
        rates.append(2 * size**3 / best_seconds(functools.partial(torch.mm, a, b), quick) / 1e9)
    return max(rates)


def _copy_rate(*, quick: bool) -> float:
    source = torch.ones(BYTES // 64 if quick else BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * len(source) / best_seconds(functools.partial(target.copy_, source), quick) / 1e9


def best_seconds(call: Callable[[], object], quick: bool) -> float:
    """Of one call, at best: over repetitions of as many calls as take LEAST seconds."""
    with torch.inference_mode():
        call()  # allocations and the choice of a kernel
        calls, best = 1, float("inf")
        for _ in range(2 if quick else REPETITIONS):
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            spent = time.perf_counter() - begin
            best = min(best, spent / calls)
            if spent < LEAST and not quick:
                calls = max(calls, int(1.5 * LEAST / best) + 1)
    return best
