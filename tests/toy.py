"""A small repository for tests: three stages, raw data of both kinds, experiments, and rows.

The stages need nothing but the standard library.  Everything else is real: git, DVC, MLflow's store.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import toy_pipeline
from toy_pipeline import run

from rediffuse.tracking.git import git_bytes
from rediffuse.tracking.store import connect, experiment_id

PREPARE = """
from pathlib import Path
numbers = Path("data/raw/numbers.txt").read_text() + Path("data/extra.csv").read_text()
Path("data/pixels").mkdir()
Path("data/pixels/numbers.txt").write_text(numbers)
"""
TRAIN = """
import os
from pathlib import Path
from stages.model import SLOPE
lines = Path("params.yaml").read_text().splitlines()
settings = dict(line.split(": ") for line in lines if not line.endswith(":"))
scale, chance = float(settings["  scale"]), settings["  chance"] == "true"
total = sum(map(float, Path("data/pixels/numbers.txt").read_text().split()))
if settings["  broken"] == "true":
    raise SystemExit("the toy is broken")
if settings["  slow"] == "true":
    import time
    Path(os.environ["TOY_STARTED"]).touch()
    time.sleep(60)
value = SLOPE * scale * total + (int.from_bytes(os.urandom(4), "little") / 2**32 if chance else 0.0)
Path("data/model.txt").write_text(repr(value))
"""
EVALUATE = """
import json
from pathlib import Path
value = float(Path("data/model.txt").read_text())
folder = Path("metrics/evaluation")
folder.mkdir(parents=True, exist_ok=True)
spread = {"mean": value, "std": 0.25, "values": [value - 0.25, value, value + 0.25]}
record = {"model": "toy", "instruments": {"cnn": {"scores": {"fd": spread}}}}
(folder / "toy.json").write_text(json.dumps(record))
Path("metrics/toy.json").write_text(json.dumps({"n": 3, "cnn": {"fd": value}}))
"""
PARAMS = "seed: 1\ntrain:\n  scale: 2.0\n  chance: false\n  slow: false\n  broken: false\n"
PIPELINE = """
stages:
  prepare:
    cmd: python -m stages.prepare
    deps: [stages/prepare.py, data/extra.csv]
    params: [seed]
    outs: [data/pixels]
  train:
    cmd: python -m stages.train
    deps: [data/pixels, stages/train.py, stages/model.py]
    params: [train]
    outs: [data/model.txt]
  evaluate:
    cmd: python -m stages.evaluate
    deps: [data/model.txt, stages/evaluate.py]
    outs: [{metrics/evaluation/toy.json: {cache: false}}]
    metrics: [{metrics/toy.json: {cache: false}}]
"""
EXPERIMENTS = {"larger": ["-S", "train.scale=3.0"], "chance": ["-S", "train.chance=true"]}
FOREIGN = (*toy_pipeline.FOREIGN, "GIT_DIR")


def git(root: Path, *arguments: str) -> str:
    return run(root, "git", *arguments).stdout.strip()


def dvc(root: Path, *arguments: str) -> str:
    return run(root, "dvc", *arguments).stdout


def make_repository(root: Path) -> None:
    """Make a commit with results, and EXPERIMENTS on it.  The working directory is clean afterwards."""
    for folder in ("stages", "data/raw"):
        (root / folder).mkdir(parents=True)
    stages = {"prepare": PREPARE, "train": TRAIN, "evaluate": EVALUATE}
    for name, text in ({"__init__": "", "model": "SLOPE = 1.0\n"} | stages).items():
        (root / "stages" / f"{name}.py").write_text(text)
    (root / "params.yaml").write_text(PARAMS)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / ".gitignore").write_text("/.mlflow/\n/data/raw/\n__pycache__/\n")
    (root / ".dvcignore").write_text("/data/raw\n__pycache__\n")
    (root / "data/raw/numbers.txt").write_text("1 2 3 ")
    (root / "data/extra.csv").write_text("4\n")
    git(root, "init", "-q", "-b", "main")
    git(root, "config", "user.name", "test")
    git(root, "config", "user.email", "test@example.org")
    dvc(root, "init", "-q")
    dvc(root, "add", "-q", "data/extra.csv")
    dvc(root, "repro")
    commit(root, "results")
    for name, settings in EXPERIMENTS.items():
        dvc(root, "exp", "run", "-n", name, *settings)
        git(root, "checkout", "-q", ".")
    dvc(root, "checkout", "-f")


def commit(root: Path, message: str) -> str:
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", message)
    return git(root, "rev-parse", "HEAD")


def copy_repository(base: Path, root: Path, empty_store: Path) -> None:
    """A copy with an empty store."""
    shutil.copytree(base, root, symlinks=True)
    (root / ".mlflow").mkdir()
    shutil.copy(empty_store, root / ".mlflow" / "mlflow.db")


def client(root: Path) -> Any:
    return connect(f"sqlite:///{root}/.mlflow/mlflow.db")


def experiment_ref(root: Path, name: str) -> str:
    """The ref of the experiment of this name on the commit that is checked out."""
    head = git(root, "rev-parse", "HEAD")
    return f"refs/exps/{head[:2]}/{head[2:]}/{name}"


def add_row(
    root: Path, name: str, *, experiment: bool = False, files: dict[str, bytes] | None = None, **tags: str
) -> str:
    """Add a row for the experiment of this name, or for a plain `dvc repro` of HEAD.  Return its id.

    files: artifacts that differ from the commit's.  tags: with "__" for the dot; an empty one is left out.
    """
    store, head = client(root), git(root, "rev-parse", "HEAD")
    ref = experiment_ref(root, name) if experiment else "HEAD"
    revision = git(root, "rev-parse", ref)
    about = {"mlflow.source.git.commit": head, "git.dirty": "false"}
    if experiment:
        about |= {"dvc.exp_name": name, "dvc.baseline": head, "dvc.exp_ref": ref, "dvc.exp_rev": revision}
    about |= {tag.replace("__", "."): value for tag, value in tags.items()}
    table = experiment_id(store, str(store.tracking_uri), root)
    filled = {tag: value for tag, value in about.items() if value}
    row = str(store.create_run(table, run_name=name, tags=filled).info.run_id)

    def show(path: str) -> bytes:
        return git_bytes(root, "show", f"{revision}:{path}")

    artifacts = {f"recipe/{path}": show(path) for path in ("params.yaml", "dvc.yaml", "dvc.lock")}
    artifacts |= {path: show(path) for path in ("metrics/toy.json", "metrics/evaluation/toy.json")}
    for path, content in (artifacts | (files or {})).items():
        store.log_text(row, content.decode(), path)
    numbers = json.loads(artifacts["metrics/toy.json"])
    store.log_metric(row, "toy/n", numbers["n"])
    store.log_metric(row, "toy/cnn/fd", numbers["cnn"]["fd"])
    return row


def tags_of(root: Path, row: str) -> dict[str, str]:
    return dict(client(root).get_run(row).data.tags)
