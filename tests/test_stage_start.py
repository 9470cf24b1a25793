"""How a stage starts: in the wrong environment it names the remedy."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_stage_in_a_python_without_the_packages_names_the_remedy() -> None:
    """As `dvc repro` runs it where the environment is not activated: -S leaves out site-packages."""
    done = subprocess.run([sys.executable, "-S", "-m", "stages.prepare"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert ". .venv/bin/activate" in done.stderr and "make repro" in done.stderr and "torch" in done.stderr
