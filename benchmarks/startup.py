"""What has to pass before anything is done: stages up to their first unit of work, imports, a `dvc repro` that runs nothing, tracking.

- Stages: `dvc repro` in a copy of the checkout with made-up data and untrained models, from its line "Running stage" until the first
  training step is done, or the first shard of 64 images is drawn.  The copy tells the time and ends there.  Target: 3 s.
- Imports: a new interpreter that imports one thing, start of Python included.
- `dvc repro` of an unchanged pipeline, in a copy with placeholders for the outputs.  Target: 2 s.
- Tracking: benchmarks/tracking.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import made_up, tracking
from benchmarks.checkout import ROOT, code, copy_files, make_repository, quiet_environment
from benchmarks.report import Settings, Table
from rediffuse.params import load_params

STAGES = "train_vae", "train_ddpm", "sample_vae", "sample_ddpm"
IMPORTS = (
    "torch",
    "torch._dynamo",
    "torchvision",
    "torch_fidelity",
    "mlflow",
    "matplotlib.figure",
    "sklearn.neighbors",
    "rediffuse.params",
    "rediffuse.training.loop",
    "stages.prepare",
    "stages.reference",
    "stages.train_vae",
    "stages.encode",
    "stages.train_ddpm",
    "stages.sample_vae",
    "stages.sample_ddpm",
    "stages.evaluate",
    "stages.report",
)
HEAVY = "torch", "torch._dynamo", "torchvision", "torch_fidelity", "mlflow", "matplotlib", "sklearn", "pandas"
OPTIMIZER = "import torch; torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)"
SPLITS = {"train": 512, "validation": 64, "test": 64}

# Appended to files of the copy.  A stage says when it asks for its row, when it has it, and when its first work is done; there it ends.
SAY = """

def _say(what: str) -> None:
    import time

    print(f"{what} {time.time()} {time.process_time()}", flush=True)
"""
LEAVE = '_say("WORKS")\n    import os\n\n    os._exit(3)\n'
PROBES = {
    "src/rediffuse/tracking/row.py": """
_timed = stage_run


@contextmanager
def stage_run(*arguments: Any, **settings: Any) -> Iterator[Run]:
    _say("ASKS")
    with _timed(*arguments, **settings) as run:
        _say("BEGINS")
        yield run
""",
    "src/rediffuse/training/loop.py": f"""
_timed = Trainer._step


def _step(self: Trainer) -> None:
    _timed(self)
    {LEAVE}

Trainer._step = _step
""",
    "src/rediffuse/runtime/shards.py": f"""
def draw(n: int, draw_shard: DrawShard, *, seed: int, title: str) -> Tensor:
    draw_shard(torch.arange(SHARD), shard_generator(seed, 0))
    {LEAVE}""",
}
LINE = re.compile(r"(ASKS|BEGINS|WORKS) ([\d.]+) ([\d.]+)")


def copy_checkout(root: Path) -> None:
    """The checkout with probes and made-up data."""
    copy_files(root, code())
    for name, probe in PROBES.items():
        (root / name).write_text((root / name).read_text() + SAY + probe)
    made_up.save_splits(root / "data/pixels", **SPLITS)
    make_repository(root)


def start_once(root: Path, stage: str) -> dict[str, float]:
    """Seconds of the parts of the start of a stage, from its line in `dvc repro` on; processor: of the stage's process."""
    made_up.save_models(root / "data/models", load_params(ROOT / "params.yaml"))  # DVC removes what a stage is to make
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", stage]
    began, pipe = time.time(), subprocess.PIPE
    seen, said = dict[str, float](), list[str]()
    with subprocess.Popen(command, cwd=root, env=quiet_environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            if line.startswith("Running stage"):
                seen["RUNNING"] = time.time()
            elif match := LINE.search(line):
                seen[match[1]], processor = float(match[2]), float(match[3])
    if len(seen) < 4:
        raise RuntimeError(f"stage {stage} did not begin:\n{''.join(said)}")
    running, asks, begins, works = (seen[moment] for moment in ("RUNNING", "ASKS", "BEGINS", "WORKS"))
    parts = {"all": works - running, "imports": asks - running, "row": begins - asks, "first": works - begins}
    return parts | {"processor": processor, "dvc": running - began}


def measure_starts(turns: int, stages: tuple[str, ...]) -> Table:
    """How long each stage takes to its first work; the first start of all, which compiles, is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder))
        starts = {stage: [start_once(Path(folder), stage) for _ in range(turns + 1)][1:] for stage in stages}
    parts = "all", "imports", "row", "first", "processor", "dvc"
    rows = [[stage, *(median(turn[part] for turn in found) for part in parts)] for stage, found in starts.items()]
    columns = ["stage", "s to its first work", "imports, data", "row", "first work", "processor s", "dvc before that"]
    note = f"median of {turns}; first work: model, optimizer and one step of training, or one shard of 64 images in all its steps"
    return Table("start of a stage, from 'Running stage' on", columns, rows, note)


def import_seconds(statement: str) -> tuple[float, list[str]]:
    """Seconds of a new interpreter that runs the statement, and which of the HEAVY packages it had then imported."""
    ask = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    environment = quiet_environment(PYTHONPATH=f"{ROOT / 'src'}:{ROOT}")
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout.split()


def measure_imports(turns: int, names: tuple[str, ...]) -> Table:
    """What an import takes by itself, and which heavy packages come with it."""
    statements = {name: f"import {name}" for name in names} | {"torch, and AdamW constructed": OPTIMIZER}
    rounds = [{title: import_seconds(statement) for title, statement in statements.items()} for _ in range(turns)]
    rows = [[title, median(found[title][0] for found in rounds), ", ".join(rounds[0][title][1])] for title in statements]
    note = f"median of {turns} new interpreters, in turn; the start of Python included"
    return Table("imports", ["import", "s", "with it came"], rows, note)


PLACEHOLDERS = """
from pathlib import Path
from dvc.repo import Repo
for stage in Repo().index.stages:
    for part in [*stage.deps, *stage.outs]:
        path = Path(part.fs_path)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{}') if path.suffix else (path.mkdir(), (path / 'placeholder').write_text(str(path.name)))
"""


def measure_repro(turns: int) -> Table:
    """`dvc repro` with nothing to do."""
    with tempfile.TemporaryDirectory() as folder:
        root, environment = Path(folder), quiet_environment()
        copy_files(root, code())
        make_repository(root)
        subprocess.run([sys.executable, "-c", PLACEHOLDERS], cwd=root, env=environment, check=True)
        dvc = [sys.executable, "-m", "dvc"]
        subprocess.run([*dvc, "commit", "--force", "--quiet"], cwd=root, env=environment, check=True)
        times = list[float]()
        for _ in range(turns + 1):
            began = time.perf_counter()
            done = subprocess.run([*dvc, "repro"], cwd=root, env=environment, capture_output=True, text=True, check=True)
            times.append(time.perf_counter() - began)
            if "Running stage" in done.stdout:
                raise RuntimeError(f"dvc repro had something to do:\n{done.stdout}")
    return Table("a second `dvc repro`, which runs nothing", ["", "s"], [["all stages", median(times[1:])]], f"median of {turns}")


def measure(settings: Settings) -> list[Table]:
    if settings.quick:
        starts, imports = measure_starts(1, ("train_ddpm",)), measure_imports(1, ("torch",))
    else:
        starts, imports = measure_starts(settings.turns, STAGES), measure_imports(settings.turns, IMPORTS)
    return [starts, imports, measure_repro(1 if settings.quick else settings.turns), *tracking.measure(settings)]
