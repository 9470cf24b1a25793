"""From a fresh machine to an environment: the Makefile, the lock, and errors when something is missing.

A make of its own runs in a temporary checkout with a shell script for Python, so nothing is downloaded; the
real installation is what runs these tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Stands for the system's Python: `-m venv` makes .venv/bin/python, a script that records its calls.
FAKE_PYTHON = """\
#!/bin/sh
case "$*" in
    *version_info*) echo {version}; exit {old} ;;
    *ensurepip*) exit {no_venv} ;;
    "-m venv --clear .venv")
        rm -rf .venv; mkdir -p .venv/bin; echo venv >> calls
        printf '#!/bin/sh\\necho "$*" >> calls\\ntest ! -e offline\\n' > .venv/bin/python
        printf '#!/bin/sh\\necho "dvc $*" >> calls\\nenv > environment\\n' > .venv/bin/dvc
        chmod +x .venv/bin/* ;;
esac
"""
FOREIGN = ("MAKE", "MFLAGS", "ARGS", "RECIPE", "MLFLOW", "DVC", "DO_NOT_TRACK")


@pytest.fixture
def checkout(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").write_text("tiny==1.0 --hash=sha256:00\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "tiny"\n')
    return tmp_path


def make(checkout, *arguments, version="3.11.7", old=0, no_venv=0):
    """Run make.  Returns its exit status, what it printed, and the calls of python and dvc."""
    python, log = checkout / "fake-python", checkout / "calls"
    python.write_text(FAKE_PYTHON.format(version=version, old=old, no_venv=no_venv))
    python.chmod(0o755)
    log.write_text("")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    command = ["make", f"PYTHON={python}", *arguments]
    done = subprocess.run(command, cwd=checkout, env=clean, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()


def test_the_lock_then_the_project_are_installed_once_and_after_a_change(checkout):
    status, _, [venv, packages, project, dvc] = make(checkout, "repro", "ARGS=--dry")
    assert (status, venv, dvc) == (0, "venv", "dvc repro --dry")
    assert {"--require-hashes", "--no-deps", "requirements.lock"} <= set(packages.split())
    assert {"--editable", "--no-deps"} <= set(project.split())
    private = {"MLFLOW_DISABLE_TELEMETRY=true", "DO_NOT_TRACK=true", "DVC_NO_ANALYTICS=1"}
    assert private <= set((checkout / "environment").read_text().splitlines())
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        os.utime(checkout / name)
    assert make(checkout, "repro")[2] == ["dvc repro"]
    (checkout / "pyproject.toml").write_text('[project]\nname = "tiny"\nversion = "2"\n')
    project, dvc = make(checkout, "repro")[2]
    assert "--editable" in project and dvc == "dvc repro"
    (checkout / "requirements.lock").write_text("tiny==1.1 --hash=sha256:11\n")
    assert make(checkout, "repro")[2][0] == "venv"
    assert make(checkout.rename(checkout.with_name("moved")), "repro")[2][0] == "venv"


def test_a_failed_download_names_the_remedy_and_is_done_again(checkout):
    (checkout / "offline").touch()
    status, text, calls = make(checkout, "repro")
    assert status != 0 and "run make again" in text and not any("dvc" in call for call in calls)
    (checkout / "offline").unlink()
    assert make(checkout, "repro")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "machine", "words"),
    [
        ([], {"version": "3.9.2", "old": 1}, ["Python 3.11 or newer", "is 3.9.2", "make PYTHON="]),
        (["PYTHON=no-such-python"], {}, ["no-such-python is not there"]),
        ([], {"no_venv": 1}, ["no venv module", "apt-get install python3-venv"]),
    ],
)
def test_a_missing_python_or_venv_is_named_with_the_remedy(checkout, arguments, machine, words):
    status, text, _ = make(checkout, "test", *arguments, **machine)
    assert status != 0 and all(word in text for word in words)
    assert not (checkout / ".venv").exists()


def test_a_recipe_takes_the_place_of_committed_parameters_only(checkout):
    parameters = checkout / "params.yaml"
    (checkout / "recipes").mkdir()
    (checkout / "recipes/other.yaml").write_text("seed: 2\n")
    parameters.write_text("seed: 1\n")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "-q"], ["add", "params.yaml"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=checkout, check=True)
    cases = [
        ("seed: 3\n", "other", ["params.yaml", "not committed", "git checkout"]),
        ("seed: 1\n", "none", ['"none"', "other"]),
    ]
    for text, recipe, words in cases:
        parameters.write_text(text)
        status, output, calls = make(checkout, "repro", f"RECIPE={recipe}")
        assert status != 0 and all(word in output for word in words)
        assert parameters.read_text() == text and not any(call.startswith("dvc") for call in calls)
    for _ in range(2):  # the second time it is there already
        assert make(checkout, "repro", "RECIPE=other")[2][-1] == "dvc repro"
        assert parameters.read_text() == "seed: 2\n"


def test_a_stage_in_a_python_without_the_packages_names_the_remedy():
    """As `dvc repro` runs it where the environment is not activated: -S leaves out site-packages."""
    command = [sys.executable, "-S", "-m", "stages.prepare"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("torch", ". .venv/bin/activate", "make repro"))
