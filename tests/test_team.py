"""The commands in docs/team.md with which a team keeps an experiment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy import FOREIGN, commit, dvc, git, make_repository

pytestmark = pytest.mark.slow
PAGE = Path(__file__).resolve().parents[1] / "docs/team.md"


def test_a_kept_experiment_outlives_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    root, clone = tmp_path / "repository", tmp_path / "clone"
    make_repository(root)
    git(tmp_path, "init", "-q", "--bare", "remote.git")
    git(root, "remote", "add", "origin", "../remote.git")
    dvc(root, "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    commit(root, "DVC remote")
    dvc(root, "exp", "run", "-n", "tidy-ox", "-S", "train.scale=3.0")
    git(root, "checkout", "-q", ".")

    (commands,) = re.findall(r"^    dvc exp branch .*\n(?:    .+\n)*", PAGE.read_text(), re.MULTILINE)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["sh", "-ec", commands], cwd=root, env=os.environ | {"PATH": path}, check=True)

    git(tmp_path, "clone", "-q", "-b", "kept/tidy-ox", "remote.git", "clone")
    dvc(clone, "pull")
    assert (clone / "data/model.txt").read_text() == "30.0"  # the scale, 3, times the sum of 1, 2, 3 and 4
    assert "up to date" in dvc(clone, "status")
