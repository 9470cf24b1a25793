"""A pipeline of DVC with small stages that log into rows as the real ones do, and what tests do with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rediffuse.tracking.store import connect

PROJECT = Path(__file__).resolve().parents[1]
# What in the environment steers DVC, MLflow or tracking.
FOREIGN = (
    *("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"),
    *("MLFLOW_TRACKING_URI", "REDIFFUSE_TRACKING", "RANK"),
)
STAGES = ["prepare", "train_ddpm", "evaluate_ddpm"]

STAGE = """
import json, os, pathlib, signal, sys
import yaml
from PIL import Image
from rediffuse.training.curves import write_curve
from rediffuse.params import load_params
from rediffuse.tracking.row import stage_run
stage, params = sys.argv[1], load_params()
with stage_run(stage, params, complete=stage == "evaluate_ddpm") as run:
    if stage == "prepare":
        folder = pathlib.Path("data/pixels")
        folder.mkdir(parents=True)
        (folder / "images.npy").write_bytes(bytes([params.seed]))
        (folder / "manifest.json").write_text(json.dumps({"set": "toy", "classes": []}))
    if stage == "train_ddpm":
        if os.environ.get("TOY_TORCH"):
            import torch  # so that the environment is recorded
        if pathlib.Path("stop").exists():
            run._open_row()
            os.kill(os.getpid(), signal.SIGKILL)
        plots = pathlib.Path("metrics/plots/train_ddpm")
        (plots / "images").mkdir(parents=True)
        points = [{"images": seen, "loss": params.ddpm.T / seen} for seen in (10, 20)]
        write_curve(plots / "training.csv", points)
        Image.new("L", (4, 4), params.ddpm.T % 256).save(plots / "images" / "noising.png")
        pathlib.Path("metrics/train_ddpm.json").write_text(json.dumps({"loss": params.ddpm.T / 20}))
    if stage == "evaluate_ddpm":
        loss = json.loads(pathlib.Path("metrics/train_ddpm.json").read_text())["loss"]
        pathlib.Path("metrics/evaluation").mkdir(parents=True, exist_ok=True)
        scores = {"fd": loss + params.evaluate.neighbours}
        pathlib.Path("metrics/evaluation/ddpm.json").write_text(json.dumps({"scores": scores}))
        pathlib.Path("metrics/ddpm.json").write_text(json.dumps(scores))
"""
PIPELINE = """
stages:
  prepare:
    cmd: python stage.py prepare
    deps: [raw.txt, stage.py]
    params: [seed]
    outs: [data/pixels]
  train_ddpm:
    cmd: python stage.py train_ddpm
    deps: [data/pixels, stage.py]
    params: [ddpm]
    metrics: [{metrics/train_ddpm.json: {cache: false}}]
    plots: [{metrics/plots/train_ddpm/training.csv: {cache: false}}, metrics/plots/train_ddpm/images]
  evaluate_ddpm:
    cmd: python stage.py evaluate_ddpm
    deps: [metrics/train_ddpm.json, stage.py]
    params: [evaluate]
    metrics: [{metrics/ddpm.json: {cache: false}}]
    plots: [{metrics/evaluation/ddpm.json: {cache: false}}]
"""


def enter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the repository the working directory, without variables that steer DVC, MLflow or tracking."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)


def environment(**variables: str) -> dict[str, str]:
    """The environment as in an activated .venv, without what could steer DVC, MLflow or git."""
    foreign = ("DVC_", "MLFLOW_", "REDIFFUSE_", "GIT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    kept |= {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PYTHONPATH": str(PROJECT / "src"), "DVC_NO_ANALYTICS": "1", **variables}


def run(root: Path, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user types it in this folder."""
    how: dict[str, Any] = {"env": environment(**variables), "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=root, timeout=400, **how)
    said = f"{command} exited with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert not check or done.returncode == 0, said
    return done


def make_repository(root: Path) -> None:
    """A repository whose pipeline has run, and was committed, without tracking."""
    root.mkdir()
    (root / "stage.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / ".gitignore").write_text("/.mlflow/\n/stop\n__pycache__/\n")
    shutil.copy(PROJECT / "params.yaml", root)
    run(root, "git", "init", "-q", "-b", "main")
    run(root, "dvc", "init", "-q")
    (root / "raw.txt").write_text("raw data that DVC tracks")
    run(root, "dvc", "add", "-q", "raw.txt")
    run(root, "dvc", "repro", REDIFFUSE_TRACKING="off")
    assert not (root / ".mlflow").exists()
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-q", "-m", "results")


def rows(root: Path) -> dict[str, Any]:
    """The rows that are not superseded, by name."""
    client = connect(f"sqlite:///{root}/.mlflow/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("rediffuse").experiment_id])
    live = [row for row in found if row.data.tags["rediffuse.superseded"] == "false"]
    assert len({row.info.run_name for row in live}) == len(live)
    return {row.info.run_name: row for row in live}


def numbers(row: Any) -> dict[str, float]:
    """The row's metrics without those that time and machine decide."""
    noise = ("seconds/", "system/")
    return {name: value for name, value in row.data.metrics.items() if not name.startswith(noise)}
