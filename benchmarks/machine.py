"""The convolution peak of this machine, which throughput is compared with.

3x3 convolutions, forward only, channels_last.  CPU: 64 to 256 channels, 7x7 to 28x28, batch 64; the best
shape counts.  GPU: 256 channels, 28x28, batch 512, by the fastest algorithm that cuDNN finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product

import torch
from torch.utils.benchmark import Timer

from rediffuse.runtime.device import computes_bfloat16, device

CONVOLUTION = "torch.nn.functional.conv2d(x, weight, padding=1)"


def best_precision() -> str:
    return "bfloat16" if computes_bfloat16(device()) else "float32"


def peak_turn(quick: bool) -> Callable[[], float]:
    """Return a turn that gives the GFLOP/s of the best convolution, in bfloat16 if the hardware has it."""
    on, dtype, seconds = device(), getattr(torch, best_precision()), 0.01 if quick else 0.5
    shapes = [(512, 256, 28)] if on.type == "cuda" else list(product([64], [64, 128, 256], [7, 14, 28]))
    torch.backends.cudnn.benchmark = True

    def gflops(batch: int, channels: int, side: int) -> float:
        x, weight = torch.randn(batch, channels, side, side), torch.randn(channels, channels, 3, 3)
        tensors = {"x": x, "weight": weight}
        tensors = {k: v.to(on, dtype, memory_format=torch.channels_last) for k, v in tensors.items()}
        timer = Timer(CONVOLUTION, globals=tensors, num_threads=torch.get_num_threads())
        times = timer.blocked_autorange(min_run_time=seconds).times
        return 2 * 9 * batch * channels**2 * side**2 / min(times) / 1e9

    return lambda: max(gflops(*shape) for shape in shapes[: 1 if quick else None])


def timed(work: Callable[[], object], images: int) -> Callable[[], float]:
    """Return a turn that does the work, which handles so many images, and gives images a second."""

    def turn() -> float:
        begin = time.perf_counter()
        work()
        wait()
        return images / (time.perf_counter() - begin)

    return turn


def wait() -> None:
    """Wait until a GPU, if there is one, has done its work."""
    if device().type == "cuda":
        torch.cuda.synchronize()
