"""Where the arithmetic runs, and in which precision; chosen at run time."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rediffuse.runtime.errors import UserError

Precision = Literal["auto", "float32"]
Compile = Literal["auto", "always", "never"]


def device() -> torch.device:
    """Return CUDA if there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_bfloat16(on: torch.device) -> bool:
    """Whether the hardware computes in bfloat16: AVX512-BF16 or AMX on a CPU, Ampere and later on CUDA.

    Elsewhere PyTorch emulates it, more slowly than float32.
    """
    if on.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(on: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context for evaluating networks: bfloat16 if `auto` finds it in hardware, else float32."""
    enabled = precision == "auto" and computes_bfloat16(on)
    return torch.autocast(on.type, dtype=torch.bfloat16, enabled=enabled)


def make_deterministic() -> None:
    """Make the same inputs give the same bytes on the same machine class; other operations raise an error."""
    # Without this, cuBLAS refuses some products of matrices.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The same as torch.use_deterministic_algorithms(True), which also imports the compiler (3 s, not used
    # here).
    torch.set_deterministic_debug_mode("error")
    # On by default in this mode, and 4 % of a training step; nothing here reads uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # TF32 keeps 10 of float32's 23 bits of mantissa.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def compile_parts(model: nn.Module, on: torch.device, wanted: Compile) -> None:
    """Compile the networks of a model in place, for fixed shapes; `auto`: on CUDA only.

    On a CPU compiling takes a minute and gains nothing.  The names of the weights do not change, and a copy
    of the model is not compiled.
    """
    if wanted == "always" or (wanted == "auto" and on.type == "cuda"):
        torch.use_deterministic_algorithms(True)  # imports the compiler and sets its own switch
        for part in model.children():
            part.compile(dynamic=False)


def to_device(array: NDArray[Any], on: torch.device) -> Tensor:
    """Return the array on the device, read-only.  On the CPU it is not copied: it may exceed the memory.

    Raises UserError if it does not fit into the GPU's memory.
    """
    if on.type == "cuda" and array.nbytes > (free := torch.cuda.mem_get_info(on)[0]):
        raise UserError(
            f"the images of one split take {array.nbytes / 1e9:,.1f} GB, and the GPU has {free / 1e9:,.1f} GB"
            " free: lower data.size, take fewer images, or a GPU with more memory (params.yaml)"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array).to(on)


def upload(tensor: Tensor, on: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on the device.  The CPU does not wait for the copy."""
    return tensor.pin_memory().to(on, non_blocking=True) if on.type == "cuda" else tensor


def seed_for(*parts: int) -> int:
    """Return one 63-bit seed made of small integers, such as (seed, purpose, shard).

    Different parts give independent streams.
    """
    # The count comes first because numpy treats (seed,) and (seed, 0) alike.
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)
