"""Where the arithmetic runs, and in which precision; chosen at run time."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import torch

Precision = Literal["auto", "float32"]


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_bfloat16(on: torch.device) -> bool:
    """Whether the hardware itself computes in bfloat16: AVX512-BF16 or AMX on a CPU, Ampere and later on CUDA.

    Elsewhere PyTorch emulates it, more slowly than float32.
    """
    if on.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(on: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which networks are evaluated: bfloat16 where `auto` finds it in hardware, else plain float32."""
    return torch.autocast(on.type, dtype=torch.bfloat16, enabled=precision == "auto" and computes_bfloat16(on))


def make_deterministic() -> None:
    """Same inputs, same bytes, on the same machine class; an operation that cannot promise it raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it some products of matrices are refused on CUDA
    # What torch.use_deterministic_algorithms(True) sets; that also imports the compiler, which takes 3 s and is not used here.
    torch.set_deterministic_debug_mode("error")
    # Nothing here reads memory that nothing wrote; filling it in advance, on by default in this mode, takes 4 % of a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def seed_for(*parts: int) -> int:
    """One 63-bit seed from several small integers, such as (seed, purpose, shard); different parts give independent streams."""
    # With the count in front, because numpy takes (seed,) and (seed, 0) for the same.
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)
