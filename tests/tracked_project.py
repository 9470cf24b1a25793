"""A tiny repository with a pipeline, rows and results: two stages in the place of training and evaluation."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from servers import clean_environment

PROJECT = Path(__file__).resolve().parents[1]
STEPS = range(0, 500, 100)  # images seen at the points of the curve

# TOY_PAUSE: a folder.  In mid-training the stage writes the file "waiting" there and waits for the file "go".
# At its end it writes how many seconds its block took from there.
TRAIN = """
import json, os, time
from pathlib import Path
from PIL import Image
from rediffuse.training.curves import write_curve
from rediffuse.params import load_params
from rediffuse.tracking.row import stage_run

params, plots, out, began = load_params(), Path("metrics/plots/train_ddpm"), Path("data/samples/ddpm"), None
T = params.ddpm.T
with stage_run("train_ddpm", params) as run:
    for images in range(0, 500, 100):
        run.log_curve(images, {"ddpm/loss": T / (1 + images)})
        if images == 200 and (folder := os.environ.get("TOY_PAUSE")):
            Path("metrics").mkdir(exist_ok=True)
            Path("metrics/train_ddpm.json").write_text(json.dumps({"half": T / 2}))
            run._open_row().log_results([Path("metrics/train_ddpm.json")])  # sent at once
            Path(folder, "waiting").touch()
            while not Path(folder, "go").exists():
                time.sleep(0.01)
            began = time.monotonic()
    (plots / "images").mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "images.bin").write_bytes(T.to_bytes(4, "big") * 1000)
    points = [{"images": seen, "loss": T / (1 + seen)} for seen in range(0, 500, 100)]
    write_curve(plots / "training.csv", points)
    Image.new("L", (8, 8), T % 256).save(plots / "images" / "noising.png")
    Path("metrics/train_ddpm.json").write_text(json.dumps({"half": T / 2}))
if began:
    Path(folder, "seconds").write_text(str(time.monotonic() - began))
"""
EVALUATE = """
import json
from pathlib import Path
from PIL import Image
from rediffuse.params import load_params
from rediffuse.tracking.row import stage_run

plots, record = Path("metrics/plots/evaluate_ddpm/images"), Path("metrics/evaluation/ddpm.json")
with stage_run("evaluate_ddpm", load_params(), complete=True):
    value = int.from_bytes(Path("data/samples/ddpm/images.bin").read_bytes()[:4], "big")
    plots.mkdir(parents=True, exist_ok=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value % 255).save(plots / "scores.png")
    record.write_text(json.dumps({"scores": {"fd": value / 10}}))
    Path("metrics/ddpm.json").write_text(json.dumps({"fd": value / 10}))
"""
STAGES: dict[str, Any] = {
    "train_ddpm": {
        "cmd": "python stages/train.py",
        "deps": ["stages/train.py"],
        "params": ["ddpm"],
        "outs": ["data/samples/ddpm"],
        "metrics": [{"metrics/train_ddpm.json": {"cache": False}}],
        "plots": [
            {"metrics/plots/train_ddpm/training.csv": {"cache": False}},
            "metrics/plots/train_ddpm/images",
        ],
    },
    "evaluate_ddpm": {
        "cmd": "python stages/evaluate.py",
        "deps": ["data/samples/ddpm", "stages/evaluate.py"],
        "outs": [{"metrics/evaluation/ddpm.json": {"cache": False}}],
        "metrics": [{"metrics/ddpm.json": {"cache": False}}],
        "plots": ["metrics/plots/evaluate_ddpm/images"],
    },
}


def expected_metrics(T: int) -> dict[str, float]:
    """The results of a row with this ddpm.T."""
    return {"train_ddpm/half": T / 2, "ddpm/loss": T / (1 + STEPS[-1]), "ddpm/fd": T / 10}


def results_of(row: Any) -> dict[str, float]:
    """The row's numbers, without those that say how long it took and how busy the machine was."""
    noise = ("seconds/", "system/")
    return {name: value for name, value in row.data.metrics.items() if not name.startswith(noise)}


def pictures_of(client: Any, row: Any) -> set[str]:
    """The keys of the row's pictures."""
    files = client.list_artifacts(row.info.run_id, "images")
    return {Path(file.path).name.partition("+")[0].replace("~", "/") for file in files}


class Checkout:
    """A working copy, with commands as a user types them there."""

    def __init__(self, root: Path, **variables: str) -> None:
        self.root, self.variables = root, variables

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        who = {f"GIT_{role}_{what}": "test" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environment = clean_environment(**who, PYTHONPATH=str(PROJECT / "src"), **self.variables | variables)
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        how: dict[str, Any] = {"stdin": null, "stdout": pipe, "stderr": pipe, "text": True}
        return subprocess.Popen(command, cwd=self.root, env=environment, **how)

    def run(self, *command: str, **variables: str) -> str:
        """What the command prints on stdout and stderr; the test fails if it fails."""
        return finish(self.start(*command, **variables))

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments).strip()

    def dvc(self, *arguments: str, **variables: str) -> str:
        return self.run("dvc", *arguments, **variables)


def finish(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate(timeout=120)
    status = process.returncode
    assert status == 0, f"{process.args!r} exited with {status}\n{stdout[-4000:]}\n{stderr[-4000:]}"
    return stdout + stderr


def make_project(root: Path, **variables: str) -> Checkout:
    """A repository with the pipeline, committed, in which nothing has run."""
    (root / "stages").mkdir(parents=True)
    (root / "stages" / "train.py").write_text(TRAIN)
    (root / "stages" / "evaluate.py").write_text(EVALUATE)
    (root / "dvc.yaml").write_text(json.dumps({"stages": STAGES}, indent=2))
    (root / ".gitignore").write_text("/.mlflow/\n__pycache__/\n")
    shutil.copy(PROJECT / "params.yaml", root)
    checkout = Checkout(root, **variables)
    checkout.git("init", "-q", "-b", "main")
    checkout.dvc("init", "-q")
    checkout.dvc("config", "core.analytics", "false")
    checkout.git("add", ".")
    checkout.git("commit", "-q", "-m", "pipeline")
    return checkout


def wait_for(path: Path, seconds: float = 60) -> None:
    began = time.monotonic()
    while not path.exists():
        assert time.monotonic() - began < seconds, f"{path.name} did not appear in {seconds} s"
        time.sleep(0.02)
