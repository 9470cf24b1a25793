"""The parts of a machine and its software that the bytes of results depend on.

Two groups.  `decides`: another value may give other bits; machines that agree in all of it (a machine class)
give the same bits.  `informs`: helps to explain an unexpected difference.  Nothing names a host, path,
process or time, so that every process of a machine class gives the same description.  What the code itself
sets (make_deterministic) is given by the commit.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# They compute numbers, or write files that DVC hashes.
PACKAGES = (
    *("matplotlib", "numpy", "pillow", "safetensors"),
    *("scikit-learn", "scipy", "torch-fidelity", "torchvision"),
)
# Variables that choose other kernels.  Numbers of threads are in `threads`.
VARIABLES = (
    *("CUBLASLT_WORKSPACE_SIZE", "CUDA_LAUNCH_BLOCKING", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA"),
    *("MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS", "NPY_DISABLE_CPU_FEATURES"),
    *("NVIDIA_TF32_OVERRIDE", "OMP_DYNAMIC", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
    *("PYTORCH_JIT", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_CUDNN_V8_API_DISABLED"),
)
CUBLAS_WORKSPACE = ":4096:8"  # what make_deterministic() sets where nothing is set


def describe_environment() -> dict[str, Any]:
    """Return {"decides": {...}, "informs": {...}} of this process, JSON values with sorted keys.

    Imports torch, which takes seconds outside the stages.
    """
    import torch

    from rediffuse.runtime.device import computes_bfloat16

    cpu, cuda = _processor(), describe_cuda(torch) if torch.cuda.is_available() else None
    major, minor, _ = platform.python_version_tuple()
    decides = {
        "cpu": {
            "bfloat16": computes_bfloat16(torch.device("cpu")),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "features": _features(torch.cpu),
            "vendor": cpu["vendor"],
        },
        "cuda": cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "libc": " ".join(platform.libc_ver()).strip(),  # the schedules' sines and cosines
        "libraries": {
            "mkl": torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
            "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
            "openblas": _openblas(),
        },
        "machine": platform.machine(),
        "packages": {"torch": str(torch.__version__)} | {name: _version(name) for name in PACKAGES},
        "python": f"{major}.{minor}",
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }
    informs = {
        "cpu": cpu["model"],
        "driver": _driver() if cuda else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "python": platform.python_version(),
    }
    environment = {"decides": decides, "informs": informs}
    return dict(json.loads(json.dumps(environment, sort_keys=True)))


def environment_digest(environment: dict[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of the environment as sorted JSON."""
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]


def same_machine_class(recorded: dict[str, Any], here: dict[str, Any]) -> bool:
    """Return whether the same code, parameters and data give the same bits in both."""
    return bool(recorded.get("decides") == here.get("decides"))


def differences(recorded: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return a text for each value that differs, such as "torch 2.14.1, here 2.15.0"; what decides comes
    first.

    A missing group is one text: "cuda none, here device NVIDIA H100, version 13.0".
    """
    return [
        text
        for group in sorted({*recorded, *here})
        for text in _differences("", recorded.get(group, {}), here.get(group, {}))
    ]


def _differences(name: str, recorded: Any, here: Any) -> list[str]:
    if recorded == here:
        return []
    if not (isinstance(recorded, dict) and isinstance(here, dict)):
        return [f"{name} {_words(recorded)}, here {_words(here)}"]
    before = "" if name in ("", "packages") else f"{name}."
    return [
        text
        for key in sorted({*recorded, *here})
        for text in _differences(before + key, recorded.get(key), here.get(key))
    ]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in sorted(value.items())) or "none"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == "" else str(value)


def describe_cuda(torch: Any) -> dict[str, Any]:
    """Return what of the first GPU and its libraries chooses the kernels.  torch: the module."""
    from rediffuse.runtime.device import computes_bfloat16

    device = torch.cuda.get_device_properties(0)
    return {
        "bfloat16": computes_bfloat16(torch.device("cuda")),
        "capability": f"{device.major}.{device.minor}",
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE),
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "device": device.name,
        # A part of a GPU (MIG) has fewer and splits sums differently.
        "multiprocessors": device.multi_processor_count,
        "version": torch.version.cuda,
    }


def _features(cpu: Any) -> list[str]:
    """Return the instruction sets by which oneDNN and MKL choose kernels, as far as this torch can ask."""
    names = ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile", "amx_fp16")
    return [name for name in names if getattr(cpu, f"_is_{name}_supported", bool)()]


def _processor() -> dict[str, str]:
    """Return the vendor of the CPU, by which MKL chooses kernels, and its model."""
    path = Path("/proc/cpuinfo")  # of Linux
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.is_file() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "vendor": fields.get("vendor_id") or fields.get("CPU implementer") or platform.processor(),
        "model": fields.get("model name") or fields.get("CPU part") or platform.processor(),
    }


def _openblas() -> dict[str, Any] | None:
    """Return NumPy's OpenBLAS, which has its own threads; None where NumPy has another library."""
    import numpy  # noqa: F401  # which loads it

    try:
        libraries = importlib.import_module("threadpoolctl").threadpool_info()
    except ImportError:
        return None
    # SciPy brings a second one; whether it is loaded depends on the stage, so it must not count.
    own = re.compile(r"site-packages[/\\]numpy\b")
    found = [
        each for each in libraries if each["internal_api"] == "openblas" and own.search(each["filepath"])
    ]
    return {key: found[0].get(key) for key in ("architecture", "num_threads", "version")} if found else None


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel module."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.is_file() else []
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
