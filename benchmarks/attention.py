"""Self-attention written out against scaled_dot_product_attention, forward and backward, at 7x7 positions.

The reason why `rediffuse.diffusion.unet.SelfAttention` writes it out on a CPU.  In turn (A B A B ...) in one process, median.  Times
depend on the machine and its load; the ratio is what counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.report import RATIO, Settings, Table
from rediffuse.diffusion.unet import written_out_attention
from rediffuse.runtime.device import computes_bfloat16

BATCH, POSITIONS, HEADS, DIMENSION = 64, 49, 2, 64
TURNS, WARMUP = 15, 2

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


CONTENDERS: dict[str, Attention] = {"written out": written_out_attention, "scaled_dot_product_attention": scaled_dot_product_attention}


def seconds(attention: Attention, qkv: Tensor) -> float:
    """Of forward and backward."""
    begin = time.perf_counter()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (BATCH, HEADS, POSITIONS, DIMENSION), strided as in the network
    attention(q, k, v).sum().backward()
    return time.perf_counter() - begin


def measure(settings: Settings) -> list[Table]:
    dtype = torch.bfloat16 if computes_bfloat16(torch.device("cpu")) else torch.float32
    qkv = torch.randn(BATCH, POSITIONS, 3, HEADS, DIMENSION, dtype=dtype, requires_grad=True)
    turns = 3 if settings.quick else TURNS
    rounds = [{name: seconds(attention, qkv) for name, attention in CONTENDERS.items()} for _ in range(WARMUP + turns)][WARMUP:]
    medians = {name: statistics.median(times[name] for times in rounds) for name in CONTENDERS}
    rows = [[name, 1000 * median, median / medians["written out"]] for name, median in medians.items()]
    note = f"{dtype}, batch {BATCH}, {POSITIONS} positions, {HEADS} heads of {DIMENSION}; median of {turns} turns"
    return [Table("attention at 7x7 positions, forward and backward", ["attention", "ms", RATIO], rows, note)]
