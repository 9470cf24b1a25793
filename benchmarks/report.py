"""Tables of results in Markdown, and what they were measured on."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PARTS = (
    *("training", "sampling", "vae", "startup", "evaluation", "growth"),
    *("steps", "quality", "rulers", "gpu"),
)
RESULTS = Path("benchmarks/results")
RATIO = "ratio"  # how many times as good as this row ours is
PACKAGES = (
    *("torch", "numpy", "diffusers", "denoising-diffusion-pytorch", "pythae", "torch-fidelity"),
    *("dvc", "mlflow"),
)

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """rows: one list each, as long as `columns`; None: not measured.  note: how it was measured."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """turns: of each contender; seconds: of training in `quality`; quick: tiny numbers."""

    turns: int = 3
    seconds: float = 600.0
    quick: bool = False


def cell_text(cell: Cell) -> str:
    """Return a cell as it is printed: numbers with at least three significant digits."""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return "–" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell.replace("|", "\\|")


def markdown(table: Table) -> str:
    """Return the table in Markdown, with aligned columns."""
    cells = [table.columns, *([cell_text(cell) for cell in row] for row in table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = []
    for first, *others in cells:
        padded = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join([f"**{table.title}**", "", *lines, "", table.note]).rstrip()


def about(settings: Settings) -> str:
    """Return in one line what the figures depend on: date, commit, machine, threads, versions, settings."""
    import torch  # not above: a worker needs only `peak_mib`

    changed = " with uncommitted changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    bf16 = " with bfloat16" if torch.cpu._is_avx512_bf16_supported() else ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit `{_git('rev-parse', 'HEAD')[:12]}`{changed};"
        f" {_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}{bf16}{gpu}; Python {platform.python_version()},"
        f" {', '.join(versions)}{'; **quick: a check of the code only**' if settings.quick else ''}"
    )


def peak_mib() -> float:
    """Return the highest resident memory of this process so far, in MiB.

    On Linux from /proc, because `getrusage` starts with the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists() and (kib := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(kib[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
