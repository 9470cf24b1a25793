"""What tracking costs: the same training with and without a row, and the time until a stage begins its work.

    python benchmarks/tracking.py                            # both parts: 5 turns of 9,600 images each way, 5 starts
    python benchmarks/tracking.py --part training --turns 9  # the default DDPM of params.yaml on random images
    python benchmarks/tracking.py --part start               # `dvc repro` in a copy of the checkout with made-up data

Training runs in turn (off on off on ...) in one process, through the Trainer, without checkpoints and validation.  With tracking it
stands inside a real `stage_run` on SQLite: points are sent, the machine is sampled in a thread.  `start` and `end` of the row are
measured apart and come once for a stage, however long it trains; so the share of the default run is reckoned from the parts:

    (start + end + points and samples of the machine in a training of its length) / (seconds of a training of its length)

The ratio on / off of the loops has the noise of the machine in it, of processor seconds less than of wall-clock seconds.  Targets:
at most 2 % of training time, and a stage that begins within 4 s of `dvc repro` reaching it.  Other load falsifies seconds, and ratios
less.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETS = {"train": 512, "validation": 64, "test": 64}
PACKAGES = ("torch", "mlflow", "dvc", "matplotlib", "scipy", "sklearn", "pandas", "sqlalchemy", "PIL", "numpy", "pydantic", "rediffuse")
# Appended to tracking/row.py of a copy of the checkout: says when a stage asks for its row and when it has it, and ends the stage.
PROBE = """
_timed = stage_run


@contextmanager
def stage_run(*arguments: Any, **settings: Any) -> Iterator[Run]:
    print(f"ASKS {time.time()} {time.process_time()}", flush=True)
    with _timed(*arguments, **settings):
        print(f"BEGINS {time.time()} {time.process_time()}", flush=True)
        os._exit(3)
"""


def quiet_environment(**more: str) -> dict[str, str]:
    """Without what could steer DVC, MLflow or git; `python` is this one."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "REDIFFUSE_", "GIT_"))}
    mine["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{mine['PATH']}"
    who = {f"GIT_{who}_{what}": "benchmark@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return mine | who | {"DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"} | more


def make_repository(root: Path, *names: str) -> None:
    """A git and DVC repository with copies of these files of the checkout."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / ".dvc").mkdir(exist_ok=True)
    (root / ".gitignore").write_text("/.mlflow/\n/.dvc/tmp/\n/.dvc/cache/\n/data/\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "benchmark"]):
        subprocess.run(["git", *command], cwd=root, env=quiet_environment(), check=True)


# Training


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """(wall-clock seconds, processor seconds of all threads)."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def seconds_of_a_sample() -> float:
    """Processor seconds that one sample of system metrics takes."""
    from rediffuse.tracking.system import SystemMetrics

    processor = time.process_time()
    system = SystemMetrics(seconds=0.02)
    time.sleep(2)
    system.stop()
    return (time.process_time() - processor) / (len(system.take()) + 1)  # and one at the beginning, which is not handed over


def measure_training(turns: int, images: int) -> None:
    """Print the seconds of the loop without and with a row, their ratio, and the parts that tracking takes."""
    import torch

    from rediffuse.diffusion.denoiser import Denoiser
    from rediffuse.diffusion.task import DenoisingStep, denoiser_config
    from rediffuse.params import load_params
    from rediffuse.tracking.row import stage_run
    from rediffuse.tracking.system import SECONDS
    from rediffuse.training.hardware import make_deterministic
    from rediffuse.training.loop import Trainer

    class NoCheckpoint:
        def load(self) -> None: ...
        def save(self, state: dict[str, Any]) -> None: ...

    params = load_params(ROOT / "params.yaml")
    whole = params.ddpm.training
    short = whole.model_copy(update={"images": images, "validate_every": images, "checkpoint_every": images})
    make_deterministic()
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (4096, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (4096,), generator=generator)

    def train(log: Callable[[int, dict[str, float]], None], training: Any = short) -> tuple[float, float]:
        torch.manual_seed(params.seed)
        denoiser = Denoiser(**denoiser_config(params.ddpm, (1, 28, 28), [str(i) for i in range(10)]))
        trainer = Trainer(
            denoiser,
            DenoisingStep(params.ddpm),
            data,
            labels,
            training,
            name="ddpm",
            seed=params.seed,
            precision=params.precision,
            validate=lambda _: {"validation_eps_mse": 0.0},
            log=log,
        )
        return spent(lambda: trainer.train(NoCheckpoint()))

    def tracked() -> dict[str, float]:
        """Seconds of each part of a stage with a row."""
        points = list[float]()
        began = time.perf_counter()
        with stage_run("train_ddpm", params) as run:
            start = time.perf_counter() - began

            def log(seen: int, values: dict[str, float]) -> None:
                points.append(spent(lambda: run.log_curve(seen, {f"ddpm/{name}": value for name, value in values.items()}))[0])

            wall, processor = train(log)
            began = time.perf_counter()
        return {"start": start, "wall": wall, "processor": processor, "points": sum(points), "end": time.perf_counter() - began}

    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        make_repository(Path(folder), "params.yaml", "dvc.yaml", "requirements.lock")
        store = f"from rediffuse.tracking.store import connect; connect('sqlite:///{folder}/.mlflow/mlflow.db')"
        Path(".mlflow").mkdir()
        subprocess.run([sys.executable, "-c", store], env=quiet_environment(PYTHONPATH=str(ROOT / "src")), check=True)
        began = time.perf_counter()
        with stage_run("prepare", params):
            first = {"start": time.perf_counter() - began}  # with the import of MLflow, as in every stage
            began = time.perf_counter()
        first["end"] = time.perf_counter() - began
        train(lambda *_: None, short.model_copy(update={"images": 20 * short.batch, "lr_warmup": 0}))  # warms up
        off, on = list[tuple[float, float]](), list[dict[str, float]]()
        for _ in range(turns):
            off.append(train(lambda *_: None))
            on.append(tracked())
        sample = seconds_of_a_sample()
    mean = {part: statistics.median(turn[part] for turn in on) for part in on[0]}
    plain = statistics.median(wall for wall, _ in off)
    walls = [turn["wall"] / wall for turn, (wall, _) in zip(on, off, strict=True)]
    processors = [turn["processor"] / processor for turn, (_, processor) in zip(on, off, strict=True)]
    seconds = plain * whole.images / images
    paid = first["start"] + first["end"] + mean["points"] * whole.images / images + sample * seconds / SECONDS
    print(f"{images} images in each of {turns} turns; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"  training without a row           {plain:7.2f} s")
    print(f"  with, without start and end      {mean['wall']:7.2f} s")
    print(f"  ratio of wall-clock seconds      {statistics.median(walls):7.3f}     {' '.join(f'{ratio:.3f}' for ratio in walls)}")
    print(f"  ratio of processor seconds       {statistics.median(processors):7.3f}     {' '.join(f'{ratio:.3f}' for ratio in processors)}")
    print(f"  start of a row                   {mean['start']:7.2f} s   in a new process {first['start']:.2f} s")
    print(f"  points, all calls                {mean['points']:7.3f} s   {100 * mean['points'] / plain:.2f} % of training")
    print(
        f"  a sample of the machine          {1000 * sample:7.1f} ms  of a processor, every {SECONDS:.0f} s: {100 * sample / SECONDS:.2f} %"
    )
    print(f"  end of a row                     {mean['end']:7.2f} s   in a new process {first['end']:.2f} s")
    print(f"  the default run, {whole.images} images  {seconds:7.0f} s   of which a row takes {paid:.1f} s: {100 * paid / seconds:.2f} %")


# The start of a stage


def made_up_data(folder: Path) -> None:
    """data/prepared of random images."""
    import numpy as np

    from rediffuse.data.images import ImageSet, save_images
    from rediffuse.data.splits import describe

    random = np.random.RandomState(0)
    names = tuple(str(i) for i in range(10))
    splits = {
        name: ImageSet(random.randint(0, 256, (n, 1, 28, 28), dtype=np.uint8), random.randint(0, 10, n, dtype=np.int64), names)
        for name, n in SETS.items()
    }
    save_images(folder, splits, describe(splits, {"set": "random", "source": "benchmark"}))


def start_once(root: Path, stage: str) -> dict[str, float]:
    """Seconds from the line of `dvc repro` until the stage asks for its row, and until it has it; processor: of the stage's process."""
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", stage]
    pipe = subprocess.PIPE
    began = time.time()
    with subprocess.Popen(command, cwd=root, env=quiet_environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        seen, said = dict[str, float](), list[str]()
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            if line.startswith("Running stage"):
                seen["reaches"] = time.time()
            elif match := re.match(r"(ASKS|BEGINS) ([\d.]+) ([\d.]+)", line):
                seen[match[1].lower()], processor = float(match[2]), float(match[3])
    if len(seen) < 3:
        raise SystemExit(f"stage {stage} did not begin:\n{''.join(said)}")
    reaches, asks, begins = seen["reaches"], seen["asks"], seen["begins"]
    return {"dvc": reaches - began, "imports": asks - reaches, "row": begins - asks, "all": begins - reaches, "processor": processor}


def importing(root: Path, code: str) -> dict[str, float]:
    """Seconds that Python reports for each package (with what it imports in turn) and for all, while it runs the code."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, cwd=root, env=quiet_environment(PYTHONPATH="src"), capture_output=True, text=True)
    lines = re.findall(r"^import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)$", done.stderr, re.MULTILINE)
    found = {name: int(cumulative) / 1e6 for _, cumulative, _, name in lines if name in PACKAGES}
    return found | {"all": sum(int(own) for own, *_ in lines) / 1e6}


def measure_start(turns: int, stages: list[str]) -> None:
    """Print the seconds until a stage begins, and what Python spends them on."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    code = [name for name in names.split("\0") if name.startswith(("src/", "stages/", ".dvc")) and (ROOT / name).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made_up_data(root / "data/prepared")
        for name in code:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
        row = root / "src/rediffuse/tracking/row.py"
        row.write_text(row.read_text() + PROBE)
        make_repository(root, "params.yaml", "dvc.yaml", "requirements.lock")
        starts = {stage: [start_once(root, stage) for _ in range(turns + 1)] for stage in stages}
        print(f"start of a stage, median of {turns}; the first start of all, which makes the store and compiles, is told apart")
        for stage, measured in starts.items():
            first, *others = measured
            part = {name: statistics.median(turn[name] for turn in others) for name in first}
            print(
                f"  {stage:11} {part['all']:5.2f} s from 'Running stage' to its work ({part['processor']:.2f} s of a processor):"
                f" python and imports {part['imports']:.2f} s, row {part['row']:.2f} s"
            )
            print(f"              first of all {first['all']:.2f} s; dvc, before it says 'Running stage' {part['dvc']:.2f} s", flush=True)
        stage = "import stages.train_ddpm"
        whole = (
            f"{stage}\nfrom rediffuse.params import load_params\nfrom rediffuse.tracking.row import _timed\n"
            "with _timed('train_ddpm', load_params()): pass"
        )
        for title, text in {"imports of the script alone": stage, "with the row, from start to end": whole}.items():
            found = importing(root, text)
            shares = ", ".join(
                f"{name} {seconds:.2f}" for name, seconds in sorted(found.items(), key=lambda item: -item[1]) if name != "all"
            )
            print(f"  {title}: {found['all']:.2f} s; with what each imports in turn: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["training", "start"], help="only this one")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=9600, help="in each turn of training")
    parser.add_argument("--stages", nargs="+", default=["train_vae", "train_ddpm"], choices=["train_vae", "train_ddpm"], help="to start")
    arguments = parser.parse_args()
    os.environ |= {name: "" for name in ("MLFLOW_TRACKING_URI", "REDIFFUSE_TRACKING") if name in os.environ}
    if arguments.part != "start":
        measure_training(arguments.turns, arguments.images)
    if arguments.part != "training":
        measure_start(arguments.turns, arguments.stages)


if __name__ == "__main__":
    main()
