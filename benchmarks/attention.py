"""Self-attention written out against scaled_dot_product_attention, forward and backward, at the sizes of the default denoiser.

    python benchmarks/attention.py      # prints medians in turn (A B A B ...) and their ratio

The reason why `rediffuse.diffusion.unet.SelfAttention` writes it out.  Times depend on the machine and its load; the ratio is
what counts.
"""

import statistics
import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rediffuse.training.hardware import computes_bfloat16

BATCH, POSITIONS, HEADS, DIMENSION = 64, 49, 2, 64
TURNS = 15


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in SelfAttention.forward."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def seconds(attention, qkv: Tensor) -> float:
    begin = time.perf_counter()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (BATCH, HEADS, POSITIONS, DIMENSION), strided as in the network
    attention(q, k, v).sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    dtype = torch.bfloat16 if computes_bfloat16(torch.device("cpu")) else torch.float32
    qkv = torch.randn(BATCH, POSITIONS, 3, HEADS, DIMENSION, dtype=dtype, requires_grad=True)
    contenders = {"written out": written_out, "scaled_dot_product_attention": scaled_dot_product_attention}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(TURNS + 2):
        for name, attention in contenders.items():
            spent = seconds(attention, qkv)
            if turn >= 2:  # the first turns warm up
                times[name].append(spent)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}, {torch.backends.cpu.get_cpu_capability()}")
    for name, median in medians.items():
        print(f"{name:30s} {1000 * median:7.2f} ms  {median / medians['written out']:5.2f} x")


if __name__ == "__main__":
    main()
