"""What the benchmarks have in common when they tell: tables, the file they are kept in, and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rediffuse.runtime.files import write_json

Cell = str | float | int | None
Record = dict[str, Any]

PARTS = (
    "machine",
    "training",
    "convolutions",
    "sampling",
    "vae",
    "startup",
    "evaluation",
    "attention",
    "growth",
    "steps",
    "quality",
    "decoding",
    "gpu",
)
RATIO = "ratio"  # a column of this name: how many times as good as this row, as fast for example, ours is; what the plot shows
NOTHING = "–"  # a cell that was not measured
VERSIONS = ("torch", "numpy", "diffusers", "denoising-diffusion-pytorch", "pythae", "torch-fidelity", "dvc", "mlflow")
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Table:
    """rows: one list each, as long as `columns`; None: not measured.  note: how it was measured, and the spread.

    Columns of the name RATIO are drawn in the overview.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: a row must have {len(self.columns)} cells, one for each column, got {row}")


@dataclass(frozen=True)
class Settings:
    """turns: of each contender; seconds: of training in `quality`; quick: tiny numbers, to see that the code runs.

    out: where results and finished parts of long measurements are kept.  documented_lr: in `quality`, the peers also at the learning rates
    that they document.
    """

    turns: int = 3
    seconds: float = 600.0
    quick: bool = False
    out: Path = field(default=RESULTS)
    documented_lr: bool = False


def text(cell: Cell) -> str:
    """A cell as it is printed: three significant digits at least, no digit that means nothing."""
    if cell is None:
        return NOTHING
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def terminal(table: Table) -> str:
    """The table with aligned columns: the first to the left, the others to the right."""
    cells = [table.columns, *([text(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([table.title, lines[0], rule, *lines[1:], *([table.note] if table.note else [])]) + "\n"


def markdown(record: Record) -> str:
    """All tables of a record as `write_results` keeps it, each part below the machine that it was measured on."""
    return "\n".join(_sections(record))


def _sections(record: Record) -> Iterator[str]:
    for name, part in record["parts"].items():
        yield f"## {name}\n"
        yield f"{describe(part['about'])}\n"
        for kept in part["tables"]:
            table = Table(**kept)
            yield f"**{table.title}**\n"
            yield _row(table.columns)
            yield "|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|"
            yield from (_row([text(cell) for cell in row]) for row in table.rows)
            yield f"\n{table.note}\n" if table.note else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def describe(about: Record) -> str:
    """One line: where and of what a part was measured."""
    commit = f"commit `{about['commit']}`" + (" with uncommitted changes" if about["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    machine = f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['capability']}"
    return f"{about['date']}, {commit}; {machine}; {versions}; {about['turns']} turns" + (
        ", **quick: smoke run**" if about["quick"] else ""
    )


def about(settings: Settings) -> Record:
    """What a figure depends on besides the code: commit, machine, threads, versions; and the peak memory of this process."""
    import torch  # not above: a worker needs only `peak_mib`

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if torch.cpu._is_avx512_bf16_supported() else ""),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
        "turns": settings.turns,
        "seconds": settings.seconds,
        "quick": settings.quick,
        "peak_mib": peak_mib(),
    }


def cores() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_mib() -> float:
    """The most resident memory that this process has had, in MiB.

    On Linux from /proc: what `getrusage` calls so is inherited from the process that started this one, if that had more.
    """
    try:
        kib = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        kib = None
    if kib:
        return int(kib[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_results(path: Path) -> Record:
    """What `write_results` has kept, or an empty record."""
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def write_results(path: Path, part: str, tables: Sequence[Table], settings: Settings) -> Record:
    """Put the tables of a part in the place of those that it had; other parts stay.  Returns the whole record."""
    record = read_results(path)
    record["parts"][part] = {"about": about(settings), "tables": [asdict(table) for table in tables]}
    record["parts"] = dict(sorted(record["parts"].items(), key=lambda item: PARTS.index(item[0])))
    write_json(path, record)
    return record


def draw_overview(record: Record, path: Path) -> bool:
    """One bar for each ratio in the record: how many times as good ours is, on a logarithmic axis.  False if there are none."""
    bars = [(f"{table.title}: {row[0]}", row[column]) for table in _tables(record) for column in _ratios(table) for row in table.rows]
    bars = [(label, value) for label, value in bars if isinstance(value, int | float) and value > 0 and value != 1][::-1]
    if not bars:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(10, 1 + 0.32 * len(bars)), layout="constrained")
    drawn = axes.barh([label for label, _ in bars], [value - 1 for _, value in bars], left=1, color="tab:blue")
    axes.bar_label(drawn, [f"{value:.2g}" for _, value in bars], padding=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as good as this, ours is")
    axes.margins(x=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return True


def _tables(record: Record) -> list[Table]:
    return [Table(**table) for part in record["parts"].values() for table in part["tables"]]


def _ratios(table: Table) -> list[int]:
    return [index for index, name in enumerate(table.columns) if name == RATIO]
