"""The way from a fresh machine to an environment: Makefile, lock, and what they say when something is missing.

A make of its own runs in a temporary checkout with a shell script for Python, so that nothing is downloaded; the real
installation is what runs these tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Stands for the system's Python: `-m venv` makes .venv/bin/python, a script that writes down how it is called.
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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").write_text("tiny==1.0 --hash=sha256:00\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "tiny"\n')
    return tmp_path


def make(checkout: Path, *arguments: str, version: str = "3.11.7", old: int = 0, no_venv: int = 0) -> subprocess.CompletedProcess[str]:
    python = checkout / "fake-python"
    python.write_text(FAKE_PYTHON.format(version=version, old=old, no_venv=no_venv))
    python.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "MLFLOW", "DVC", "DO_NOT_TRACK"))}
    command = ["make", f"PYTHON={python}", *arguments]
    return subprocess.run(command, cwd=checkout, env=clean, capture_output=True, text=True, timeout=60)


def calls(checkout: Path) -> list[str]:
    log = checkout / "calls"
    found = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def test_repro_installs_the_lock_with_hashes_then_the_project_then_runs_dvc(checkout: Path) -> None:
    assert make(checkout, "repro", "ARGS=--dry").returncode == 0
    venv, packages, project, dvc = calls(checkout)
    assert venv == "venv"
    assert {"--require-hashes", "--no-deps", "requirements.lock"} <= set(packages.split())
    assert {"--editable", "--no-deps", "--no-build-isolation"} <= set(project.split())
    assert dvc == "dvc repro --dry"


def test_second_call_installs_nothing_whatever_the_time_stamps(checkout: Path) -> None:
    make(checkout, "repro")
    calls(checkout)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        os.utime(checkout / name)
    assert make(checkout, "repro").returncode == 0
    assert calls(checkout) == ["dvc repro"]


def test_changed_lock_makes_a_new_environment(checkout: Path) -> None:
    make(checkout, "repro")
    calls(checkout)
    (checkout / "requirements.lock").write_text("tiny==1.1 --hash=sha256:11\n")
    make(checkout, "repro")
    assert calls(checkout)[0] == "venv"


def test_changed_project_installs_the_project_alone(checkout: Path) -> None:
    make(checkout, "repro")
    calls(checkout)
    (checkout / "pyproject.toml").write_text('[project]\nname = "tiny"\nversion = "2"\n')
    make(checkout, "repro")
    project, dvc = calls(checkout)
    assert "--editable" in project and dvc.startswith("dvc")


def test_failed_download_says_what_to_do_and_the_next_call_installs_again(checkout: Path) -> None:
    (checkout / "offline").touch()
    failed = make(checkout, "repro")
    assert failed.returncode != 0
    assert "could not be installed" in failed.stderr and "run make again" in failed.stderr
    assert "dvc" not in " ".join(calls(checkout))
    (checkout / "offline").unlink()
    assert make(checkout, "repro").returncode == 0
    assert [call.split()[0] for call in calls(checkout)] == ["venv", "-m", "-m", "dvc"]


def test_moved_checkout_makes_a_new_environment(checkout: Path) -> None:
    make(checkout, "repro")
    calls(checkout)
    moved = checkout.rename(checkout.with_name("moved"))
    assert make(moved, "repro").returncode == 0
    assert calls(moved)[0] == "venv"


def test_old_python_is_named_with_what_to_do(checkout: Path) -> None:
    failed = make(checkout, "test", version="3.9.2", old=1)
    assert failed.returncode != 0
    assert "Python 3.11 or newer is needed" in failed.stderr and "is 3.9.2" in failed.stderr and "make PYTHON=" in failed.stderr
    assert not (checkout / ".venv").exists()


def test_missing_python_is_named(checkout: Path) -> None:
    failed = make(checkout, "test", "PYTHON=no-such-python")
    assert failed.returncode != 0
    assert "no-such-python is not there" in failed.stderr


def test_missing_venv_module_names_the_package(checkout: Path) -> None:
    failed = make(checkout, "test", no_venv=1)
    assert failed.returncode != 0
    assert "no venv module" in failed.stderr and "apt-get install python3-venv" in failed.stderr


def test_python_of_this_environment_passes_the_real_checks(checkout: Path) -> None:
    """The one-liners in the Makefile are valid Python and accept the version that runs here."""
    recipe = (ROOT / "Makefile").read_text()
    version_check, venv_check = re.findall(r"\$\(PYTHON\) -c '(.+?)'", recipe)
    for program in (version_check, venv_check):
        assert subprocess.run(["python", "-c", program], capture_output=True).returncode == 0
    assert subprocess.run(["python", "-c", version_check.replace("(3, 11)", "(99, 0)")], capture_output=True).returncode == 1


def test_nobody_is_told_what_is_run(checkout: Path) -> None:
    make(checkout, "repro")
    environment = (checkout / "environment").read_text().splitlines()
    assert {"MLFLOW_DISABLE_TELEMETRY=true", "DO_NOT_TRACK=true", "DVC_NO_ANALYTICS=1"} <= set(environment)
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()


def test_make_alone_lists_the_targets(checkout: Path) -> None:
    shown = make(checkout)
    assert shown.returncode == 0
    assert {"repro", "test", "check-results", "ui", "lock"} <= set(re.findall(r"^make ([\w-]+)", shown.stdout, re.MULTILINE))
    assert not (checkout / ".venv").exists()


def test_lock_has_hashes_for_every_package_and_no_addresses() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock and "index-url" not in lock and "find-links" not in lock
    requirements = [entry for entry in re.sub(r"^#.*\n", "", lock, flags=re.MULTILINE).replace("\\\n", " ").splitlines() if entry.strip()]
    assert len(requirements) > 100
    without = [entry for entry in requirements if not re.match(r"[A-Za-z0-9_.-]+==\S+( ; .+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*$", entry)]
    assert without == []


def test_lock_has_every_package_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + project["optional-dependencies"]["dev"]
    locked = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted = {re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-") for requirement in named}
    assert wanted <= {name.lower().replace("_", "-") for name in locked}


def test_ci_runs_the_tests_then_checks_the_results() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-2:] == ["make test", "make check-results"]


@pytest.fixture
def with_recipes(checkout: Path) -> Path:
    (checkout / "recipes").mkdir()
    (checkout / "recipes/other.yaml").write_text("seed: 2\n")
    (checkout / "params.yaml").write_text("seed: 1\n")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "-q"], ["add", "params.yaml"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=checkout, check=True)
    return checkout


def test_a_recipe_takes_the_place_of_committed_parameters(with_recipes: Path) -> None:
    for _ in range(2):  # the second time it is there already
        assert make(with_recipes, "repro", "RECIPE=other").returncode == 0
        assert (with_recipes / "params.yaml").read_text() == "seed: 2\n"
        assert calls(with_recipes)[-1] == "dvc repro"


@pytest.mark.parametrize(
    ("parameters", "recipe", "words"),
    [("seed: 3\n", "other", ["params.yaml", "not committed", "git checkout"]), ("seed: 1\n", "none", ['"none"', "other"])],
)
def test_a_recipe_never_costs_unsaved_parameters(with_recipes: Path, parameters: str, recipe: str, words: list[str]) -> None:
    (with_recipes / "params.yaml").write_text(parameters)
    refused = make(with_recipes, "repro", f"RECIPE={recipe}")
    assert refused.returncode != 0 and all(word in refused.stderr for word in words)
    assert (with_recipes / "params.yaml").read_text() == parameters and not any(call.startswith("dvc") for call in calls(with_recipes))
