"""Expected efficiency of data parallelism: a calculation, not a measurement.  `python -m benchmarks.scaling`; see docs/scaling.md.

Ring all-reduce of float32 gradients; backward takes two thirds of a step's arithmetic and hides what is sent meanwhile, except
the last bucket.
"""

from __future__ import annotations

import math

from benchmarks.ours import denoiser, parameters
from benchmarks.training import our_flops

SUSTAINED = 0.4 * 990e12  # FLOP/s of an H100 in bfloat16
OVERHEAD = 1e-3  # seconds a step, assumed, that do not shrink with the batch: launching kernels, optimizer, EMA
NODE, NVLINK, NETWORK = 8, 450e9, 400e9 / 8  # GPUs of a node; bytes/s of each GPU within it, and of the node as a whole to others
BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's own
LATENCY = 5e-6  # seconds, once for each doubling of the number of GPUs and each direction, a bucket

# Parameters, FLOP of a forward pass of one image, images per GPU and step
Model = tuple[float, float, int]
PUBLISHED: dict[str, Model] = {
    "DDPM for CIFAR-10": (35.7e6, 12e9, 128),
    "ADM for 64x64": (296e6, 200e9, 32),
    "ADM for 64x64, larger batch": (296e6, 200e9, 128),
}


def step_seconds(parameters: float, flop: float, batch: int, gpus: int) -> tuple[float, float]:
    """Seconds that a step computes, and seconds that it then waits for gradients."""
    computing = 3 * flop * batch / SUSTAINED
    if gpus == 1:
        return computing + OVERHEAD, 0.0
    size = 4 * parameters
    pieces = max(1.0, size / BUCKET)
    rate = NVLINK if gpus <= NODE else NETWORK
    sending = 2 * (gpus - 1) / gpus * size / rate + pieces * 2 * math.log2(gpus) * LATENCY
    return computing + OVERHEAD, max(sending / pieces, sending - 2 / 3 * computing)


def ours() -> dict[str, Model]:
    """The denoiser of params.yaml, with the batch of its recipe on 8 GPUs, and with a larger one."""
    params = parameters()
    size = float(sum(parameter.numel() for parameter in denoiser(params).parameters()))
    return {"default recipe": (size, our_flops(), params.ddpm.training.batch // NODE), "default model": (size, our_flops(), 128)}


def main() -> None:
    print(f"{'':28} {'images/GPU':>10} {'MB sent':>8} {'ms alone':>8}   " + " ".join(f"{n:>5}" for n in (8, 64, 512)))
    for name, (size, flop, batch) in (ours() | PUBLISHED).items():
        alone, _ = step_seconds(size, flop, batch, 1)
        shares = [alone / sum(step_seconds(size, flop, batch, n)) for n in (8, 64, 512)]
        percent = " ".join(f"{share:5.0%}" for share in shares)
        print(f"{name:28} {batch:10} {8 * size / 1e6:8.0f} {1e3 * alone:8.1f}   {percent}")


if __name__ == "__main__":
    main()
