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
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32: TF32 keeps 10 bits of it


def compile_parts(model: nn.Module, on: torch.device, wanted: Compile) -> None:
    """Compile the networks that a model is made of, in place and for fixed shapes, if wanted; `auto`: on CUDA.

    On a CPU it takes a minute and gains nothing.  The names of the weights stay as they are, and a copy of the model is not compiled.
    """
    if wanted == "always" or (wanted == "auto" and on.type == "cuda"):
        torch.use_deterministic_algorithms(True)  # sets the compiler's own switch as well, and imports it, as must be here
        for part in model.children():
            part.compile(dynamic=False)


def to_device(array: NDArray[Any], on: torch.device) -> Tensor:
    """The array on the device, not to be written to; on the CPU without a copy, so that what is memory-mapped need not fit into memory.

    Raises UserError for one that a GPU has no room for.
    """
    if on.type == "cuda" and array.nbytes > (free := torch.cuda.mem_get_info(on)[0]):
        raise UserError(
            f"the images of one split take {array.nbytes / 1e9:,.1f} GB, and the GPU has {free / 1e9:,.1f} GB free: lower data.size, take"
            " fewer images, or a GPU with more memory (params.yaml)"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anybody write to it
        return torch.from_numpy(array).to(on)


def upload(tensor: Tensor, on: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device, for which the CPU does not wait."""
    return tensor.pin_memory().to(on, non_blocking=True) if on.type == "cuda" else tensor


def seed_for(*parts: int) -> int:
    """One 63-bit seed from several small integers, such as (seed, purpose, shard); different parts give independent streams."""
    # With the count in front, because numpy takes (seed,) and (seed, 0) for the same.
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)
