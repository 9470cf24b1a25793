"""Repositories of the benchmarks' own, in which stages run without touching this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "params.yaml", "dvc.yaml", "requirements.lock"


def quiet_environment(**more: str) -> dict[str, str]:
    """Without what could steer DVC, MLflow or git; `python` is this one."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "REDIFFUSE_", "GIT_"))}
    mine["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{mine['PATH']}"
    who = {f"GIT_{who}_{what}": "benchmark@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return mine | who | {"DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"} | more


def copy_files(root: Path, names: Iterable[str]) -> None:
    """Copies of these files of the checkout, where they are."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)


def code() -> list[str]:
    """The files of the checkout that its stages run from."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if name.startswith(("src/", "stages/", ".dvc")) and (ROOT / name).is_file()]


def make_repository(root: Path) -> None:
    """A git and DVC repository with the settings of the checkout and what lies in the folder already."""
    copy_files(root, SETTINGS)
    (root / ".dvc").mkdir(exist_ok=True)
    (root / ".gitignore").write_text("/.mlflow/\n/.dvc/tmp/\n/.dvc/cache/\n/data/\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "benchmark"]):
        subprocess.run(["git", *command], cwd=root, env=quiet_environment(), check=True)
